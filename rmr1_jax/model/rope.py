"""Rotary position embedding (RoFormer, arXiv 2104.09864): the frequencies, and the rotation of queries and keys.

`config.py` reads the fields; `qwen.py` calls `rope_table` once a forward pass and `rotate` in every layer."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.config_rope import RopeScaling

Rope = tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]  # cosines and sines of H/2 angles a position, float32


def rope_table(config: QwenConfig, positions: Int[ArrayLike, "B T"]) -> Rope:
    """The cosine and sine of every position's angles, in float32: bfloat16 cannot tell position 4096 from 4097."""
    frequencies, scale = rope_inverse_frequencies(config)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotates queries or keys to their positions; the two halves of a head are the pairs (Hugging Face's layout). The
    arithmetic is in float32, the result in x's dtype."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rope_inverse_frequencies(config: QwenConfig) -> tuple[np.ndarray, float]:
    """Rotary frequencies in radians a position, float32 [H/2], and the factor on cosine and sine.

    Computed in float32 step by step as Transformers does, so that long positions see the same angles. Linear: the
    frequencies divided by the factor. Yarn (Peng et al. 2023, arXiv:2309.00071, section 3.2): fast pairs keep their
    frequency, slow pairs are divided by the factor, with a linear ramp between.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    periods = np.power(np.float32(config.rope_theta), exponents)  # [H/2], tokens per radian
    rope = config.rope_scaling
    if rope is None:
        return np.float32(1) / periods, 1.0
    factor = np.float32(rope.factor)
    if rope.kind == "linear":
        return np.float32(1) / periods / factor, 1.0
    low, high = _yarn_ramp(config, rope)
    ramp = np.clip((np.arange(config.head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp
    frequencies = np.float32(1) / (factor * periods) * (np.float32(1) - keep) + np.float32(1) / periods * keep
    return frequencies.astype(np.float32), rope.attention_factor


def _yarn_ramp(config: QwenConfig, rope: RopeScaling) -> tuple[float, float]:
    """The pair indices between which yarn goes from keeping a frequency to dividing it."""

    def pair_with_turns(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return config.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    return low, high + 0.001 if low == high else high
