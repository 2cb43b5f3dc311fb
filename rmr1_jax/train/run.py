"""A run of a training stage: what `sft` and `grpo` do alike around the update of each step.

A stage's loop is `for step in run.steps(...)`: make a batch, update, `run.record(...)`. Here are restoring, the
progress bar, timing, the metrics file, saving when a checkpoint is due, and stopping after SIGTERM. Next: `sft.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml

from rmr1_jax.config import dump_config
from rmr1_jax.distributed.mesh import make_mesh
from rmr1_jax.distributed.preemption import Preempted, Preemption
from rmr1_jax.distributed.profile import profiling
from rmr1_jax.distributed.terminal import bar, say, waiting
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.model.qwen import Params
from rmr1_jax.policy import Policy, load
from rmr1_jax.train.checkpoint import Checkpointer
from rmr1_jax.train.config import ProfileConfig, RunConfig
from rmr1_jax.train.evaluation import Evaluation
from rmr1_jax.train.loggers import Loggers
from rmr1_jax.train.metrics import MetricsLog, is_held_out
from rmr1_jax.train.optim import TrainState
from rmr1_jax.train.run_directory import same_data

LESS_MEMORY = (
    "These settings reduce it: fewer micro_rows, a shorter row_length, remat=offload, optimizer.mu_dtype=bfloat16, "
    "optimizer.memory=host, a larger mesh, and while sampling fewer sampling.slots; `rmr1 plan CONFIG` estimates it"
)
SHOWN_HELD_OUT = ("eval_loss", "eval_accuracy", "eval_valid")  # by the progress bar


class Run:
    """A stage's run in `directory`, made by `open_run`. All processes must call its methods together."""

    def __init__(self, stage: str, config: RunConfig, checkpoints: Checkpointer, preemption: Preemption):
        self.stage, self.directory, self._config = stage, Path(config.out), config
        self.checkpoints, self.preemption = checkpoints, preemption
        self._save_seconds, self._restored = 0.0, None
        self._measured: dict[str, float] = {}  # the newest metrics of the held-out data
        self.until_end = ExitStack()  # what `open_run` closes, also after an error in the loop over the steps

    def restore(self, state: TrainState, cursor: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """The state and cursor of the newest undamaged checkpoint, or those given where there is no checkpoint. Raises
        InputError if the checkpoint is of another model or of other data, RunError if all checkpoints are damaged."""
        with waiting(f"{self.stage}: reading the newest checkpoint in {self.directory}"):
            restored = self.checkpoints.restore(state)
        self._restored = int(restored[0].step) if restored else None  # counts updates, and names the checkpoint
        return (restored[0], same_data(restored[1], cursor)) if restored else (state, cursor)

    def steps(self, start: int, total: int) -> Iterator[int]:
        """The numbers of the steps from `start` to `total`, with a progress bar and a fresh clock for each. Says where
        a run is continued, and that a finished one has no steps left."""
        self._log = MetricsLog(self.directory, next_step=start)
        if start >= total:
            say(f"{self.stage}: finished at step {total}; nothing to train")
            return
        if self._restored is not None:
            say(f"{self.stage}: resumed at step {start} of {total} from checkpoints/{self._restored}")
        self._loggers = self.until_end.enter_context(Loggers(self._config, start))
        recorded = self.until_end.enter_context(_Recorded(self._config.profile, self.directory, self.stage, start))
        self._bar = self.until_end.enter_context(bar(self.stage, start=start, total=total, unit="step"))
        self._bar.set_postfix_str("compiling the programs of the first step")
        for step in range(start, total):
            self.checkpoints.check()
            self._step, self._is_last = step, step + 1 == total
            self._times: dict[str, float] = {}
            self._mark = time.perf_counter()
            with recorded.step(step):
                yield step

    def lap(self, name: str) -> float:
        """Record the seconds since the step began or since the last lap as the metric `name`, and return them."""
        now = time.perf_counter()
        self._times[name], self._mark = now - self._mark, now
        return self._times[name]

    @property
    def seconds(self) -> float:
        """The seconds of the step up to its last lap."""
        return sum(self._times.values())

    def evaluate(self, evaluation: Evaluation | None, params: Params) -> dict[str, float]:
        """The metrics of the held-out data under `params`, whose names begin with `eval_`. Empty where there is none,
        and at steps at which it is not measured."""
        if evaluation is None or not (self._is_last or (self._step + 1) % self._config.eval_every == 0):
            return {}
        self._bar.set_postfix_str("measuring the held-out data")
        self._measured = {f"eval_{name}": value for name, value in evaluation(params).items()}
        self.lap("eval_seconds")
        return self._measured

    def record(self, row: Mapping[str, Any], state: TrainState, cursor: Mapping[str, Any], **shown: str) -> None:
        """Write the step's metrics `row` and its times, and save the state if a checkpoint is due. shown: what the
        progress bar displays. Raises RunError if a file cannot be written, and after SIGTERM Preempted, when the state
        is saved."""
        row = {**row, **self._times, "seconds": self.seconds, "checkpoint_seconds": self._save_seconds}
        for log in (self._log, self._loggers):
            log.write({"step": self._step, "stage": self.stage} | row)
        shown |= {name: f"{self._measured[name]:.3f}" for name in SHOWN_HELD_OUT if name in self._measured}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        self._save_seconds, stopping = 0.0, self.preemption.reached()
        measured_best = self._config.best and is_held_out(name := self._config.best.metric) and name in row
        if self.checkpoints.due(self._step + 1) or stopping or self._is_last or measured_best:
            self._save_seconds = self.checkpoints.save(state, cursor, row)
        if stopping:
            raise Preempted

    @contextmanager
    def saved_if_preempted(self, state: TrainState, cursor: Mapping[str, Any]) -> Iterator[None]:
        """For a part of a step that changes neither: after SIGTERM in it, save them as they are and raise `Preempted`.
        The continued run then repeats that part."""
        try:
            yield
            if self.preemption.reached():
                raise Preempted
        except Preempted:
            self.preemption.reached()  # collective: every process must agree before saving
            self.checkpoints.save(state, cursor)
            raise


class _Recorded:
    """Profiles the steps that a config asks for, of a process whose first step is `start`."""

    def __init__(self, config: ProfileConfig | None, directory: Path, name: str, start: int):
        self._directory, self._name, self._open = directory / "profile", name, ExitStack()
        self._first, self._last = (start + config.skip, start + config.skip + config.steps - 1) if config else (-1, -1)

    def __enter__(self) -> _Recorded:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        if number == self._first:
            self._open.enter_context(profiling(self._directory))
        with jax.profiler.StepTraceAnnotation(self._name, step_num=number):
            yield
        if number == self._last:
            self._open.close()


def load_policy(config: RunConfig, *, reads_data: bool) -> Policy:
    """The policy that a run starts from, with float32 weights on the run's mesh. Raises InputError first if the run
    reads its data and there is none, because loading may take minutes."""
    if reads_data and not (config.data and Path(config.data).exists()):
        raise InputError(
            f"data={config.data}: no such file or directory; give a set made by `rmr1 data prepare`, or published rows "
            "in JSONL or Parquet"
        )
    options = {"master_dtype": "float32", "chat_template_kwargs": config.chat_template_kwargs}
    with waiting(f"loading {config.model}"):
        return load(config.model, config.dtype, make_mesh(config.mesh), **options)


@contextmanager
def open_run(config: RunConfig, stage: str) -> Iterator[Run]:
    """A run with the checkpoints that its config asks for, which ends cleanly after SIGTERM. Raises RunError if the run
    does not fit in device memory; it names the settings that change this."""
    policies = {"keep": config.keep, "every": config.save_every, "minutes": config.save_minutes, "best": config.best}
    about = {"config": yaml.safe_load(dump_config(config))}
    with Preemption() as preemption, Checkpointer(Path(config.out), **policies, about=about) as checkpoints:
        preemption.hold = lambda: checkpoints.saving
        run = Run(stage, config, checkpoints, preemption)
        try:
            with run.until_end:
                yield run
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            raise RunError(f"out of device memory ({' '.join(str(e).split())[:200]}). {LESS_MEMORY}") from e
