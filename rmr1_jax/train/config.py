"""The settings of a training run, those of both stages and of each, checked by their types. Next: `run.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt

from rmr1_jax.config import config_dataclass
from rmr1_jax.distributed.mesh import MeshConfig
from rmr1_jax.errors import InputError
from rmr1_jax.model.attention import Implementation
from rmr1_jax.model.qwen import Remat
from rmr1_jax.prompts.trace import STRUCTURES
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train.losses import AggregationKind, PolicyLossConfig
from rmr1_jax.train.optim import Memory, OptimConfig

RewardKind = Literal["verdict", "cold_start"]
LoggerKind = Literal["tensorboard", "wandb"]


def _known_structure(name: str) -> str:
    if name not in STRUCTURES:
        raise InputError(f"structure={name!r} must be one of {', '.join(STRUCTURES)}")
    return name


@config_dataclass
class BestConfig:
    """The checkpoint that is kept beside the newest ones."""

    metric: str = "reward"
    """Metric of metrics.jsonl by whose value at its step the checkpoint is chosen. One of the held-out data (eval_...)
    is decided among the steps at which it was measured, and each of these is saved."""
    mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value is the best."""


@config_dataclass
class ProfileConfig:
    """The steps that a profile in `out/profile` records."""

    skip: NonNegativeInt = 3
    """Number of this process's first steps, in which programs are compiled, that are left out."""
    steps: PositiveInt = 2
    """Number of steps to record."""


@config_dataclass
class RunConfig:
    """The settings that both stages have. Lengths are in tokens."""

    model: str = ""
    """The policy to start from: a Hugging Face directory or hub id."""
    chat_template_kwargs: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict)
    """Arguments of the model's chat template, such as {enable_thinking: false} for Qwen3."""
    data: str = ""
    """Training rows: a set made by `rmr1 data prepare`, or published rows (context_messages, winner) in JSONL or
    Parquet."""
    out: str
    """Directory of the run: checkpoints, metrics.jsonl and, at the end, the model."""
    seed: NonNegativeInt = 0
    """Seed of the order of the rows and of the sampling."""
    row_length: PositiveInt = 12288
    """Length of a packed row."""
    short_row_length: PositiveInt | None = None
    """Length of the rows for what fits into them, a divisor of row_length; the rest goes into rows of row_length. All
    rows of a micro-batch have one length. null, or row_length and more: every row has row_length."""
    micro_rows: PositiveInt = 8
    """Number of packed rows that are on the devices at once; a multiple of mesh.replica x mesh.fsdp."""
    optimizer: OptimConfig = OptimConfig()
    """Settings of the optimizer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the matrix products."""
    remat: Remat = "full"
    """What the backward pass computes again to save memory: nothing, all but matrix products, everything, or
    everything, with the layers' inputs in host memory."""
    attention: Implementation = "auto"
    """Implementation of attention. auto takes the fastest one for the devices and lengths."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If the loss or the gradient of an update is not finite: stop the run, or skip and count the update."""
    save_every: PositiveInt = 100
    """Steps from one checkpoint to the next."""
    save_minutes: PositiveFloat | None = None
    """Also save a checkpoint when this many minutes have passed since the last one."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    best: BestConfig | None = None
    """One more checkpoint to keep: the one with the best value of a metric."""
    profile: ProfileConfig | None = None
    """Steps to record for XProf or TensorBoard."""
    eval_data: str = ""
    """Held-out rows, as those of `data`, on which the policy is measured while it is trained. They change no number of
    the training."""
    eval_every: PositiveInt = 100
    """Steps from one measurement on eval_data to the next; one more is made after the last step."""
    logger: tuple[LoggerKind, ...] = ()
    """Where the metrics are shown besides metrics.jsonl: tensorboard (event files in out/tensorboard), wandb (Weights &
    Biases). Each requires the extra of its name: pip install 'rmr1-jax[tensorboard]'."""

    def __post_init__(self):
        if self.short_rows and self.row_length % self.short_rows:
            below = next(n for n in range(self.short_rows, 0, -1) if self.row_length % n == 0)
            raise InputError(
                f"short_row_length={self.short_rows} must divide row_length={self.row_length}; {below} does, and null "
                "turns it off"
            )

    @property
    def short_rows(self) -> int | None:
        """The length of short rows; None where there are none."""
        short = self.short_row_length
        return short if short and short < self.row_length else None


@config_dataclass
class SftConfig(RunConfig):
    """A distillation run. The winner of its rows is the trace."""

    epochs: PositiveInt = 1
    """Number of passes over the data."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps."""
    rows_per_step: PositiveInt = 8
    """Packed rows of a step, which accumulates rows_per_step / micro_rows micro-batches."""
    on_too_long: Literal["error", "drop"] = "error"
    """If an example is longer than row_length: an error, or drop it."""

    def __post_init__(self):
        super().__post_init__()
        if self.rows_per_step % self.micro_rows:
            raise InputError(f"rows_per_step={self.rows_per_step} must be a multiple of micro_rows={self.micro_rows}")


@config_dataclass
class GrpoConfig(RunConfig):
    """A GRPO run; the defaults are RM-R1's recipe for its 7B Instruct model. The model is also, frozen, the reference.
    The winner of the rows is model_a or model_b."""

    optimizer: OptimConfig = OptimConfig(lr=1e-6, schedule="constant", warmup_ratio=0.0, b2=0.999, weight_decay=0.01)
    """Settings of the optimizer."""
    save_every: PositiveInt = 10
    """Steps from one checkpoint to the next."""
    eval_every: PositiveInt = 10
    """Steps from one measurement on eval_data to the next; one more is made after the last step."""
    log_rollouts: NonNegativeInt = 4
    """Number of texts of each step that are written to rollouts.jsonl, with their rewards and verdicts."""
    show_rollout_every: NonNegativeInt = 10
    """Steps from one text of rollouts.jsonl that is printed to the next. 0 prints none."""
    steps: PositiveInt | None = None
    """Number of steps. null: one pass over the prompts."""
    prompts_per_step: PositiveInt = 1024
    """Prompts in a rollout batch (P)."""
    mini_batch_prompts: PositiveInt = 128
    """Prompts of an update; a step has prompts_per_step / mini_batch_prompts updates."""
    max_prompt_length: PositiveInt = 4096
    """Longer prompts are dropped, and their number is printed."""
    sampling: SamplingConfig = SamplingConfig(n=7, max_new_tokens=8192)
    """Sampling of the rollouts. Its slots and cache_gib count all processes together."""
    generation_config: bool = False
    """Take temperature, top_p, top_k and min_p of `sampling` from the model's generation_config.json."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """Settings of the policy loss."""
    old_logp: Literal["trainer", "sampler"] = "trainer"
    """Source of the log-probabilities before the first update of a rollout batch: the trainer, which computes those of
    all updates but the first in one more forward pass; or the sampler, which recorded them. Its numbers differ by
    rounding, which loss.importance_cap must bound."""
    aggregation: AggregationKind = "sequence"
    """How tokens are averaged: over sequences (the paper), over a micro-batch (its released trainer), over all tokens
    (DAPO), or by a constant (Dr.GRPO)."""
    normalize_std: bool = True
    """Divide the advantages of a group by the standard deviation of its rewards."""
    dynamic_sampling: PositiveInt = 1
    """Most rounds of sampling to fill a batch with groups of mixed rewards (DAPO). 1 turns it off."""
    max_segments: PositiveInt = 64
    """Most responses in a packed row."""
    share_prompts: bool = True
    """Compute the prompt of a group once a row for all its responses there. The losses are those of separate
    prompts to the last bits, except with aggregation micro_batch, which depends on what is in a row."""
    reward: RewardKind = "verdict"
    """verdict, or cold_start, which also rewards the form."""
    structure: Annotated[str, AfterValidator(_known_structure)] = "cor"
    """Parts of a complete trace, for the reward cold_start and the metric `valid`: cor, rubric, compare or verdict, as
    the prompt of the rows asks for."""
    reference_memory: Memory = "device"
    """Memory of the reference's weights between their uses."""
    sampling_tensor: PositiveInt | None = None
    """Devices that share one copy of the weights while sampling, all in one process. null: mesh.tensor."""

    def __post_init__(self):
        super().__post_init__()
        prompts, size = self.prompts_per_step, self.mini_batch_prompts
        if prompts % size:
            raise InputError(f"prompts_per_step={prompts} must be a multiple of mini_batch_prompts={size}")
        if self.old_logp == "sampler" and self.loss.importance_cap is None:
            raise InputError(
                "old_logp=sampler needs loss.importance_cap: the sampler's log-probabilities are not the trainer's; "
                "set it (2.0 is usual), or set old_logp: trainer"
            )
        longest = self.max_prompt_length + self.sampling.max_new_tokens
        if longest > self.row_length:
            raise InputError(
                f"row_length={self.row_length} cannot hold a prompt and its response; it must be at least "
                f"max_prompt_length + sampling.max_new_tokens = {longest}"
            )

    @property
    def updates_per_step(self) -> int:
        return self.prompts_per_step // self.mini_batch_prompts
