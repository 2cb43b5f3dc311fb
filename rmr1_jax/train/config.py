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


def _known_structure(name: str) -> str:
    if name not in STRUCTURES:
        raise InputError(f"structure={name!r} must be one of {', '.join(STRUCTURES)}")
    return name


@config_dataclass
class BestConfig:
    """The checkpoint that is kept beside the newest ones: the one with the best value of a metric at its step."""

    metric: str = "reward"
    mode: Literal["max", "min"] = "max"


@config_dataclass
class ProfileConfig:
    """Which steps a profile in `out/profile` records: `steps` of them, after the first `skip` steps of this process, in
    which programs are compiled."""

    skip: NonNegativeInt = 3
    steps: PositiveInt = 2


@config_dataclass
class RunConfig:
    """The settings that both stages have. Lengths are in tokens.

    model: the policy to start from, a Hugging Face directory or hub id. chat_template_kwargs: arguments of its chat
    template, such as enable_thinking of Qwen3. data: a prepared set (`rmr1 data prepare`), or
    published rows, JSONL or parquet. out: the run directory. row_length, micro_rows: the shape of a packed micro-batch,
    the rows that are on the devices at once. on_nonfinite: what to do if the loss or gradient of an update is not
    finite: stop the run, or skip and count the update. save_every, save_minutes: a checkpoint after so many steps, and
    so many minutes after the last one. keep: how many of the newest are kept; best: one more. profile: some steps to
    record for XProf or TensorBoard.
    """

    model: str = ""
    chat_template_kwargs: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict)
    data: str = ""
    out: str
    seed: NonNegativeInt = 0
    row_length: PositiveInt = 12288
    micro_rows: PositiveInt = 8
    optimizer: OptimConfig = OptimConfig()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Remat = "full"
    attention: Implementation = "auto"
    mesh: MeshConfig = MeshConfig()
    on_nonfinite: Literal["stop", "skip"] = "stop"
    save_every: PositiveInt = 100
    save_minutes: PositiveFloat | None = None
    keep: PositiveInt = 2
    best: BestConfig | None = None
    profile: ProfileConfig | None = None


@config_dataclass
class SftConfig(RunConfig):
    """A distillation run. The winner of its rows is the trace. A step accumulates rows_per_step / micro_rows
    micro-batches of packed rows."""

    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    rows_per_step: PositiveInt = 8
    on_too_long: Literal["error", "drop"] = "error"

    def __post_init__(self):
        if self.rows_per_step % self.micro_rows:
            raise InputError(f"rows_per_step={self.rows_per_step} must be a multiple of micro_rows={self.micro_rows}")


@config_dataclass
class GrpoConfig(RunConfig):
    """A GRPO run; the defaults are RM-R1's recipe for its 7B Instruct model. The model is also, frozen, the reference.
    The winner of the rows is model_a or model_b.

    prompts_per_step: P, prompts in a rollout batch; sampling.n: R, samples of each. generation_config: take the
    temperature, top_p, top_k and min_p of `sampling` from the model's generation_config.json. mini_batch_prompts:
    prompts of an update; a step has prompts_per_step / mini_batch_prompts updates. dynamic_sampling: the most rounds
    of sampling to fill a batch with groups of mixed rewards (DAPO); 1 is off. reward: verdict, or cold_start, which
    also rewards the form. structure: what a complete trace is, for that reward and for the metric `valid`
    (`Prompt.structure`). max_segments: the most sequences in a packed row. reference_memory: where the reference's
    weights are between their uses. sampling_tensor: the tensor axis of sampling, which stays within a process; default
    the mesh's. sampling.slots and sampling.cache_gib count all processes together.
    """

    optimizer: OptimConfig = OptimConfig(lr=1e-6, schedule="constant", warmup_ratio=0.0, b2=0.999, weight_decay=0.01)
    save_every: PositiveInt = 10
    steps: PositiveInt | None = None
    prompts_per_step: PositiveInt = 1024
    mini_batch_prompts: PositiveInt = 128
    max_prompt_length: PositiveInt = 4096
    sampling: SamplingConfig = SamplingConfig(n=7, max_new_tokens=8192)
    generation_config: bool = False
    loss: PolicyLossConfig = PolicyLossConfig()
    aggregation: AggregationKind = "sequence"
    normalize_std: bool = True
    dynamic_sampling: PositiveInt = 1
    max_segments: PositiveInt = 64
    reward: RewardKind = "verdict"
    structure: Annotated[str, AfterValidator(_known_structure)] = "cor"
    reference_memory: Memory = "device"
    sampling_tensor: PositiveInt | None = None

    def __post_init__(self):
        prompts, size = self.prompts_per_step, self.mini_batch_prompts
        if prompts % size:
            raise InputError(f"prompts_per_step={prompts} must be a multiple of mini_batch_prompts={size}")
        longest = self.max_prompt_length + self.sampling.max_new_tokens
        if longest > self.row_length:
            raise InputError(
                f"row_length={self.row_length} cannot hold a prompt and its response; it must be at least "
                f"max_prompt_length + sampling.max_new_tokens = {longest}"
            )

    @property
    def updates_per_step(self) -> int:
        return self.prompts_per_step // self.mini_batch_prompts
