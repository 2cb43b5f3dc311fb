"""cuDNN's attention for packed rows: where it can run, and its arguments from segment ids.

Used for `attention: cudnn`, and for `auto` on GPUs of the Hopper generation and newer, in bfloat16 and with the head
sizes that it was compared with XLA at. `attention.py` calls it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmr1_jax.jax_private import cudnn_packed_attention

HEAD_DIMS = (64, 128)  # those of Qwen2.5 and Qwen3


def obstacle(device: Any, dtype: Any, head_dim: int) -> str | None:
    """Return why cuDNN's attention cannot run on a device of JAX, as the end of a sentence; None if it can."""
    if device.platform not in ("gpu", "cuda"):
        return f"it runs on NVIDIA GPUs, and this device is a {device.platform.upper()}"
    if "cuda" not in device.client.platform_version.lower():
        return f"it runs on NVIDIA GPUs, and this device is a {device.device_kind}"
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    if capability < (9, 0):
        name = f"{device.device_kind}, compute capability {device.compute_capability}"
        return f"packed rows need the Hopper generation or newer (compute capability 9.0), and this device is {name}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, and dtype is {jnp.dtype(dtype).name}"
    if head_dim not in HEAD_DIMS:
        return f"it takes heads of {' or '.join(map(str, HEAD_DIMS))} numbers, and this model's have {head_dim}"
    return None


class Cudnn(NamedTuple):
    """cuDNN's attention, for rows of at most `max_segments` segments."""

    max_segments: int


def most_segments(T: int, mean_length: float) -> int:
    """Return the most segments that a row of T positions may have, if a segment has `mean_length` tokens in the mean:
    twice as many as fit. cuDNN's time and memory grow with this number, whatever the row holds: in a step of SFT of a
    0.5B, in rows of 4,096, it took 37 ms of 168 with 64 segments and 25 of 161 with 8, on an H200."""
    return min(T, max(8, math.ceil(2 * T / mean_length)))


def cudnn_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[ArrayLike, "B T"],
    max_segments: int,
) -> Float[Array, "B T N H"]:
    """Causal self-attention within segments, q scaled. A segment is a run of one id other than 0.

    The result is 0 at padding, and NaN in a row of more than `max_segments` segments: never a wrong number.
    """
    lengths, offsets, fits = segment_spans(segment_ids, max(2, max_segments))
    real = (jnp.asarray(segment_ids) != 0)[:, :, None, None]
    group = q.shape[2] // k.shape[2]
    # Padding gets no result and no gradient from cuDNN: whatever is in that memory must reach neither.
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    out = jnp.where(real, cudnn_packed_attention(q, k, v, lengths, offsets), 0)
    return jnp.where(fits[:, None, None, None], out, jnp.nan)


def segment_spans(segment_ids: Int[ArrayLike, "B T"], most: int) -> tuple[Int[Array, "B M"], Int[Array, "B M1"], Array]:
    """Return the length of each segment, the position at which each begins (one more column), both -1 where a row has
    fewer than `most` segments, and whether the row has at most so many, [B] bool."""
    segment_ids = jnp.asarray(segment_ids)
    before = jnp.pad(segment_ids[:, :-1], [(0, 0), (1, 0)])
    begins = (segment_ids != before) & (segment_ids != 0)
    number = jnp.cumsum(begins, axis=1)  # from 1; of padding that of the segment before it
    # Compared with every possible number and summed: one fused pass, where a sort or a scatter would be several.
    at = number[:, :, None] == jnp.arange(1, most + 1)
    lengths = jnp.sum(at & (segment_ids != 0)[:, :, None], axis=1, dtype=jnp.int32)
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[:, None]
    offsets = jnp.sum(jnp.where(at & begins[:, :, None], places, 0), axis=1, dtype=jnp.int32)
    lengths, offsets = jnp.where(lengths > 0, lengths, -1), jnp.where(lengths > 0, offsets, -1)
    return lengths, jnp.pad(offsets, [(0, 0), (0, 1)], constant_values=-1), number[:, -1] <= most
