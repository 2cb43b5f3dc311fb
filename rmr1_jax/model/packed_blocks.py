"""The blocks of keys that each block of queries of a packed row needs, for the TPU kernel in `packed_kernel.py`.

A segment of a packed row sees itself and at most one other segment, its parent. Most pairs of blocks of a long row hold
no segments that see each other; the kernel visits the others alone, and the planner counts them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from rmr1_jax.errors import InputError

NOTHING = -1  # in `sees`: no key has this segment
KEYS = 128  # keys of a block, the lanes of a TPU's vector register
QUERIES = (256, 128)  # queries of a block: the largest that divides the row length
TOGETHER = 2  # blocks of keys, adjacent or not, that the kernel takes in one step


def query_block(T: int) -> int:
    """Returns the queries of a block of a row of T.

    Raises:
        InputError: T is not a multiple of 128.
    """
    if T % KEYS:
        raise InputError(f"row_length={T}: TPU attention takes multiples of {KEYS}; try {-(-T // KEYS) * KEYS}")
    return next(size for size in QUERIES if T % size == 0)


def seen_segments(segment_ids: Int[ArrayLike, "B T"], parents: Int[ArrayLike, "B T"] | None) -> jax.Array:
    """Returns the segments that each query sees, [B, 1, T], or [B, 2, T] with parents; NOTHING in place of 0."""
    seen = jnp.stack([segment_ids] if parents is None else [segment_ids, parents], axis=1)
    return jnp.where(seen > 0, seen, NOTHING).astype(jnp.int32)


def key_ranges(seen: jax.Array, segment_ids: jax.Array, queries: int, keys: int = KEYS) -> Int[Array, "B I 4"]:
    """Returns two ranges of blocks of keys for each of the I blocks of queries: (first, count, first, count).

    The first range holds parents that lie before the block's own segments; the second goes from the first block of
    these to the diagonal. Together they hold all that a query of the block sees, in whatever order segments lie, and
    little else where segment numbers rise along the row: a block is known by its smallest and largest segment only.

    Args:
        seen: `seen_segments`. segment_ids: [B, T], 0 is padding. queries, keys: positions of a block, which divide T.
    """
    B, T = segment_ids.shape
    blocks = T // keys
    k_low, k_high = _extent(segment_ids.reshape(B, 1, blocks, keys))
    reached = jnp.arange(blocks) * keys < (jnp.arange(T // queries)[:, None] + 1) * queries

    def hull(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the first and the end of the blocks that hold segments from low to high; (blocks, 0) for none."""
        met = (k_low <= high[..., None]) & (k_high >= low[..., None]) & reached
        order = jnp.arange(blocks)
        return jnp.min(jnp.where(met, order, blocks), axis=-1), jnp.max(jnp.where(met, order + 1, 0), axis=-1)

    by_block = seen.reshape(B, seen.shape[1], T // queries, queries)
    own_low, own_high = _extent(by_block[:, 0])
    own_first, own_end = hull(own_low, own_high)
    parents = by_block[:, -1]
    # Parents among the block's own segments are in the second range.
    within = (parents >= own_low[..., None]) & (parents <= own_high[..., None])
    first, end = hull(*_extent(jnp.where(within, NOTHING, parents)))
    end_before, own_end = jnp.minimum(end, own_first), jnp.maximum(own_end, end)
    first = jnp.minimum(first, own_first)
    before, own = (jnp.maximum(x, 0) for x in (end_before - first, own_end - own_first))
    return jnp.stack([first, before, own_first, own], axis=-1).astype(jnp.int32)


def visited_scores(segment_ids: Int[Array, "B T"], parents: Int[Array, "B T"] | None) -> jax.Array:
    """Returns how many scores (pairs of a query and a key) the kernel computes per head in each row, [B]."""
    queries = query_block(segment_ids.shape[1])
    ranges = key_ranges(seen_segments(segment_ids, parents), segment_ids, queries)
    steps = -(-(ranges[..., 1] + ranges[..., 3]) // TOGETHER)
    return steps.sum(axis=1) * (TOGETHER * KEYS * queries)


def _extent(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest and the largest segment on the last axis, without padding; an empty range for none."""
    return jnp.min(jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max), axis=-1), jnp.max(ids, axis=-1)
