"""From logits to a token: temperature, top-k, top-p, and the log-probability of what was drawn.

Every setting is an array, never a Python constant, so a change recompiles nothing and always takes effect.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Draw(NamedTuple):
    """token: [...] int32. logp: under the model itself. sampled_logp: under the distribution drawn from, after
    temperature and truncation. Both [...] float32, natural logarithm."""

    token: jax.Array
    logp: jax.Array
    sampled_logp: jax.Array


def draw(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> Draw:
    """Draw one token from each row.

    Temperature first, then top-k, then top-p over what top-k left (the order Transformers uses).

    Args:
        logits: [..., V] float32. keys: [...] one PRNG key a row.
        temperature: scalar; 0 is greedy. top_k: scalar int, 0 is off. top_p: scalar in (0, 1], 1 is off.
    """
    greedy = temperature <= 0.0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    truncating = ((top_p < 1.0) | (top_k > 0)) & ~greedy
    # The sort costs far more than the draw, so it runs only when something is cut.
    kept = jax.lax.cond(truncating, lambda x: truncate(x, top_k, top_p), lambda x: x, scaled)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys.reshape(-1)).reshape(logits.shape)
    token = jnp.argmax(jnp.where(greedy, scaled, kept + noise), axis=-1).astype(jnp.int32)
    logp = _logp(logits, token)
    sampled_logp = jnp.where(greedy, 0.0, _logp(kept, token))
    return Draw(token, logp, sampled_logp)


def truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf for every token outside the top k and outside the smallest set whose probability reaches top_p."""
    V = logits.shape[-1]
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    in_k = jnp.arange(V) < jnp.where(top_k > 0, top_k, V)
    probs = jax.nn.softmax(jnp.where(in_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = in_k & (before < top_p)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def _logp(logits: jax.Array, token: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
