"""attend(): grouped-query attention with one signature for training, prefill and decode.

Who may see whom is said by positions and segment ids alone: a query sees a key of its own segment whose position is not
after its own; segment 0 is padding and is seen by nobody. Packed rows, padded rows and a half-filled cache are all
cases of this one rule. `attend_two` is the same over keys that lie in two places: a prompt that a group of samples
shares, and each sample's own tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that a padding query (which sees nothing) gets a uniform softmax instead of NaN.
MASKED = -1e30

# Queries in a block, and the most blocks of a row (they are unrolled, so compile time grows with their number).
QUERY_BLOCK = 64
MAX_BLOCKS = 16


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal self-attention within segments.

    Queries are taken in blocks, each against the keys up to its own end, so the upper triangle is never computed and
    no [T, T] matrix exists for the whole row. Tokens of a segment must lie in the order of their positions.

    Args:
        q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K.
        positions, segment_ids: [B, T] int32; segment 0 is padding.

    Returns:
        [B, T, N, H] in q's dtype; scores and softmax in float32.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads first and a head's G queries side by side: each product is then one plain matrix product per key-value head,
    # which on CPU is three times as fast as the same einsum over [B, T, K, G, H].
    q = (q * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    size = max(QUERY_BLOCK, -(-T // MAX_BLOCKS))
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        visible = _visible(positions[:, start:end], segment_ids[:, start:end], positions[:, :end], segment_ids[:, :end])
        blocks.append(_attend_masked(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], visible))
    out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_two(
    q: jax.Array,
    shared_k: jax.Array,
    shared_v: jax.Array,
    shared_visible: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    own_visible: jax.Array,
) -> jax.Array:
    """One decode step for P prompts with R samples each; the prompt's keys are read once for its R samples.

    Args:
        q: [P, R, N, H]. shared_k, shared_v: [P, K, S, H]; shared_visible: [P, S] bool.
        own_k, own_v: [P, R, K, C, H]; own_visible: [C] bool (samples advance in step). See `cache.py` for the layout.

    Returns:
        [P, R, N, H] in q's dtype.
    """
    P, R, N, H = q.shape
    K, S = shared_k.shape[1:3]
    q = q.reshape(P, R, K, N // K, H) * (H**-0.5)
    f32 = {"preferred_element_type": jnp.float32}
    shared = jnp.einsum("PRKGH,PKSH->PRKGS", q, shared_k, **f32)
    own = jnp.einsum("PRKGH,PRKCH->PRKGC", q, own_k, **f32)
    shared = jnp.where(shared_visible[:, None, None, None, :], shared, MASKED)
    own = jnp.where(own_visible, own, MASKED)
    probs = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1), axis=-1).astype(q.dtype)
    out = jnp.einsum("PRKGS,PKSH->PRKGH", probs[..., :S], shared_v)
    out += jnp.einsum("PRKGC,PRKCH->PRKGH", probs[..., S:], own_v)
    return out.reshape(P, R, N, H)


def _visible(q_pos: jax.Array, q_seg: jax.Array, k_pos: jax.Array, k_seg: jax.Array) -> jax.Array:
    """[B, T, S] bool."""
    same = q_seg[:, :, None] == k_seg[:, None, :]
    return same & (k_pos[:, None, :] <= q_pos[:, :, None]) & (k_seg[:, None, :] != 0)


def _attend_masked(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """q: [B, K, G, T, H]; k, v: [B, K, S, H]; visible: [B, T, S] -> [B, K, G, T, H]."""
    B, K, G, T, H = q.shape
    scores = jnp.einsum("BKTH,BKSH->BKTS", q.reshape(B, K, G * T, H), k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores.reshape(B, K, G, T, -1), MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(B, K, G * T, -1)
    return jnp.einsum("BKTS,BKSH->BKTH", probs, v).reshape(q.shape)
