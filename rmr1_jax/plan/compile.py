"""Compile a program for devices that need not be there, and say what lies on a chip while it runs.

Read `plan_train.py` and `plan_sampler.py` next: which programs those are.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmr1_jax.distributed.mesh import slice_of
from rmr1_jax.plan.slice import overflow
from rmr1_jax.plan.traffic import Traffic, read_traffic


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What lies on a chip while a program runs, in bytes.

    arguments: what the program reads and writes, and what else lies there. temporaries: what it needs beside them.
    code: its own. seconds: to compile. traffic: between chips; None where the compiler refused, for lack of memory.
    """

    arguments: int
    temporaries: int
    code: int
    seconds: float
    traffic: Traffic | None

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.code

    def fits(self, limit: int) -> bool:
        return self.traffic is not None and self.total <= limit


def compile_program(
    program: Callable[..., Any],
    *arguments: Any,
    devices: Sequence[jax.Device],
    resident: int = 0,
    dynamic_trips: float = 1,
) -> Compiled:
    """Compile a jitted function of `ShapeDtypeStruct`s with shardings; other arguments are passed on as they are.

    Args:
        devices: of the mesh, in its order. resident: bytes a chip of what lies there and is no argument.
        dynamic_trips: see `plan_hlo.read_traffic`.
    """
    lowered = program.lower(*arguments)
    start, given = time.perf_counter(), bytes_here(arguments)
    try:
        compiled, text = _compile(lowered, devices[0].platform)
    except jax.errors.JaxRuntimeError as e:
        needed, _ = overflow(e)
        return Compiled(given + resident, max(0, needed - given), 0, time.perf_counter() - start, None)
    seconds, m = time.perf_counter() - start, compiled.memory_analysis()
    slices = len({slice_of(d) for d in devices})
    traffic = read_traffic(text, len(devices) // slices, slices=slices, dynamic_trips=dynamic_trips)
    # What the program does not read is no argument of it, and lies there; padding makes arguments larger than shapes.
    held = max(given, m.argument_size_in_bytes) + resident
    temporaries = m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return Compiled(held, temporaries, m.generated_code_size_in_bytes, seconds, traffic)


def _compile(lowered: Any, platform: str) -> tuple[Any, str]:
    """The compiled program and its HLO text."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # libtpu writes asynchronous instructions that jaxlib, made at another date, may refuse to read back.
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        # Numbered; what the compiler takes out of a program to compile it by itself comes after it.
        file = min(Path(folder).glob("*.after_optimizations.txt"))
        return compiled, file.read_text(encoding="utf-8")


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes and dtypes in the place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def bytes_here(tree: Any) -> int:
    """Of the arrays' parts in the memory of one chip; what is described as in the host's memory is not there."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    on_chip = [x for x in arrays if x.sharding.memory_kind != "pinned_host"]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in on_chip)
