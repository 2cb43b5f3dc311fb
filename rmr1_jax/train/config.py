"""The settings of a training run: `SftConfig` and `GrpoConfig`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rmr1_jax.config import check_least
from rmr1_jax.distributed.mesh import MeshConfig
from rmr1_jax.errors import InputError
from rmr1_jax.model.attention import Implementation
from rmr1_jax.model.qwen import Remat
from rmr1_jax.policy import DTYPES
from rmr1_jax.prompts.trace import STRUCTURES
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train.losses import AggregationKind, PolicyLossConfig
from rmr1_jax.train.optim import (
    Memory,
    OptimConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestConfig:
    """Which checkpoint is kept beside the newest ones: that with the best value of a metric, at its own step."""

    metric: str = "reward"
    mode: Literal["max", "min"] = "max"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """A GRPO run; the defaults are RM-R1's 7B Instruct recipe. Lengths are in tokens.

    model: the policy to start from and, frozen, the reference. data: a prepared set (`rmr1 data prepare`), or rows with
    `winner` = model_a | model_b. prompts_per_step: P, prompts in a rollout batch; sampling.n: R. mini_batch_prompts:
    prompts an update; there are prompts_per_step / mini_batch_prompts updates a step. row_length, micro_rows: the shape
    of a packed micro-batch. dynamic_sampling: rounds of sampling at most, to fill a batch with groups of mixed rewards
    (DAPO); 1 is off. reward: verdict, or cold_start, which pays for the form as well. structure: what a complete trace
    is, for that and for the metric `valid` (`Prompt.structure`). max_segments: sequences in a packed row at most.
    reference_memory: where the reference's weights lie between their uses. sampling_tensor: the tensor axis of
    sampling, which stays within a process; default the mesh's. sampling.slots and sampling.cache_gib are of all
    processes together. The last five: as in `SftConfig`.
    """

    model: str = ""
    data: str = ""
    out: str
    seed: int = 0
    steps: int | None = None
    prompts_per_step: int = 1024
    mini_batch_prompts: int = 128
    max_prompt_length: int = 4096
    row_length: int = 12288
    micro_rows: int = 8
    sampling: SamplingConfig = SamplingConfig(n=7, max_new_tokens=8192)
    loss: PolicyLossConfig = PolicyLossConfig()
    aggregation: AggregationKind = "sequence"
    normalize_std: bool = True
    dynamic_sampling: int = 1
    max_segments: int = 64
    optimizer: OptimConfig = OptimConfig(lr=1e-6, schedule="constant", warmup_ratio=0.0, b2=0.999, weight_decay=0.01)
    reward: RewardKind = "verdict"
    structure: str = "cor"
    dtype: str = "bfloat16"
    remat: Remat = "full"
    attention: Implementation = "auto"
    reference_memory: Memory = "device"
    mesh: MeshConfig = MeshConfig()
    sampling_tensor: int | None = None
    on_nonfinite: OnNonfinite = "stop"
    save_every: int = 10
    save_minutes: float | None = None
    keep: int = 2
    best: BestConfig | None = None

    def __post_init__(self):
        counts = ("steps", "prompts_per_step", "mini_batch_prompts", "max_prompt_length", "row_length", "micro_rows")
        check_least(self, 1, *counts, "dynamic_sampling", "max_segments", "sampling_tensor", "save_every", "keep")
        check_least(self, 0, "seed")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise InputError(f"save_minutes={self.save_minutes} must be above 0")
        if self.prompts_per_step % self.mini_batch_prompts:
            raise InputError(
                f"prompts_per_step={self.prompts_per_step} must be a multiple of "
                f"mini_batch_prompts={self.mini_batch_prompts}"
            )
        longest = self.max_prompt_length + self.sampling.max_new_tokens
        if longest > self.row_length:
            raise InputError(
                f"row_length={self.row_length} cannot hold a prompt and its response; it must be at least "
                f"max_prompt_length + sampling.max_new_tokens = {longest}"
            )
        for name, known in (("dtype", DTYPES), ("structure", STRUCTURES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")

    @property
    def updates_per_step(self) -> int:
        return self.prompts_per_step // self.mini_batch_prompts


OnNonfinite = Literal["stop", "skip"]

RewardKind = Literal["verdict", "cold_start"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """A distillation run. Lengths are in tokens, batches in packed rows.

    model: a Hugging Face directory or hub id. data: a prepared set (`rmr1 data prepare`), or rows (`context_messages`,
    `winner` = the trace), JSONL or parquet. out: the run directory. micro_rows: rows that are on the device at once; a
    step accumulates rows_per_step / micro_rows of them. on_nonfinite: what becomes of an update whose loss or
    gradient is not finite: the run stops, or it is skipped and counted. save_every, save_minutes: a checkpoint after so
    many steps, and so long after the last one; keep: the newest that stay, and beside them the `best` one by a metric.
    """

    model: str = ""
    data: str = ""
    out: str
    seed: int = 0
    epochs: int = 1
    max_steps: int | None = None
    row_length: int = 12288
    rows_per_step: int = 8
    micro_rows: int = 8
    on_too_long: str = "error"
    optimizer: OptimConfig = OptimConfig()
    dtype: str = "bfloat16"
    remat: Remat = "full"
    attention: Implementation = "auto"
    mesh: MeshConfig = MeshConfig()
    on_nonfinite: OnNonfinite = "stop"
    save_every: int = 100
    save_minutes: float | None = None
    keep: int = 2
    best: BestConfig | None = None

    def __post_init__(self):
        counts = ("epochs", "max_steps", "row_length", "rows_per_step", "micro_rows", "save_every", "keep")
        check_least(self, 1, *counts)
        check_least(self, 0, "seed")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise InputError(f"save_minutes={self.save_minutes} must be above 0")
        if self.rows_per_step % self.micro_rows:
            raise InputError(f"rows_per_step={self.rows_per_step} must be a multiple of micro_rows={self.micro_rows}")
        if self.on_too_long not in ("error", "drop"):
            raise InputError(f"on_too_long={self.on_too_long!r} must be error or drop")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
