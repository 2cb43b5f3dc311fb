"""Profiles: what the devices and the host did and when, as XProf and TensorBoard read it.

The scopes of the programs (`layers`, `attention`, `mlp`, `head`, `draw`, `update`) are in the names of their
operations; the host's lines have `rollout` and the steps of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from rmr1_jax.distributed.exchange import first
from rmr1_jax.files.write import writing


@contextmanager
def profiling(directory: Path | None) -> Iterator[None]:
    """Record a profile of the `with` block in `directory`, of process 0 alone; None: record nothing.

    Raises:
        RunError: the directory cannot be written to.
    """
    if directory is None or not first():
        yield
        return
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a Python function would be an event
    with jax.profiler.trace(directory, profiler_options=options):
        yield
