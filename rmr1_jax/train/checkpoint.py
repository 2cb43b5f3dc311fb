"""Checkpoints: one directory for each saved step, which is there only once every file in it has been verified.

Orbax copies the state to host memory and training continues. In the background the state is written under a temporary
name, every file is hashed into a manifest (`manifest.py`) and read back, and only then is the directory renamed to its
step and are older checkpoints removed. A run continues from the train state and a small dict, the cursor. All else is a
function of the config and of these: an interrupted rollout is made again from the same weights, prompts and seeds, and
is the same. Of several processes, each writes what its devices hold into one directory that all of them see, and the
first does the rest. Next: `run.py`, which saves and restores.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationContext

from rmr1_jax.distributed.exchange import any_of, first, gather, own_share
from rmr1_jax.distributed.terminal import say, waiting
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.write import provenance, refusal, to_disk, writing
from rmr1_jax.train import manifest
from rmr1_jax.train.config import BestConfig
from rmr1_jax.train.manifest import Damage
from rmr1_jax.train.metrics import is_held_out
from rmr1_jax.train.optim import TrainState
from rmr1_jax.train.stored_tree import deferred, restored

LARGE_COPY = 2**30  # bytes of a state whose copy a CPU cannot keep beside the next step
SAVING, REMOVING = ".saving", ".removing"  # suffixes of directories that are not checkpoints yet, or no longer


class Checkpointer:
    """Saves and restores `TrainState`s under `directory/checkpoints`. Leaving its context waits for the last save.

    keep: how many of the newest checkpoints are kept. best: which one is kept in addition. every, minutes: a checkpoint
    is `due` after so many steps, and so many minutes after the last one (by a clock that does not jump). about: further
    facts for the manifests, such as the resolved config.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        every: int = 1,
        minutes: float | None = None,
        best: BestConfig | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        self.root = (directory / "checkpoints").absolute()
        self._every, self._best, self._about = every, best, dict(about or {})
        options = {"n": 1 if best else 0, "reverse": best is not None and best.mode == "min"}
        best_one = BestN(get_metric_fn=float, keep_checkpoints_without_metrics=False, **options)
        self._kept = AnyPreservationPolicy([LatestN(keep), best_one])
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._last_save = time.monotonic()
        self._verified: int | None = None  # the newest step that was verified
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax also logs, at length, the errors that it raises
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, int, Future] | None = None  # the save in progress: its step, its bytes, its end
        if first():
            with writing(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(self.root)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """Wait for the save in progress and raise its failure, unless another error is being raised already."""
        try:
            self.close()
        except RunError as e:
            if not isinstance(error, Exception):
                raise
            say(f"also: {e}")

    @property
    def saving(self) -> bool:
        """Whether a save is in progress."""
        return self._pending is not None and not self._pending[2].done()

    def due(self, step: int) -> bool:
        """Whether to save after so many steps. Collective: the clocks of the processes may differ."""
        late = time.monotonic() - self._last_save >= self._seconds
        return step % self._every == 0 or (self._seconds < math.inf and any_of(late))

    def save(self, state: TrainState, cursor: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> float:
        """Start to write a checkpoint; returns the seconds for which the caller was blocked. `state` may be donated
        as soon as this returns. A step that is already saved is not saved again.

        Raises RunError if this save or the one before it failed, which names the path and the bytes needed and free;
        InputError if `best` names a metric that is not among `metrics`.
        """
        began = time.perf_counter()
        self.finish()
        step = int(state.step)
        if step == self._verified:
            return 0.0
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        about = self._about | {"step": step, "cursor": dict(cursor), **_placement(state), **provenance()}
        if self._best and metrics is not None:
            about["best"] = _metric_value(metrics, self._best.metric)
        path = self.root / f"{step}{SAVING}"
        with self._refused(step, size):
            self._orbax.save(path, args=ocp.args.StandardSave(state))
        self._pending = step, size, self._pool.submit(self._complete, path, step, about)
        if size > LARGE_COPY and jax.default_backend() == "cpu":
            self.finish()  # the copy lies in the memory that the next step needs
        self._last_save = time.monotonic()
        return time.perf_counter() - began

    def finish(self) -> None:
        """Wait until no save is in progress. Raises RunError as `save`."""
        if self._pending:
            step, size, future = self._pending
            self._pending = None
            with self._refused(step, size), waiting(f"writing checkpoint {step}"):
                future.result()
            self._verified = step

    def check(self) -> None:
        """Raise the failure of a save that has ended, as `save`. Does not wait."""
        if not self.saving:
            self.finish()

    def close(self) -> None:
        """Wait, and check that the last checkpoint still exists. Raises RunError as `save`."""
        try:
            self.finish()
            if self._verified is not None and first():
                with self._refused(self._verified, None):
                    manifest.read_manifest(self.root / str(self._verified))
        finally:
            self._pool.shutdown()
            with suppress(Exception):  # it raises the errors of a failed save again
                self._orbax.close()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Read the newest undamaged checkpoint, laid out as `like` is (whose arrays give shapes, dtypes and shardings).
        Returns the state and the cursor, or None where there is no checkpoint. Damaged checkpoints are reported.

        Raises RunError if all checkpoints are damaged, InputError if the state has other shapes.
        """
        self.finish()
        if (found := newest_undamaged(self.root)) is None:
            return None
        step, about = found
        now = _placement(like)
        if (was := {k: about.get(k) for k in now}) != now:
            change = f"was written on {_described(was)}; the run continues on {_described(now)}"
            say(f"checkpoint {step} {change}: the numbers are the same to about 1e-5")
        state = restored(self.root / str(step), jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        self._verified = step
        return state, about["cursor"]

    def _complete(self, path: Path, step: int, about: dict[str, Any]) -> None:
        """Verify in the background what was written, make it a checkpoint, and remove older ones."""
        self._orbax.wait_until_finished()
        if not first():
            return
        manifest.write_manifest(path, about)
        manifest.verify(path)
        if (target := self.root / str(step)).exists():  # a damaged one, or it would not be saved again
            _remove(target)
        path.rename(target)
        to_disk(self.root)
        self._remove_old(step)

    def _remove_old(self, newest: int) -> None:
        """Remove all checkpoints but those to keep. `newest` was just verified; a restore found later ones damaged."""
        steps = steps_of(self.root)
        candidates = [SimpleNamespace(step=step, metrics=None) for step in steps if step <= newest]
        for candidate in candidates:
            with suppress(Damage):
                candidate.metrics = manifest.read_manifest(self.root / str(candidate.step))["about"].get("best")
        kept = self._kept.should_preserve(candidates, context=PreservationContext())
        for step in set(steps) - {candidate.step for candidate, stays in zip(candidates, kept, strict=True) if stays}:
            _remove(self.root / str(step))

    @contextmanager
    def _refused(self, step: int, size: int | None) -> Iterator[None]:
        """Turn the many errors of Orbax, TensorStore and the file system into one `RunError`."""
        try:
            yield
        except Exception as e:
            if first():
                _remove_unfinished(self.root)  # half a checkpoint takes the room that is needed
            left = steps_of(self.root)
            remaining = f"the checkpoint of step {left[-1]} remains" if left else "there is no checkpoint yet"
            why = re.sub(r" ?\[tensorstore_spec='.*?'\]", "", " ".join(str(e).split())) or type(e).__name__
            advice = f"{remaining}; free some space, or repair the disk"
            raise RunError(refusal(self.root / str(step), why, size, advice)) from e


def stored_params(directory: Path, like: Any) -> Any:
    """The weights of a run's newest undamaged checkpoint, for export: a tree of functions, each of which reads one
    array. like: a tree of `jax.ShapeDtypeStruct`s with shardings.

    Raises InputError if the run has no checkpoint, or weights of other shapes; RunError if all checkpoints are damaged.
    """
    root = (directory / "checkpoints").absolute()
    if (found := newest_undamaged(root)) is None:
        raise InputError(f"{directory} holds no checkpoint; expected {root}/<step>")
    return deferred(root / str(found[0]), {"params": like})["params"]


def steps_of(root: Path) -> list[int]:
    """The steps that have a checkpoint, damaged or not, in order."""
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []


def newest_undamaged(root: Path) -> tuple[int, dict[str, Any]] | None:
    """Find the newest checkpoint whose every file is as it was written. The processes share the reading.

    Returns its step and the facts in its manifest, or None where there is no checkpoint. Damaged ones are reported.
    Raises RunError if all are damaged.
    """
    damaged = []
    for step in reversed(gather(steps_of(root))[0]):
        path = root / str(step)
        try:
            found = manifest.read_manifest(path)
            if found["about"]["step"] != step:
                raise Damage(f"{manifest.NAME}: expected to be of step {step}, found {found['about']['step']}")
            wrong = manifest.check_files(path, dict(own_share(sorted(found["files"].items()))))
        except Damage as e:
            wrong = [str(e)]
        wrong = sorted({line for lines in gather(wrong) for line in lines})
        if not wrong:
            return step, found["about"]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        damaged.append(f"checkpoint {step} is damaged: {path}/{wrong[0]}{more}")
        say(f"{damaged[-1]}; it is skipped")
    if damaged:
        raise RunError(f"no undamaged checkpoint is left: {'; '.join(damaged)}. To start the run again, remove {root}")
    return None


def _placement(state: TrainState) -> dict[str, Any]:
    """The devices that hold a state: sums over another number of devices differ in their last bits."""
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    return {"mesh": dict(mesh.shape), "processes": jax.process_count()}


def _described(placement: Mapping[str, Any]) -> str:
    axes = " x ".join(f"{name}={size}" for name, size in (placement["mesh"] or {}).items())
    return f"a mesh of {axes} in {placement['processes']} process{'es' if placement['processes'] != 1 else ''}"


def _metric_value(metrics: Mapping[str, Any], name: str) -> float | None:
    """The value of the `best` metric at a step, or None where it is not finite or the held-out data was not measured.
    Raises InputError if there is no such metric."""
    if is_held_out(name) and not any(map(is_held_out, metrics)):
        return None
    if name not in metrics:
        raise InputError(f"best.metric={name!r} is not a metric of this stage, which has {', '.join(sorted(metrics))}")
    value = metrics[name]
    return float(value) if value is not None and math.isfinite(value) else None


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill in the middle leaves no half of one."""
    gone = path.with_name(path.name + REMOVING)
    path.rename(gone)
    shutil.rmtree(gone)


def _remove_unfinished(root: Path) -> None:
    """Remove what killed runs left half written or half removed."""
    for path in root.glob("*"):
        if SAVING in path.name or REMOVING in path.name:
            shutil.rmtree(path, ignore_errors=True)
