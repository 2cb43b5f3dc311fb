"""Loggers: TensorBoard and Weights & Biases show the metrics of a run while it goes on.

`metrics.jsonl` is the record; a logger is a copy of it, which agrees with it after a kill as well. A continued run
removes the steps after its checkpoint from `metrics.jsonl`, and a logger then drops or skips the same steps, and is
given those that it lacks. Metrics that TRL and Transformers log too have their names there. Only the first process
logs. Next: `run.py`, which writes each step.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import yaml

from rmr1_jax.config import dump_config
from rmr1_jax.distributed.exchange import from_first
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.train.config import RunConfig
from rmr1_jax.train.metrics import is_held_out, read_metrics

# Our names -> the names in the logs of TRL's SFTTrainer and GRPOTrainer, where they differ and mean the same.
TRL_NAMES = MappingProxyType(
    {
        "lr": "learning_rate",
        "seconds": "step_time",
        "response_length": "completions/mean_length",
        "truncated": "completions/clipped_ratio",
        "clip_fraction": "clip_ratio/region_mean",
        "importance_mean": "sampling/importance_sampling_ratio/mean",
        "importance_max": "sampling/importance_sampling_ratio/max",
        "eval_seconds": "eval_runtime",
    }
)


class Logger(Protocol):
    """Receives the metrics of each step. start: the first step that this process trains."""

    def __init__(self, config: RunConfig, start: int) -> None: ...

    def write(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl."""

    def close(self, failed: bool) -> None:
        """End the log. failed: whether the run ends with an error."""


def logged_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl by the names that they have in a logger, without `step`. As with TRL, those
    of an evaluation begin with eval/, all others with train/. Numbers that are not finite are left out."""
    values = {}
    for key, value in row.items():
        if key == "step" or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        is_eval, name = is_held_out(key), key.removeprefix("eval_")
        name = TRL_NAMES.get(key, TRL_NAMES.get(name, name)).removeprefix("eval_")
        values[f"{'eval' if is_eval else 'train'}/{name}"] = value
    return values


class TensorBoard:
    """Writes event files in `out/tensorboard`, by TensorBoard's own record writer, which needs no TensorFlow."""

    def __init__(self, config: RunConfig, start: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory = Path(config.out) / "tensorboard"
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        earlier = [int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.*")]
        stamp = max(int(time.time()), *(1 + each for each in earlier), 0)  # readers take the files in this order
        self._path = directory / f"events.out.tfevents.{stamp}.{socket.gethostname()}.{os.getpid()}"
        self._event = Event
        with writing(self._path):
            self._records = RecordWriter(self._path.open("wb"))
        self._write(file_version="brain.Event:2")
        if earlier:  # tells readers to drop the steps from `start` on, which are trained again
            self._write(step=start, session_log=SessionLog(status=SessionLog.START))
        else:
            for row in _rows(config, start):
                self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in logged_values(row).items()]
        self._write(step=row["step"], summary=Summary(value=values))

    def close(self, failed: bool) -> None:
        self._records.close()

    def _write(self, **event: Any) -> None:
        with writing(self._path):
            self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())
            self._records.flush()


class WeightsAndBiases:
    """Logs to a run of Weights & Biases, the same one when the run is continued: `out/wandb_run_id` holds its id. The
    environment variables of W&B hold, such as WANDB_MODE=offline, WANDB_PROJECT and WANDB_API_KEY.

    The server knows the newest step of the run, so that exactly the later ones are sent. Offline nobody knows what a
    killed process still wrote: a continued run writes all steps again, and removes the older copies.
    """

    def __init__(self, config: RunConfig, start: int):
        import wandb

        out = Path(config.out).absolute()
        settings = {"id": _run_id(out / "wandb_run_id"), "dir": out, "resume": "allow", "name": out.name}
        settings["project"] = os.environ.get("WANDB_PROJECT", "rmr1_jax")
        try:
            self._run = wandb.init(config=yaml.safe_load(dump_config(config)), **settings)
        except Exception as e:  # some of W&B's errors have no public class
            advice = "log in with `wandb login`, set WANDB_MODE=offline, or leave wandb out of `logger`"
            raise RunError(f"Weights & Biases cannot start a run: {e}; {advice}") from e
        self._next = self._run.step
        if self._run.offline and _remove_copies(Path(self._run.dir).parent, self._run.id):
            self._next = start
        for row in _rows(config, start):
            self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        if row["step"] >= self._next:
            self._run.log(logged_values(row), step=row["step"], commit=True)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


LOGGERS: Mapping[str, type[Logger]] = MappingProxyType({"tensorboard": TensorBoard, "wandb": WeightsAndBiases})


class Loggers:
    """The loggers of a run whose next step is `start` (a collective). Leaving its context closes them. Raises RunError
    if one cannot start."""

    def __init__(self, config: RunConfig, start: int):
        self._open: list[Logger] = []  # of the first process

        def open_all() -> None:
            self._open += [LOGGERS[name](config, start) for name in config.logger]

        from_first(open_all)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        for logger in self._open:
            logger.close(failed=kind is not None)

    def write(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl. Raises RunError if it cannot be written."""
        for logger in self._open:
            logger.write(row)


def check_loggers(names: Sequence[str]) -> None:
    """Check that the packages of the loggers are installed (a collective). Raises InputError for the first that is
    not."""

    def check() -> None:
        for name in names:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # a directory `wandb` in the working directory is no package
                raise InputError(
                    f"logger: {name} requires the package {name}, which is not installed; run "
                    f"pip install 'rmr1-jax[{name}]', or leave {name} out of `logger`"
                )

    from_first(check)


def _rows(config: RunConfig, end: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl before step `end`, for a logger that does not have them yet."""
    return [row for row in read_metrics(config.out) if row["step"] < end] if end else []


def _run_id(path: Path) -> str:
    """The id of the W&B run, the one in the file if it exists."""
    if not path.is_file():
        write_whole(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()


def _remove_copies(current: Path, run_id: str) -> bool:
    """Remove the directories of earlier offline processes of a W&B run, because `current` gets all their steps. Those
    that were synchronized are kept, as W&B has marked them; returns whether there are any."""
    earlier = [path for path in current.parent.glob(f"offline-run-*-{run_id}*") if path != current]
    kept = [path for path in earlier if list(path.glob("*.synced"))]
    for path in set(earlier) - set(kept):
        # W&B's own process may outlive a killed run for a moment, and write into the directory while it is removed.
        for _ in range(10):
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
            time.sleep(0.1)
    return bool(kept)
