"""attend(): grouped-query attention with one signature for training, prefill and decode.

Who may see whom is said by positions and segment ids alone: a query sees a key of its own segment whose position is not
after its own; segment 0 is padding and is seen by nobody. Packed rows, padded rows and a half-filled cache are all
cases of this one rule. The sampler's two forms: `attend_chunk` for prefill, and `attend_slots` for decode, over keys in
two places: a prompt that a group of samples shares, and each sample's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from rmr1_jax.model.splash import splash_attend

# auto: see `choose`. interpret: the splash kernel in Pallas' interpreter, for tests.
Implementation = Literal["auto", "xla", "splash", "interpret"]

# Finite, so that a padding query (which sees nothing) gets a uniform softmax instead of NaN.
MASKED = -1e30

# Queries in a block, and the most blocks of a row (they are unrolled, so compile time grows with their number).
QUERY_BLOCK = 128
MAX_BLOCKS = 16
ATTENTION = "attention"  # the name under which a remat policy finds what attention's backward pass needs


def choose(implementation: Implementation, mesh: Mesh) -> Implementation:
    """`auto` is the splash kernel on TPUs and XLA elsewhere: on a GPU too, as cuDNN's fused attention takes no segment
    ids, and packed rows would leak into each other."""
    if implementation != "auto":
        return implementation
    return "splash" if mesh.devices.flat[0].platform == "tpu" else "xla"


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Causal self-attention within segments. Tokens of a segment must lie in the order of their positions.

    Args:
        q: [B, T, N, H]; k, v: [B, T, K, H], N a multiple of K.
        positions, segment_ids: [B, T] int32; segment 0 is padding, and what it gets means nothing.
        implementation: one that `choose` gave.

    Returns:
        [B, T, N, H] in q's dtype; scores and softmax in float32.
    """
    q = q * q.shape[-1] ** -0.5
    assert implementation != "auto"
    if implementation == "xla":
        return _attend_blocks(q, k, v, positions, segment_ids)
    return splash_attend(q, k, v, segment_ids, interpret=implementation == "interpret")


def _attend_blocks(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """`attend` with q scaled, by XLA: queries in blocks, each against the keys up to its own end, so that the upper
    triangle is never computed and no [T, T] matrix exists."""
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads first and a head's G queries side by side: each product is then one plain matrix product per key-value head,
    # which on CPU is three times as fast as the same einsum over [B, T, K, G, H].
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    out = _flash(q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions, segment_ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """q: [B, K, G, T, H], scaled. k, v: [B, K, T, H]. Returns q's shape. The backward pass computes a block's weights
    again from the scores' logsumexp, so that of T x T numbers none is kept (FlashAttention, arXiv 2205.14135)."""
    return _flash_forward(q, k, v, positions, segment_ids)[0]


def _flash_forward(q, k, v, positions, segment_ids):
    outs, normalizers = [], []
    for block, end in _blocks(q.shape[3]):
        scores = _block_scores(q[:, :, :, block], k[:, :, :end], _mask(positions, segment_ids, block, end))
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        values = _over_keys(weights.astype(v.dtype), v[:, :, :end])
        outs.append((values / total).astype(q.dtype))
        normalizers.append(highest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), ATTENTION)
    normalizer = checkpoint_name(jnp.concatenate(normalizers, axis=3), ATTENTION)
    return out, (q, k, v, positions, segment_ids, out, normalizer)


def _flash_backward(saved, d_out):
    q, k, v, positions, segment_ids, out, normalizer = saved
    # The softmax's gradient is weights x (d_weights - this); Dao's D.
    inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    d_q = []
    # [B, K, H, T], so that a block's part is a product with the weights as they lie.
    d_k = d_v = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]), jnp.float32)
    for block, end in _blocks(q.shape[3]):
        q_block, d_block, inner_block, normalizer_block = (x[:, :, :, block] for x in (q, d_out, inner, normalizer))
        scores = _block_scores(q_block, k[:, :, :end], _mask(positions, segment_ids, block, end))
        weights = jnp.exp(scores - normalizer_block)
        d_scores = (weights * (_by_keys(d_block, v[:, :, :end]) - inner_block)).astype(q.dtype)
        d_v = d_v.at[..., :end].add(_over_queries(d_block, weights.astype(q.dtype)))
        d_k = d_k.at[..., :end].add(_over_queries(q_block, d_scores))
        d_q.append(_over_keys(d_scores, k[:, :, :end]).astype(q.dtype))
    d_k, d_v = d_k.swapaxes(2, 3).astype(k.dtype), d_v.swapaxes(2, 3).astype(v.dtype)
    return jnp.concatenate(d_q, axis=3), d_k, d_v, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def block_size(T: int) -> int:
    """Queries in a block of a row of T."""
    return max(QUERY_BLOCK, -(-T // MAX_BLOCKS))


def _blocks(T: int) -> Iterator[tuple[slice, int]]:
    """The queries of each block, and the end of the keys that they may see."""
    size = block_size(T)
    for start in range(0, T, size):
        end = min(start + size, T)
        yield slice(start, end), end


def _mask(positions: jax.Array, segment_ids: jax.Array, block: slice, end: int) -> jax.Array:
    """[B, t, S] float32, to be added to a block's scores."""
    visible = _visible(positions[:, block], segment_ids[:, block], positions[:, :end], segment_ids[:, :end])
    # Once for all heads: fused into the scores, XLA on CPU would compare again for each of them.
    return jax.lax.optimization_barrier(jnp.where(visible, 0.0, MASKED))


def _block_scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """q: [B, K, G, t, H], k: [B, K, S, H], mask: [B, t, S] -> [B, K, G, t, S] float32."""
    return _by_keys(q, k) + mask[:, None, None]


# The three products of attention. A head's G groups of queries are side by side in each.


def _by_keys(x: jax.Array, keys: jax.Array) -> jax.Array:
    """x: [B, K, G, t, H], keys: [B, K, S, H] -> [B, K, G, t, S] float32."""
    product = jnp.einsum("BKTH,BKSH->BKTS", _side_by_side(x), keys, preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:4], -1)


def _over_keys(weights: jax.Array, x: jax.Array) -> jax.Array:
    """weights: [B, K, G, t, S], x: [B, K, S, H] -> [B, K, G, t, H] float32."""
    product = jnp.einsum("BKTS,BKSH->BKTH", _side_by_side(weights), x, preferred_element_type=jnp.float32)
    return product.reshape(*weights.shape[:4], -1)


def _over_queries(x: jax.Array, weights: jax.Array) -> jax.Array:
    """x: [B, K, G, t, H], weights: [B, K, G, t, S] -> [B, K, H, S] float32."""
    # Turned by itself first: of the two this is the small one, and XLA on CPU would turn neither, at half the speed.
    turned = jax.lax.optimization_barrier(_side_by_side(x).swapaxes(2, 3))
    return jnp.einsum("BKHT,BKTS->BKHS", turned, _side_by_side(weights), preferred_element_type=jnp.float32)


def _side_by_side(x: jax.Array) -> jax.Array:
    """[B, K, G, t, X] -> [B, K, G * t, X]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def attend_chunk(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """A chunk of a prompt against the prompt's keys so far, its own among them.

    Args:
        q: [P, T, N, H]. k: [P, K, H, S], v: [P, K, S, H], column s holds position s. positions: [P, T] int32 of the
            queries.

    Returns:
        [P, T, N, H] in q's dtype; scores and softmax in float32.
    """
    P, T, N, H = q.shape
    K, _, S = k.shape[1:]
    visible = jnp.arange(S) <= positions[:, :, None]
    grouped = (q * H**-0.5).reshape(P, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return _attend_masked(grouped, k.swapaxes(2, 3), v, visible).transpose(0, 3, 1, 2, 4).reshape(P, T, N, H)


class Members(NamedTuple):
    """Which slots hold samples of which prompt. table: [E, R] a prompt's slots (any number where there are fewer);
    entry, rank: [B] where a slot stands in the table. int32."""

    table: jax.Array
    entry: jax.Array
    rank: jax.Array


def attend_slots(
    q: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    prompt_visible: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    own_visible: jax.Array,
    members: Members,
) -> jax.Array:
    """One decode step for B slots, each over its prompt and its own tokens. A prompt's keys are read once for all of
    its slots: their queries are brought to the prompt, not the prompt to them.

    Args:
        q: [B, N, H]. prompt_k: [E, K, H, S], prompt_v: [E, K, S, H]; prompt_visible: [E, S] bool. own_k: [B, K, H, W],
            own_v: [B, K, W, H]; own_visible: [B, W] bool, at least one column a slot. See `cache.py` for the layout.

    Returns:
        [B, N, H] in q's dtype.
    """
    B, N, H = q.shape
    E, K = prompt_k.shape[:2]
    R, G = members.table.shape[1], N // K
    q = (q * H**-0.5).reshape(B, K, G, H)
    asked = q[members.table].transpose(0, 2, 1, 3, 4).reshape(E, K, R * G, H)
    theirs = _partial(asked, prompt_k, prompt_v, prompt_visible)
    theirs = [x.reshape(E, K, R, G, -1)[members.entry, :, members.rank] for x in theirs]
    own = _partial(q, own_k, own_v, own_visible)
    return _merge(theirs, own).reshape(B, N, H).astype(q.dtype)


def _partial(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> list[jax.Array]:
    """Attention over some of the keys, to be merged with the rest: the highest score [B, K, Q, 1], the sum of the
    exponentials [B, K, Q, 1] and the weighted values [B, K, Q, H], all float32.

    q: [B, K, Q, H]. k: [B, K, H, S]. v: [B, K, S, H]. visible: [B, S] bool.
    """
    scores = jnp.einsum("BKQH,BKHS->BKQS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    values = jnp.einsum("BKQS,BKSH->BKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return [highest, jnp.sum(weights, axis=-1, keepdims=True), values]


def _merge(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """The attention over the keys of both parts. A part without a visible key has the highest score MASKED and so no
    weight beside one that has."""
    highest = jnp.maximum(a[0], b[0])
    of_a, of_b = jnp.exp(a[0] - highest), jnp.exp(b[0] - highest)
    return (a[2] * of_a + b[2] * of_b) / (a[1] * of_a + b[1] * of_b)


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
