"""A small model and small runs of it, for the tests of `rmr1 plan`."""

import dataclasses
import functools

from rmr1_jax.plan.model import model_shape
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train.config import GrpoConfig, SftConfig

MODEL = dataclasses.replace(
    model_shape("Qwen/Qwen2.5-7B-Instruct"),
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)

small_sft = functools.partial(SftConfig, out="o", row_length=128, rows_per_step=16, micro_rows=8, dtype="float32")
small_grpo = functools.partial(
    GrpoConfig,
    out="o",
    row_length=160,
    micro_rows=4,
    max_prompt_length=32,
    prompts_per_step=16,
    mini_batch_prompts=8,
    sampling=SamplingConfig(n=4, max_new_tokens=128),
    dtype="float32",
)
