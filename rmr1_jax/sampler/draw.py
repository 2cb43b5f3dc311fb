"""Draws tokens from logits: temperature, top-k, top-p, min-p, and the log-probability of what was drawn.

Every setting is an array, never a Python constant, so a change recompiles nothing and always takes effect.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

CHUNK = 128


class Draw(NamedTuple):
    """Tokens and their log-probabilities (natural logarithm): `logp` under the model itself, `sampled_logp` under the
    distribution drawn from, after temperature and truncation."""

    token: Int[Array, "..."]
    logp: Float[Array, "..."]
    sampled_logp: Float[Array, "..."]


@jax.named_scope("draw")
def draw(
    logits: Float[Array, "... V"],
    keys: Key[Array, "..."],
    temperature: ArrayLike,
    top_k: ArrayLike,
    top_p: ArrayLike,
    min_p: ArrayLike,
) -> Draw:
    """Draws one token from each row.

    Temperature first, then top-k, then top-p over what top-k left, then min-p (the order Transformers uses).

    Args:
        logits: float32. keys: one a row.
        temperature: a scalar; 0 is greedy. top_k: an integer scalar, 0 is off. top_p: a scalar in (0, 1], 1 is off.
        min_p: a scalar in [0, 1), 0 is off.
    """
    greedy = temperature <= 0.0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    truncating = ((top_p < 1.0) | (top_k > 0) | (min_p > 0.0)) & ~greedy
    kept = jax.lax.cond(truncating, lambda x: truncate(x, top_k, top_p, min_p), lambda x: x, scaled)
    highest = jnp.max(kept, axis=-1, keepdims=True)
    weights = jnp.exp(kept - highest)
    drawn, total = _invert(weights, jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys.reshape(-1)))
    token = jax.lax.cond(greedy, lambda x, d: jnp.argmax(x, axis=-1), lambda x, d: d, logits, drawn).astype(jnp.int32)
    sampled = _at(kept, token) - highest[..., 0] - jnp.log(total)
    # At temperature 1 and without truncation both distributions are the same, and one pass over V is saved.
    same = ~truncating & (temperature == 1.0)
    logp = jax.lax.cond(
        same, lambda x, s: s, lambda x, s: _at(x, token) - jax.nn.logsumexp(x, axis=-1), logits, sampled
    )
    return Draw(token, logp, jnp.where(greedy, 0.0, sampled))


def _invert(weights: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices drawn in proportion to `weights` [..., V], by inverting the cumulative sum in two levels: first a chunk,
    then a token in it, each with a uniform number of its own (`uniforms`: [rows, 2]). Two numbers a row instead of V,
    as Gumbel noise takes. Also returns the sums, [...]."""
    V = weights.shape[-1]
    size = min(CHUNK, V)
    padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -V % size)])
    chunks = padded.reshape(-1, padded.shape[-1] // size, size)
    which, total = _first_above(chunks.sum(-1), uniforms[:, 0])
    inside, _ = _first_above(jnp.take_along_axis(chunks, which[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    lead = weights.shape[:-1]
    return (which * size + inside).reshape(lead), total.reshape(lead)


def _first_above(weights: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each row of [B, M] the first place where the running sum exceeds uniform x total, and the total, [B]."""
    # A long running sum may rise, by rounding, at a place of weight zero: such a place must never be the first above.
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    total = jnp.max(running, axis=-1)
    # Rounding must not carry the target up to the total: a place of weight zero could be drawn then.
    target = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.float32(0)))
    return jnp.argmax(running > target[:, None], axis=-1), total


def truncate(
    logits: Float[Array, "... V"], top_k: ArrayLike, top_p: ArrayLike, min_p: ArrayLike
) -> Float[Array, "... V"]:
    """Sets to -inf every token outside the top k, outside the smallest set whose probability reaches top_p, and with
    less than min_p times the probability of the most probable token."""
    # The sort costs far more than the draw, and min-p needs none.
    sorting = (top_p < 1.0) | (top_k > 0)
    kept = jax.lax.cond(sorting, lambda x: _top_k_top_p(x, top_k, top_p), lambda x: x, logits)
    return jnp.where(kept >= jnp.max(kept, axis=-1, keepdims=True) + jnp.log(min_p), kept, -jnp.inf)


def _top_k_top_p(logits: jax.Array, top_k: ArrayLike, top_p: ArrayLike) -> jax.Array:
    V = logits.shape[-1]
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    in_k = jnp.arange(V) < jnp.where(top_k > 0, top_k, V)
    probs = jax.nn.softmax(jnp.where(in_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = in_k & (before < top_p)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def _at(x: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0]
