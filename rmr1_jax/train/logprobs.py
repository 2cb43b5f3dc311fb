"""Log-probabilities of given tokens, in chunks of positions: [B, T, V] logits never exist.

Both stages train on `row_logprobs`; what they do with it is in `losses.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from rmr1_jax.errors import InputError
from rmr1_jax.model import qwen
from rmr1_jax.model.attention import choose
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.policy import DTYPES

DEFAULT_CHUNK_SIZE = 1024


def forward_options(config: Any, mesh: Mesh) -> dict[str, Any]:
    """What `row_logprobs` hands on to the model, from a run's config."""
    return {
        "dtype": DTYPES[config.dtype],
        "remat": config.remat,
        "attention": choose(config.attention, mesh),
    }


def row_logprobs(
    config: QwenConfig,
    params: qwen.Params,
    batch: Mapping[str, Array],
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    **forward: Any,
) -> TokenLogprobs:
    """`token_logprobs` of packed rows under a policy. batch: tokens, positions, segment_ids, [B, T] int32 each.
    forward: dtype, remat, attention, as `qwen.hidden_states` takes them."""
    hidden = qwen.hidden_states(config, params, batch["tokens"], batch["positions"], batch["segment_ids"], **forward)
    head, letters = qwen.head_weight(config, params)
    options = {"temperature": temperature, "with_entropy": with_entropy, "head_is_embedding": letters == "VD"}
    return token_logprobs(hidden, head, batch["tokens"], **options)


class TokenLogprobs(NamedTuple):
    """`logp` [B, T] float32 in nats; `entropy` [B, T] float32 in nats, or None where it was not asked for."""

    logp: Array
    entropy: Array | None


def token_logprobs(
    hidden: Array,
    head: Array,
    tokens: Array,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    temperature: float | Array = 1.0,
    with_entropy: bool = False,
    head_is_embedding: bool = False,
) -> TokenLogprobs:
    """The log-probability of every token given the ones before it, without ever holding [B, T, V] logits.

    hidden [B, T, D]: the final, normed activations. head [D, V], or the tied embedding [V, D] with
    `head_is_embedding`. tokens [B, T] integer. The matmul reads `hidden.dtype` (a head of another dtype is cast for
    it, and its gradient is summed in the head's own dtype: pass float32 master weights) and yields float32 logits,
    divided by `temperature` (> 0).

    Returns logp and entropy at the token's own place: [b, t] belongs to tokens[b, t] and comes from hidden[b, t - 1].
    Both are 0 at t = 0. At the first token of a later segment of a packed row they are finite but mean nothing (the
    prediction crosses from the segment before): its weight must be 0. The entropy is that of the whole distribution.

    About `chunk_size` positions, counted over all rows of the batch, have logits at a time, in the forward and in the
    backward pass (which computes them again). Chunks run along T with every row in each, so that rows sharded over
    devices stay where they are. A larger chunk means fewer reads of the head and fewer reductions of its gradient.
    """
    if chunk_size < 1:
        raise InputError(f"chunk_size={chunk_size} must be at least 1")
    rows, length, _ = hidden.shape
    step = min(length, max(1, chunk_size // rows))
    count = -(-length // step)
    padding = count * step - length

    def to_chunks(x: Array) -> Array:  # [B, T, ...] -> [count, B, step, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, step, *x.shape[2:]), 1, 0)

    def from_chunks(x: Array) -> Array:  # [count, B, step] at the predicting place -> [B, T] at the token's place
        x = jnp.moveaxis(x, 0, 1).reshape(rows, count * step)[:, : length - 1]
        return jnp.pad(x, [(0, 0), (1, 0)])

    targets = jnp.pad(tokens[:, 1:], [(0, 0), (0, 1)])
    chunk = partial(_chunk_logprobs, with_entropy=with_entropy, head_is_embedding=head_is_embedding)
    chunk = jax.checkpoint(chunk, prevent_cse=False)  # scan itself keeps forward and backward apart

    def body(_: None, xs: tuple[Array, Array]) -> tuple[None, TokenLogprobs]:
        return None, chunk(*xs, head, temperature)

    _, out = lax.scan(body, None, (to_chunks(hidden), to_chunks(targets)))
    return jax.tree.map(from_chunks, out)


def _chunk_logprobs(
    hidden: Array,
    targets: Array,
    head: Array,
    temperature: float | Array,
    *,
    with_entropy: bool,
    head_is_embedding: bool,
) -> TokenLogprobs:
    """hidden [B, C, D], targets [B, C] -> the targets' log-probabilities [B, C] (and entropies), in float32."""
    equation = "bcd,vd->bcv" if head_is_embedding else "bcd,dv->bcv"
    logits = jnp.einsum(equation, hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = logits.astype(jnp.float32) / temperature
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum fuses, and stays local where the vocabulary is sharded; a gather would do neither.
    chosen = lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    logp = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - normalizer
    if not with_entropy:
        return TokenLogprobs(logp, None)
    log_probs = logits - normalizer[..., None]
    return TokenLogprobs(logp, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))
