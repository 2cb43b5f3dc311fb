"""Attention for packed rows on TPUs: a Pallas kernel that skips blocks whose segments do not see each other.

A key is visible to a query if it does not lie after it, and has the query's segment or that segment's parent. A program
of the grid takes one block of queries of all G heads that share a key-value head. The keys and values of the whole row
lie in VMEM (3 MiB each for 12,288 tokens), so that each is fetched once, and a loop goes over the blocks that the
queries need, by the ranges of `packed_blocks.py`: a skipped block costs neither a step of the grid nor a fetch. A step
of the loop takes two blocks of keys, adjacent or not: products with 128 keys leave the matrix units half idle.
The backward pass is one kernel of the same form, which holds the gradients of the row's keys and values in VMEM until
the last block of queries. Its scores have the keys first, so that the largest operands of its five products are taken
as they lie. (FlashAttention, arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmr1_jax.errors import InputError
from rmr1_jax.model.packed_blocks import KEYS, TOGETHER, key_ranges, query_block, seen_segments

MASKED = -1e30  # a score that is not visible; finite, so that differences of two are
LANES = 128  # the last axis of a TPU's vector registers

# The VMEM that a kernel may take (a v5p has 64 MiB; the compiler's default is less than a row needs), and what of it is
# for the keys, the values and their gradients of a row.
VMEM_BYTES = 56 * 2**20
ROW_BYTES = 44 * 2**20


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[ArrayLike, "B T"],
    parents: Int[ArrayLike, "B T"] | None = None,
    *,
    name: str = "attention",
    queries: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attends causally, by index, within segments and from a segment to its parent.

    Args:
        q: scaled. N is a multiple of K. segment_ids: 0 is padding. parents: the segment that each position sees beside
            its own, 0 for none. name: under which `jax.checkpoint` finds what the backward pass needs. queries: of
            a block; `query_block` by default. interpret: run in Pallas' interpreter, for tests.

    Returns:
        The attended values in q's dtype, computed in float32; 0 at padding.

    Raises:
        InputError: T is not a multiple of 128, or a row does not fit in VMEM.
    """
    queries = queries or query_block(q.shape[1])
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    seen = seen_segments(segment_ids, parents)
    ranges = key_ranges(seen, segment_ids, queries).reshape(-1)
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    out = _attention((name, queries, interpret), *heads_first, ranges, seen, segment_ids[:, None])
    return out.swapaxes(1, 2)


Static = tuple[str, int, bool]  # name, queries, interpret


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, *where: jax.Array) -> jax.Array:
    """q: [B, N, T, H]. k, v: [B, K, T, H]. where: ranges [B * I * 4], `seen` [B, 1 or 2, T] and segments [B, 1, T]; see
    `packed_blocks.py`."""
    return _forward(static, q, k, v, *where)[0]


def _forward(static, q, k, v, *where):
    name = static[0]
    out, normalizer = _run(static, _forward_kernel, where, (q, k, v))
    out, normalizer = checkpoint_name(out, name), checkpoint_name(normalizer, name)
    return out, (q, k, v, where, out, normalizer)


def _backward(static, saved, d_out):
    q, k, v, where, out, normalizer = saved
    gradients = _run(static, _backward_kernel, where, (q, k, v, out, d_out, normalizer))
    return *gradients, *(None for _ in where)


_attention.defvjp(_forward, _backward)


def _run(static: Static, kernel: Any, where: tuple[jax.Array, ...], operands: tuple[jax.Array, ...]) -> Any:
    """Calls a kernel for every row, key-value head and block of queries."""
    _, queries, interpret = static
    ranges, seen, segments = where
    q, k = operands[:2]
    (B, N, T, H), K = q.shape, k.shape[1]
    G = N // K
    of_queries = pl.BlockSpec((1, G, queries, H), lambda b, h, i, _: (b, h, i, 0))
    buffers = pl.Buffered(_buffers(T, H, q.dtype.itemsize))
    of_row = pl.BlockSpec((1, 1, T, H), lambda b, h, i, _: (b, h, 0, 0), pipeline_mode=buffers)
    normalizers = pl.BlockSpec((1, 1, G, queries), lambda b, h, i, _: (b, h, 0, i))
    in_specs = [
        pl.BlockSpec((1, seen.shape[1], queries), lambda b, h, i, _: (b, 0, i)),
        pl.BlockSpec((1, 1, T), lambda b, h, i, _: (b, 0, 0)),
        *(of_queries, of_row, of_row),
    ]
    shape = jax.ShapeDtypeStruct
    if kernel is _forward_kernel:
        out_specs = [of_queries, normalizers]
        out_shape = [shape(q.shape, q.dtype), shape((B, K, G, T), jnp.float32)]
        scratch = [(G, queries), (G, queries), (G, H, queries)]
    else:
        in_specs += [of_queries, of_queries, normalizers]
        out_specs, out_shape = [of_queries, of_row, of_row], [shape(x.shape, x.dtype) for x in operands[:3]]
        scratch = [(G, queries), (G, H, queries), (T, H), (T, H)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, T // queries),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(ranges, seen, segments, *operands)


def _buffers(T: int, H: int, itemsize: int) -> int:
    """Returns 2 if the next row's keys and values fit in VMEM beside this row's, 1 if one row's fit.

    Raises:
        InputError: a row does not fit.
    """
    width = -(-H // LANES) * LANES
    needed = {n: width * (4 * n * itemsize + 2 * 4) for n in (2, 1)}  # bytes a token, sums in float32 included
    for n, size in needed.items():
        if T * size <= ROW_BYTES:
            return n
    longest = ROW_BYTES // needed[1] // LANES * LANES
    raise InputError(
        f"row_length={T}: TPU attention holds the keys and values of a row in VMEM, {longest} tokens at most in this "
        f"model and dtype; take a shorter row_length, or set attention=xla"
    )


def _forward_kernel(ranges, seen, segments, *refs):
    """refs: operands, results, and highest, total (the softmax's so far, [G, queries]) and values [G, H, queries]."""
    q, k, v, out, normalizer, highest, total, values = refs
    G = q.shape[1]
    highest[...] = jnp.full_like(highest, MASKED)
    total[...] = jnp.zeros_like(total)
    values[...] = jnp.zeros_like(values)

    def visit(spans, visible):
        k_block, v_turned = _keys(k, spans), _keys(v, spans).T
        for g in range(G):
            head = slice(g, g + 1)
            scores = jnp.where(visible, _product(k_block, q[0, g], 1, 1), MASKED)
            before = highest[head]
            now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
            weights, shrink = jnp.exp(scores - now), jnp.exp(before - now)
            highest[head] = now
            total[head] = shrink * total[head] + jnp.sum(weights, axis=0, keepdims=True)
            values[g] = shrink * values[g] + _product(v_turned, weights.astype(v.dtype), 1, 0)

    _for_blocks(ranges, seen, segments, visit)
    sees_any = highest[...] > MASKED / 2
    share = jnp.where(sees_any, 1 / total[...], 0.0)
    # Where nothing is seen, weights that the backward pass computes from this are 0.
    normalizer[0, 0] = jnp.where(sees_any, highest[...] + jnp.log(total[...]), -MASKED)
    for g in range(G):
        out[0, g] = (values[g] * share[g : g + 1]).T.astype(out.dtype)


def _backward_kernel(ranges, seen, segments, *refs):
    """refs: operands, results, inner (Dao's D, the sum of out x d_out), and the gradients so far, q's transposed."""
    q, k, v, out, d_out, normalizer, d_q, d_k, d_v, inner, q_sum, k_sum, v_sum = refs
    (G, queries, _), block = q.shape[1:], pl.program_id(2)

    @pl.when(block == 0)
    def _():
        k_sum[...] = jnp.zeros_like(k_sum)
        v_sum[...] = jnp.zeros_like(v_sum)

    q_sum[...] = jnp.zeros_like(q_sum)
    for g in range(G):
        products = out[0, g].astype(jnp.float32) * d_out[0, g].astype(jnp.float32)
        column = jnp.sum(products, axis=1, keepdims=True)
        inner[g : g + 1] = jnp.broadcast_to(column, (queries, LANES)).T[:1]

    def visit(spans, visible):
        k_block, v_block = _keys(k, spans), _keys(v, spans)
        k_turned = k_block.T
        d_k_block = d_v_block = jnp.zeros(k_block.shape, jnp.float32)
        for g in range(G):
            q_head, d_head = q[0, g], d_out[0, g]
            scores = jnp.where(visible, _product(k_block, q_head, 1, 1), MASKED)
            weights = jnp.exp(scores - normalizer[0, 0, g : g + 1])
            d_v_block += _product(weights.astype(q.dtype), d_head, 1, 0)
            d_scores = weights * (_product(v_block, d_head, 1, 1) - inner[g : g + 1])
            d_scores = d_scores.astype(q.dtype)
            d_k_block += _product(d_scores, q_head, 1, 0)
            q_sum[g] += _product(k_turned, d_scores, 1, 0)
        for i, span in enumerate(spans):
            k_sum[span, :] += d_k_block[i * KEYS : (i + 1) * KEYS]
            v_sum[span, :] += d_v_block[i * KEYS : (i + 1) * KEYS]

    _for_blocks(ranges, seen, segments, visit)
    for g in range(G):
        d_q[0, g] = q_sum[g].T.astype(d_q.dtype)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        d_k[0, 0] = k_sum[...].astype(d_k.dtype)
        d_v[0, 0] = v_sum[...].astype(d_v.dtype)


def _for_blocks(ranges: Any, seen: Any, segments: Any, visit: Any) -> None:
    """Calls `visit` with the spans of the keys that this program's queries need, TOGETHER blocks at a time, and with
    which of these keys each query sees, [keys, queries] bool."""
    block, queries = pl.program_id(2), seen.shape[2]
    at = 4 * (pl.program_id(0) * pl.num_programs(2) + block)
    first, before, own_first, own = (ranges[at + i] for i in range(4))
    count = before + own

    def step(n, _):
        spans, visible = [], []
        for i in range(TOGETHER):
            number = jnp.minimum(TOGETHER * n + i, count - 1)
            start = pl.multiple_of(KEYS * (number + jnp.where(number < before, first, own_first - before)), KEYS)
            spans.append(pl.ds(start, KEYS))
            # Behind the last block it is taken once more, as keys after all queries.
            ahead = jnp.where(number < TOGETHER * n + i, queries, start - block * queries)
            visible.append(_visible(seen, segments[0, :, spans[-1]], ahead))
        visit(spans, jnp.concatenate(visible, axis=0))

    jax.lax.fori_loop(0, pl.cdiv(count, TOGETHER), step, None)


def _keys(x: Any, spans: list[Any]) -> jax.Array:
    """[1, 1, T, H] -> what lies in the spans, [keys, H]."""
    return jnp.concatenate([x[0, 0, span, :] for span in spans], axis=0)


def _visible(seen: Any, segments: jax.Array, ahead: Any) -> jax.Array:
    """Returns which keys each query of a block sees, [keys, queries] bool. segments: those of the keys, [1, keys].
    ahead: the first key's index less the first query's."""
    column = _column(segments)
    same = functools.reduce(jnp.logical_or, [column == seen[0, r : r + 1, :] for r in range(seen.shape[1])])
    index = functools.partial(jax.lax.broadcasted_iota, jnp.int32, same.shape)
    return same & (index(0) - index(1) <= -ahead)


def _column(row: jax.Array) -> jax.Array:
    """[1, X] -> [X, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Returns the matrix product over an axis of each, float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
