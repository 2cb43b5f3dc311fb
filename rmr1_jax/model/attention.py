"""attend(): grouped-query attention with segment ids, for whole rows.

Positions and segment ids alone decide which keys a query sees: those of its own segment whose position is not after
its own; segment 0 is padding, and no query sees it. Packed rows and padded rows are both cases of this one rule. On
TPUs a Pallas kernel computes it (`packed_kernel.py`), on new GPUs cuDNN (`cudnn.py`), elsewhere XLA in blocks; none of
them holds more than a block of scores.
`sampler/cache.py` has the forms of prefill and decode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmr1_jax.distributed.mesh import activation_sharding
from rmr1_jax.errors import InputError
from rmr1_jax.jax_private import CUDNN_FORWARD
from rmr1_jax.model import cudnn
from rmr1_jax.model.packed_kernel import packed_attention
from rmr1_jax.model.unfold import UNFOLDED_ROWS, attend_unfolded

# auto: see `choose`. interpret: the Pallas kernel in Pallas' interpreter, for tests.
Implementation = Literal["auto", "xla", "pallas", "cudnn", "interpret"]

# What `choose` returns, and the functions below take.
Resolved = Literal["xla", "pallas", "interpret"] | cudnn.Cudnn

# Finite, so that a padding query (which sees nothing) gets a uniform softmax instead of NaN.
MASKED = -1e30

# An elementwise function of scores, applied before the mask.
Transform = Callable[[jax.Array], jax.Array]

# positions, segment_ids and parents, which say where a query may look.
Where = tuple[ArrayLike, ArrayLike, ArrayLike | None]

# Queries in a block, and the most blocks of a row (they are unrolled, so compile time grows with their number).
QUERY_BLOCK = 128
MAX_BLOCKS = 16
ATTENTION = "attention"  # the name of what attention's backward pass needs, for `keep_attention`


def choose(
    implementation: Implementation, device: Any, *, dtype: Any, head_dim: int, max_segments: int = 64
) -> Resolved:
    """Resolves `auto`: the Pallas kernel on TPUs; cuDNN on GPUs where it can run; else XLA.

    Args:
        device: one of the mesh. dtype: that of the matrix products. head_dim: H. max_segments: the most segments of a
            row, for cuDNN alone.

    Raises:
        InputError: `cudnn` is asked for and cannot run.
    """
    obstacle = cudnn.obstacle(device, dtype, head_dim)
    if implementation == "cudnn" and obstacle:
        raise InputError(f"attention=cudnn: {obstacle}; set attention: auto")
    if implementation == "cudnn" or (implementation == "auto" and not obstacle):
        return cudnn.Cudnn(max_segments)
    if implementation != "auto":
        return implementation
    return "pallas" if device.platform == "tpu" else "xla"


def keep_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """A remat policy that keeps what attention's backward pass needs, so that attention is not computed again."""
    named = jax.checkpoint_policies.save_only_these_names(ATTENTION)(primitive, **params)
    return bool(named) or primitive.name == CUDNN_FORWARD


def unfolded_limit(attention: Resolved) -> int | None:
    """Returns how many times its length a row may unfold to (`unfold.py`); None: any number, where none unfolds."""
    return UNFOLDED_ROWS if isinstance(attention, cudnn.Cudnn) else None


def segment_limit(attention: Resolved) -> int | None:
    """Returns the most segments that a row may have; None: any number."""
    return attention.max_segments if isinstance(attention, cudnn.Cudnn) else None


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[ArrayLike, "B T"],
    segment_ids: Int[ArrayLike, "B T"],
    implementation: Resolved = "xla",
    transform_scores: Transform | None = None,
    parents: Int[ArrayLike, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal self-attention within segments. The tokens of a segment must lie in the order of their positions.

    parents: the segment that a token sees beside its own (0: none), with earlier positions and without a parent itself;
    all segments with one parent follow it directly, and ids rise along a row. None: tokens see their own segment alone.

    N is a multiple of K. The result has q's dtype, scores and softmax are float32; that of padding means nothing.
    implementation: one that `choose` returned. transform_scores: see `qwen.Attention`.

    Raises:
        InputError: the implementation cannot transform scores, or takes no rows of this length.
    """
    q = q * q.shape[-1] ** -0.5
    if implementation == "xla":
        return _attend_blocks(q, k, v, (positions, segment_ids, parents), transform_scores)
    if transform_scores:
        name, kernel = (implementation, "the Pallas kernel") if isinstance(implementation, str) else ("cudnn", "cuDNN")
        raise InputError(
            f"attention={name}: {kernel} cannot transform scores, as this model's attention does; set attention=xla"
        )
    ids = (segment_ids,) if parents is None else (segment_ids, parents)
    if isinstance(implementation, cudnn.Cudnn):
        local = functools.partial(cudnn.cudnn_attend, max_segments=implementation.max_segments)
        local = local if parents is None else functools.partial(attend_unfolded, local)
        return checkpoint_name(_on_shards(local, q, k, v, *ids), ATTENTION)
    kernel = functools.partial(packed_attention, name=ATTENTION, interpret=implementation == "interpret")
    return _on_shards(kernel, q, k, v, *ids)


def _attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Where,
    transform_scores: Transform | None,
) -> jax.Array:
    """`attend` with q scaled, by XLA: queries in blocks, each against the keys up to its own end, so that the upper
    triangle is never computed and no [T, T] matrix exists."""
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads first and a head's G queries side by side: each product is then one plain matrix product per key-value head,
    # which on CPU is three times as fast as the same einsum over [B, T, K, G, H].
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    out = _flash(transform_scores, q, k.swapaxes(1, 2), v.swapaxes(1, 2), where)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    transform: Transform | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: Where,
) -> jax.Array:
    """q: [B, K, G, T, H], scaled. k, v: [B, K, T, H]. Returns q's shape. The backward pass computes a block's weights
    again from the scores' logsumexp, so that of T x T numbers none is kept (FlashAttention, arXiv 2205.14135)."""
    return _flash_forward(transform, q, k, v, where)[0]


def _flash_forward(transform, q, k, v, where):
    outs, normalizers = [], []
    for block, end in _blocks(q.shape[3]):
        scores, _ = _block_scores(transform, q[:, :, :, block], k[:, :, :end])
        scores += _mask(where, block, end)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        values = _over_keys(weights.astype(v.dtype), v[:, :, :end])
        outs.append((values / total).astype(q.dtype))
        normalizers.append(highest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), ATTENTION)
    normalizer = checkpoint_name(jnp.concatenate(normalizers, axis=3), ATTENTION)
    return out, (q, k, v, where, out, normalizer)


def _flash_backward(transform, saved, d_out):
    q, k, v, where, out, normalizer = saved
    # The softmax's gradient is weights x (d_weights - this); Dao's D.
    inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    d_q = []
    # [B, K, H, T], so that a block's part is a product with the weights as they lie.
    d_k = d_v = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]), jnp.float32)
    for block, end in _blocks(q.shape[3]):
        q_block, d_block, inner_block, normalizer_block = (x[:, :, :, block] for x in (q, d_out, inner, normalizer))
        scores, pull_back = _block_scores(transform, q_block, k[:, :, :end])
        scores += _mask(where, block, end)
        weights = jnp.exp(scores - normalizer_block)
        d_scores = pull_back(weights * (_by_keys(d_block, v[:, :, :end]) - inner_block)).astype(q.dtype)
        d_v = d_v.at[..., :end].add(_over_queries(d_block, weights.astype(q.dtype)))
        d_k = d_k.at[..., :end].add(_over_queries(q_block, d_scores))
        d_q.append(_over_keys(d_scores, k[:, :, :end]).astype(q.dtype))
    d_k, d_v = d_k.swapaxes(2, 3).astype(k.dtype), d_v.swapaxes(2, 3).astype(v.dtype)
    return jnp.concatenate(d_q, axis=3), d_k, d_v, None


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


def _mask(where: Where, block: slice, end: int) -> jax.Array:
    """[B, 1, 1, t, S] float32, to be added to a block's scores."""
    visible = _visible(*(None if x is None else x[:, block] for x in where), *(x[:, :end] for x in where[:2]))
    # Once for all heads: fused into the scores, XLA on CPU would compare again for each of them.
    return jax.lax.optimization_barrier(jnp.where(visible, 0.0, MASKED))[:, None, None]


def _block_scores(transform: Transform | None, q: jax.Array, k: jax.Array) -> tuple[jax.Array, Transform]:
    """q: [B, K, G, t, H], k: [B, K, S, H] -> the scores [B, K, G, t, S] float32, and the function from the gradient of
    these to that of the products."""
    scores = _by_keys(q, k)
    if transform is None:
        return scores, lambda d_scores: d_scores
    scores, pull_back = jax.vjp(transform, scores)
    return scores, lambda d_scores: pull_back(d_scores)[0]


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


def _visible(
    q_pos: ArrayLike, q_seg: ArrayLike, q_parent: ArrayLike | None, k_pos: ArrayLike, k_seg: ArrayLike
) -> ArrayLike:
    """[B, T, S] bool."""
    same = q_seg[:, :, None] == k_seg[:, None, :]
    if q_parent is not None:
        same |= q_parent[:, :, None] == k_seg[:, None, :]
    return same & (k_pos[:, None, :] <= q_pos[:, :, None]) & (k_seg[:, None, :] != 0)


def _on_shards(local: Callable, q: jax.Array, k: jax.Array, v: jax.Array, *ids: ArrayLike) -> jax.Array:
    """Runs a kernel, which is a black box to the compiler, on the rows and heads of each device of the mesh in context.
    Heads are split as the keys' divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, *ids)
    heads = activation_sharding(mesh, "BTKH", k.shape).spec
    rows = (PartitionSpec(heads[0]),) * len(ids)
    mapped = jax.shard_map(local, in_specs=(heads, heads, heads, *rows), out_specs=heads, check_vma=False)
    return mapped(q, k, v, *ids)
