"""The header of a run: what is trained, on which devices, with how much data and for how many steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from rmr1_jax.data.packing import lengths_of
from rmr1_jax.model.qwen import split
from rmr1_jax.policy import Policy
from rmr1_jax.train.config import GrpoConfig, RunConfig, SftConfig


def header(config: RunConfig, policy: Policy, items: Sequence[Any], steps: int) -> str:
    """Three lines that begin a run. items: its examples or prompts. steps: of the whole run."""
    model, devices, lengths = policy.config, policy.mesh.devices, lengths_of(items)
    size = sum(leaf.size for leaf in jax.tree.leaves(split(policy.module)[1]))
    stage, name = ("sft", "examples") if isinstance(config, SftConfig) else ("grpo", "prompts")
    axes = " x ".join(f"{axis} {count}" for axis, count in policy.mesh.shape.items())
    layers = f"{model.num_layers} layer{'s' * (model.num_layers > 1)}"
    lines = [
        f"{model.model_type}, {size:,} parameters, {layers}, products in {config.dtype}; "
        f"{devices.size} x {devices.flat[0].device_kind}, mesh {axes}",
        f"{len(items):,} {name} of {lengths.mean():,.0f} tokens on average; {steps:,} steps of {_step(config)}",
        f"out {config.out}",
    ]
    return "\n".join(f"{stage}: {line}" for line in lines)


def _step(config: RunConfig) -> str:
    rows = f"{config.row_length:,} tokens, {config.micro_rows} at once"
    if isinstance(config, SftConfig):
        return f"{config.rows_per_step} packed rows of {rows}"
    assert isinstance(config, GrpoConfig)
    samples = f"{config.sampling.n} texts of at most {config.sampling.max_new_tokens:,} tokens"
    updates = f"{config.updates_per_step} update{'s' * (config.updates_per_step > 1)}"
    return f"{config.prompts_per_step} prompts with {samples}, and {updates}; packed rows of {rows}"
