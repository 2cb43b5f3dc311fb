"""Checkpoints: one Orbax step directory holds the whole state of a run, and a run directory holds its config.

A checkpoint is complete or it is not there: Orbax writes to a temporary name and renames. What a run needs to go on is
the train state and a small dict, the cursor; everything else is a function of the config and these. Of several
processes each writes what its devices hold, into one directory that all of them see.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import yaml

from rmr1_jax.config import config_differences, dump_config
from rmr1_jax.errors import InputError
from rmr1_jax.processes import first, wait
from rmr1_jax.train.optim import TrainState


class Checkpointer:
    """Saves and restores `TrainState`s under `directory/checkpoints`, keeping the newest `keep`."""

    def __init__(self, directory: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options)

    def save(self, state: TrainState, cursor: dict[str, Any]) -> float:
        """Write a checkpoint of this step; returns when it is on disk, with the seconds that it took."""
        began = time.perf_counter()
        step = int(state.step)
        if step in self._manager.all_steps():
            return 0.0
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), cursor=ocp.args.JsonSave(cursor))
        )
        self._manager.wait_until_finished()
        return time.perf_counter() - began

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint, laid out as `like` is (its arrays give shapes, dtypes and shardings); None if there is
        none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), cursor=ocp.args.JsonRestore())
        )
        return TrainState(*found["state"]), found["cursor"]

    def close(self) -> None:
        self._manager.close()


def restore_params(directory: Path, like: Any) -> Any:
    """Only the weights of the newest checkpoint of a run, for export.

    Args:
        like: a tree of `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        InputError: the run has no checkpoint.
    """
    root = (directory / "checkpoints").absolute()
    steps = sorted(int(p.name) for p in root.glob("*") if p.name.isdigit()) if root.is_dir() else []
    if not steps:
        raise InputError(f"{directory} holds no checkpoint; expected {root}/<step>")
    restore_args = ocp.checkpoint_utils.construct_restore_args({"params": like})
    args = ocp.args.PyTreeRestore(item={"params": like}, restore_args=restore_args, partial_restore=True)
    return ocp.PyTreeCheckpointer().restore(root / str(steps[-1]) / "state", args=args)["params"]


# These may differ between a run and its continuation: they change how it is run, not what it computes.
HARMLESS = frozenset({"out", "save_every", "keep"})


def start_run(config: Any, directory: Path) -> None:
    """Make the run directory and write the resolved config; refuse to continue a different run there.

    Raises:
        InputError: the directory holds a run with another config; names every difference.
    """
    if re.match(r"\w+:/", str(directory)):
        raise InputError(
            f"out={directory} is an address; give a directory, on several hosts one that all of them mount"
        )
    path = directory / "config.yaml"
    if path.is_file():
        old = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        new = yaml.safe_load(dump_config(config))
        changed = {k: v for k, v in config_differences(old, new).items() if k not in HARMLESS}
        if changed:
            listed = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
            raise InputError(
                f"{directory} holds a run with another config ({listed}); give another `out`, or remove it"
            )
    wait("config read")  # by all of them, before the first one writes it anew
    if first():
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")  # a kill leaves the old file or the new one, never half of one
        partial.write_text(dump_config(config), encoding="utf-8")
        partial.replace(path)
    wait("config written")
    if not path.is_file():
        raise InputError(f"{path} is there for process 0 but not here; `out` must be a directory that all hosts see")
