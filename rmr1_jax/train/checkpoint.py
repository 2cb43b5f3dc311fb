"""Checkpoints: a directory for each saved step, whole and proven or not there.

Orbax copies the state to the host and the step goes on; in the background it is written under a temporary name, every
file is hashed into a manifest (`manifest.py`), read again, and only then renamed to its step, and older ones go. What a
run needs to go on is the train state and a small dict, the cursor; everything else is a function of the config and
these: a rollout that was cut off is made again from the same weights, prompts and seeds, and is the same. Of several
processes each writes what its devices hold, into one directory that all of them see; the first does the rest.
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
from typing import Any

import jax
import orbax.checkpoint as ocp

from rmr1_jax.distributed.exchange import any_of, first, gather, own_share
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.write import refusal, to_disk, writing
from rmr1_jax.train import manifest
from rmr1_jax.train.config import BestConfig
from rmr1_jax.train.manifest import Damage
from rmr1_jax.train.metrics import say
from rmr1_jax.train.optim import TrainState

SAVING, REMOVING = ".saving", ".removing"  # names of what is not a checkpoint yet, and no more


class Checkpointer:
    """Saves and restores `TrainState`s under `directory/checkpoints`; leave its context to know that all is written.

    Args:
        keep: the newest ones that stay. best: one more that stays.
        every, minutes: when one is `due`: after so many steps, and so long after the last (by a clock that does not
            jump). about: what else to write into the manifests, such as the resolved config.
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
        self._keep, self._every, self._best, self._about = keep, every, best, dict(about or {})
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._last_save = time.monotonic()
        self._sound: int | None = None  # the newest step that is known to be sound
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs pages about what it raises as well
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: tuple[int, int, Future] | None = None  # step, bytes, what finishes it
        if first():
            with writing(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
            _clean(self.root)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """Wait for what is under way. Its failure is raised, unless another error is on its way already."""
        try:
            self.close()
        except RunError as e:
            if not isinstance(error, Exception):
                raise
            say(f"also: {e}")

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._under_way is not None and not self._under_way[2].done()

    def due(self, step: int) -> bool:
        """Whether to save after so many steps. All processes must ask, for their clocks may differ."""
        late = time.monotonic() - self._last_save >= self._seconds
        return step % self._every == 0 or (self._seconds < math.inf and any_of(late))

    def save(self, state: TrainState, cursor: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> float:
        """Begin to write a checkpoint of this step; returns the seconds that it kept the caller. `state` may be donated
        at once. A step that is already saved is not saved again.

        Raises:
            RunError: this save or the one before it failed; names the path, the bytes wanted and free.
        """
        began = time.perf_counter()
        self.finish()
        step = int(state.step)
        if step == self._sound:
            return 0.0
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        about = self._about | {"step": step, "cursor": dict(cursor), **_placement(state)}
        if self._best:
            about["best"] = _number(metrics, self._best.metric)
        path = self.root / f"{step}{SAVING}"
        with self._failing(step, size):
            self._orbax.save(path, args=ocp.args.StandardSave(state))
        self._under_way = step, size, self._pool.submit(self._complete, path, step, about)
        self._last_save = time.monotonic()
        return time.perf_counter() - began

    def finish(self) -> None:
        """Wait until nothing is under way.

        Raises:
            RunError: see `save`.
        """
        if self._under_way:
            step, size, future = self._under_way
            self._under_way = None
            with self._failing(step, size):
                future.result()
            self._sound = step

    def check(self) -> None:
        """Raise what went wrong with a save that has ended meanwhile."""
        if not self.saving:
            self.finish()

    def close(self) -> None:
        """Wait, and look again: what was saved last is there.

        Raises:
            RunError: see `save`.
        """
        try:
            self.finish()
            if self._sound is not None and first():
                with self._failing(self._sound, None):
                    manifest.read_manifest(self.root / str(self._sound))
        finally:
            self._pool.shutdown()
            with suppress(Exception):  # a save that failed leaves more of its errors there, and was raised already
                self._orbax.close()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest sound checkpoint, laid out as `like` is (its arrays give shapes, dtypes and shardings); None if
        there is none. Damaged ones are named and passed over.

        Raises:
            RunError: there are checkpoints, all of them damaged. InputError: the state has other shapes.
        """
        self.finish()
        found = newest_sound(self.root)
        if found is None:
            return None
        step, about = found
        now = _placement(like)
        if (was := {k: about.get(k) for k in now}) != now:
            say(f"checkpoint {step} is of {_words(was)}; going on with {_words(now)}: the same to about 1e-5")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = _restored(self._orbax, self.root / str(step), abstract, ocp.args.StandardRestore(abstract))
        self._sound = step
        return TrainState(*state), about["cursor"]

    def _complete(self, path: Path, step: int, about: dict[str, Any]) -> None:
        """In the background: what was written becomes a checkpoint, and older ones go."""
        self._orbax.wait_until_finished()
        if not first():
            return
        manifest.write_manifest(path, about)
        manifest.verify(path)
        if (target := self.root / str(step)).exists():  # a damaged one, or it would not be saved again
            _remove(target)
        path.rename(target)
        to_disk(self.root)
        self._forget(step)

    def _forget(self, newest: int) -> None:
        """Remove all but the checkpoints to keep. `newest` was just verified; later ones are what a restore passed over
        for damage."""
        older = [s for s in steps_of(self.root) if s < newest]
        keep = {newest, *older[len(older) - self._keep + 1 :]} if self._keep > 1 else {newest}
        if self._best:
            keep |= {best} if (best := self._best_of([*older, newest])) is not None else set()
        for step in steps_of(self.root):
            if step not in keep:
                _remove(self.root / str(step))

    def _best_of(self, steps: list[int]) -> int | None:
        values = {}
        for step in steps:
            try:
                value = manifest.read_manifest(self.root / str(step))["about"].get("best")
            except Damage:
                continue
            if value is not None:
                values[step] = value if self._best.mode == "max" else -value
        return max(values, key=lambda step: (values[step], step), default=None)

    @contextmanager
    def _failing(self, step: int, size: int | None) -> Iterator[None]:
        """What Orbax, TensorStore and the file system raise, of many kinds, as one `RunError`."""
        try:
            yield
        except Exception as e:
            if first():
                _clean(self.root)  # half of a checkpoint takes the room that is wanted
            left = steps_of(self.root)
            then = f"the checkpoint of step {left[-1]} stands" if left else "there is no checkpoint yet"
            why = re.sub(r" ?\[tensorstore_spec='.*?'\]", "", " ".join(str(e).split())) or type(e).__name__
            raise RunError(refusal(self.root / str(step), why, size, f"{then}; make room or mend it")) from e


def restore_params(directory: Path, like: Any) -> Any:
    """Only the weights of the newest sound checkpoint of a run, for export.

    Args:
        like: a tree of `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        InputError: the run has no checkpoint, or weights of other shapes. RunError: all of them are damaged.
    """
    root = (directory / "checkpoints").absolute()
    found = newest_sound(root)
    if found is None:
        raise InputError(f"{directory} holds no checkpoint; expected {root}/<step>")
    restore_args = ocp.checkpoint_utils.construct_restore_args({"params": like})
    args = ocp.args.PyTreeRestore(item={"params": like}, restore_args=restore_args, partial_restore=True)
    return _restored(ocp.PyTreeCheckpointer(), root / str(found[0]), {"params": like}, args)["params"]


def steps_of(root: Path) -> list[int]:
    """The steps of which there is a directory, sound or not, in order."""
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []


def newest_sound(root: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint whose every file is as it was written, and what its manifest says of it; None where there
    is no checkpoint. Damaged ones are named. Several processes share the reading.

    Raises:
        RunError: all are damaged.
    """
    damaged = []
    for step in reversed(gather(steps_of(root))[0]):
        path = root / str(step)
        try:
            found = manifest.read_manifest(path)
            if found["about"]["step"] != step:
                raise Damage(f"{manifest.NAME}: expected to be of step {step}, found {found['about']['step']}")
            wrong = manifest.check_files(path, found["files"], own_share(sorted(found["files"])))
        except Damage as e:
            wrong = [str(e)]
        wrong = sorted({line for lines in gather(wrong) for line in lines})
        if not wrong:
            return step, found["about"]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        damaged.append(f"checkpoint {step} is damaged: {path}/{wrong[0]}{more}")
        say(f"{damaged[-1]}; passed over")
    if damaged:
        raise RunError(f"no sound checkpoint is left: {'; '.join(damaged)}. To begin anew, remove {root}")
    return None


def _restored(checkpointer: ocp.Checkpointer, path: Path, like: Any, args: Any) -> Any:
    """Orbax's restore; where the state is to have other shapes, the leaves are named, which Orbax does not do."""
    stored = jax.tree_util.tree_leaves_with_path(ocp.PyTreeCheckpointer().metadata(path).item_metadata.tree)
    shapes = {_name(k): tuple(v.shape) for k, v in stored}
    wanted = {_name(k): tuple(v.shape) for k, v in jax.tree_util.tree_leaves_with_path(like)}
    wrong = [f"{k}: is {shapes.get(k)}, expected {v}" for k, v in wanted.items() if shapes.get(k) != v]
    if wrong:
        named = "; ".join(wrong[:3]) + (f", and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise InputError(f"{path} is of another model: {named}; give the model that the run began with")
    return checkpointer.restore(path, args=args)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _placement(state: TrainState) -> dict[str, Any]:
    """On what a state lies: sums over another number of devices differ in their last bits."""
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    return {"mesh": dict(mesh.shape), "processes": jax.process_count()}


def _words(placement: Mapping[str, Any]) -> str:
    axes = " x ".join(f"{name}={size}" for name, size in (placement["mesh"] or {}).items())
    return f"a mesh of {axes} in {placement['processes']} process{'es' if placement['processes'] != 1 else ''}"


def _number(metrics: Mapping[str, Any] | None, name: str) -> float | None:
    """The value that the best checkpoint is chosen by.

    Raises:
        InputError: there is no such metric.
    """
    if metrics is None:
        return None
    if name not in metrics:
        raise InputError(f"best.metric={name!r} is no metric of this stage; known are {', '.join(sorted(metrics))}")
    value = metrics[name]
    return float(value) if value is not None and math.isfinite(value) else None


def _remove(path: Path) -> None:
    """Under a name that is not a checkpoint's first: a kill in the middle leaves no half of one."""
    gone = path.with_name(path.name + REMOVING)
    path.rename(gone)
    shutil.rmtree(gone)


def _clean(root: Path) -> None:
    """Remove what killed runs left half written, or half removed."""
    for path in root.glob("*"):
        if SAVING in path.name or REMOVING in path.name:
            shutil.rmtree(path, ignore_errors=True)
