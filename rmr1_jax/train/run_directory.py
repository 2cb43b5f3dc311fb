"""A run's directory: its resolved config, so that no other run goes on in it unnoticed; and what keeps the run safe."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from rmr1_jax.config import config_differences, dump_config
from rmr1_jax.data.packing import lengths_of
from rmr1_jax.distributed.exchange import first, wait
from rmr1_jax.distributed.preemption import Preemption
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.policy import Policy
from rmr1_jax.train.checkpoint import Checkpointer
from rmr1_jax.train.metrics import say

# Settings that may differ between a run and its continuation. These change how it is run, not what it computes;
NO_EFFECT = {"out", "save_every", "save_minutes", "keep", "best", "on_nonfinite"}


# these change the order of sums, and so the last bits.
ROUNDING = {"mesh", "sampling_tensor", "remat", "attention", "reference_memory", "optimizer.memory"}

LESS_MEMORY = (
    "What makes less do: fewer micro_rows, a shorter row_length, remat=offload, optimizer.mu_dtype=bfloat16, "
    "optimizer.memory=host, a larger mesh, and while sampling fewer sampling.slots; `rmr1 plan CONFIG` says what fits"
)


def start_run(config: Any, directory: Path) -> None:
    """Make the run directory and write the resolved config; refuse to continue a different run there. A difference that
    does not matter is said.

    Raises:
        InputError: the directory holds a run with another config; names every difference. RunError: it cannot be
            written to.
    """
    if re.match(r"\w+:/", str(directory)):
        raise InputError(
            f"out={directory} is an address; give a directory, on several hosts one that all of them mount"
        )
    path = directory / "config.yaml"
    if path.is_file():
        _compare(path, config)
    wait("config read")  # by all of them, before the first one writes it anew
    if first():
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, dump_config(config))
    wait("config written")
    if not path.is_file():
        raise InputError(f"{path} is there for process 0 but not here; `out` must be a directory that all hosts see")


@contextmanager
def kept_safe(config: Any, directory: Path) -> Iterator[tuple[Checkpointer, Preemption]]:
    """A run's checkpoints, as its config wants them, and its ear for SIGTERM.

    Raises:
        RunError: the devices' memory does not do for the run; names the settings that change it.
    """
    policies = {"keep": config.keep, "every": config.save_every, "minutes": config.save_minutes, "best": config.best}
    about = {"config": yaml.safe_load(dump_config(config))}
    with Preemption() as preemption, Checkpointer(directory, **policies, about=about) as checkpoints:
        preemption.hold = lambda: checkpoints.saving
        try:
            yield checkpoints, preemption
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            raise RunError(f"out of device memory ({' '.join(str(e).split())[:200]}). {LESS_MEMORY}") from e


def data_digest(examples: Sequence[Any]) -> str:
    """What tells a data set from another of the same name: how many examples it has, and how long each is."""
    return hashlib.sha256(np.asarray(lengths_of(examples), np.int32).tobytes()).hexdigest()[:16]


def same_data(restored: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The cursor of a checkpoint, if it is one into the data there is now.

    Raises:
        InputError: the data is another.
    """
    if restored.get("data", now["data"]) != now["data"]:
        raise InputError(
            "the data has changed since the checkpoint was written (another number of examples, or other lengths): its "
            "cursor would point to other rows. Give the data as it was, or another `out`"
        )
    return now | restored


def save_model(policy: Policy, directory: Path) -> None:
    """`Policy.save`; what the file system refuses is said with the bytes wanted. Nothing half written stays there."""
    size = sum(x.nbytes for x in jax.tree.leaves(policy.params))
    with writing(directory, size, "the last checkpoint stands; make room and run the same command again"):
        policy.save(directory)


def _compare(path: Path, config: Any) -> None:
    old = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    changed = config_differences(old, yaml.safe_load(dump_config(config)))
    fatal = {k for k in changed if not _is_in(k, NO_EFFECT | ROUNDING)}
    if fatal:
        raise InputError(
            f"{path.parent} holds a run with another config ({_listed(changed, fatal)}); give another `out`, or remove "
            "it"
        )
    for known, effect in ((NO_EFFECT - {"out"}, "no number"), (ROUNDING, "the last bits of numbers only")):
        if noted := {k for k in changed if _is_in(k, known)}:
            say(f"changed, which changes {effect}: {_listed(changed, noted)}")


def _is_in(key: str, known: set[str]) -> bool:
    """Whether `key`, or the section that it is in, is known."""
    return any(key == k or key.startswith(f"{k}.") for k in known)


def _listed(changed: dict[str, tuple[Any, Any]], keys: set[str]) -> str:
    return "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items() if k in keys)
