"""The TPU kernel for packed rows, in Pallas' interpreter, against plain attention over the whole square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.model.packed_blocks import KEYS, TOGETHER, key_ranges, query_block, seen_segments, visited_scores
from rmr1_jax.model.packed_kernel import packed_attention


def shared_row(groups: list[tuple[int, list[int]]], T: int) -> tuple[np.ndarray, np.ndarray]:
    """segment_ids and parents [T] of a row of groups: the prompt's length, and those of the responses behind it."""
    segments, parents = np.zeros((2, T), np.int32)
    at = segment = 0
    for prompt, responses in groups:
        parent = segment + 1
        for i, length in enumerate([prompt, *responses]):
            segment += 1
            segments[at : at + length] = segment
            parents[at : at + length] = parent if i else 0
            at += length
    return segments, parents


T = 256
ROWS = [
    [(70, [1, 40, 30]), (1, [50, 1]), (30, [10, 20])],  # a prompt of 1 token, responses of 1, padding behind
    [(T, [])],  # one segment
    [(90, [112, 1, 53])],  # full
    [(1, [1, 1]), (3, [200])],
    [(5, [])],  # whole blocks of padding
]


def rows():
    segments, parents = zip(*(shared_row(groups, T) for groups in ROWS), strict=True)
    return np.stack(segments), np.stack(parents)


def visible(segments: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """[B, T, S] bool, by the rule."""
    q, k, index = segments[:, :, None], segments[:, None], np.arange(segments.shape[1])
    parent = parents[:, :, None]
    return ((q == k) | (parent == k)) & (k > 0) & (q > 0) & (index[:, None] >= index)


def square(q, k, v, seen):
    """Attention by the whole [T, T] matrix, 0 where a query sees nothing."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    seen = seen[:, None]
    weights = jax.nn.softmax(jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k), -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", jnp.where(seen, weights, 0), v)


@pytest.mark.parametrize(("heads", "queries", "with_parents"), [((4, 2), 64, True), ((1, 1), 128, False)], ids=str)
def test_values_and_gradients_are_those_of_the_square(heads, queries, with_parents):
    segments, parents = rows()
    N, K = heads
    rng = np.random.default_rng(N)
    shape = (*segments.shape, N, 8)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(*shape[:2], n, 8)), jnp.float32) for n in (N, K, K, N))
    seen = visible(segments, parents if with_parents else np.zeros_like(parents))

    def kernel(*x):
        given = jnp.asarray(parents) if with_parents else None
        return packed_attention(*x, jnp.asarray(segments), given, queries=queries, interpret=True)

    def run(attention):
        @jax.jit
        def with_gradients(*x):
            out, pull_back = jax.vjp(attention, *x)
            return out, *pull_back(cotangent)

        return with_gradients(q, k, v)

    ours, wanted = run(kernel), run(lambda *x: square(*x, seen))
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("with_parents", [True, False])
@pytest.mark.parametrize("in_order", [True, False])
def test_the_ranges_hold_all_that_is_visible_and_little_else(with_parents, in_order):
    """All of it in any order of segment numbers; in the order of packing, hardly a block that holds nothing visible."""
    segments, parents = rows()
    if not in_order:
        renumbered = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(segments.max())])
        segments, parents = (renumbered[x].astype(np.int32) for x in (segments, parents))
    seen = visible(segments, parents if with_parents else np.zeros_like(parents))
    ids = jnp.asarray(segments)
    by_query = seen_segments(ids, jnp.asarray(parents) if with_parents else None)
    for queries, keys in [(32, 64), (128, 32)]:
        ranges = np.asarray(key_ranges(by_query, ids, queries, keys))
        visited = np.zeros((len(seen), T // queries, T // keys), int)
        for b, i in np.ndindex(visited.shape[:2]):
            for first, count in ranges[b, i].reshape(2, 2):
                visited[b, i, first : first + count] += 1
        needed = seen.reshape(*visited.shape[:2], queries, -1, keys).any(axis=(2, 4))
        assert visited.max() == 1 and (visited[needed] == 1).all()
        assert not in_order or visited.sum() <= needed.sum() + 2


def test_a_long_row_of_short_segments_takes_a_fraction_of_the_causal_scores():
    length = 12_288
    segments, parents = (x[None] for x in shared_row([(1_150, [700] * 7)] * 2, length))
    count = int(visited_scores(jnp.asarray(segments), jnp.asarray(parents))[0])
    exact = int(visible(segments, parents).sum())
    assert exact < count < 1.5 * exact < 0.35 * length * (length + 1) / 2
    assert count % (query_block(length) * KEYS * TOGETHER) == 0


@pytest.mark.parametrize(
    ("T", "dtype", "message"),
    [
        (200, "float32", "row_length=200: TPU attention takes multiples of 128; try 256"),
        (24_576, "bfloat16", "row_length=24576: TPU attention holds .* in VMEM, 22528 tokens at most"),
        (
            16_384,
            "float32",
            "14976 tokens at most in this model and dtype; take a shorter row_length, or set attention=xla",
        ),
    ],
)
def test_rows_that_it_cannot_take_are_refused(T, dtype, message):
    x, ids = jax.ShapeDtypeStruct((1, T, 2, 64), dtype), jax.ShapeDtypeStruct((1, T), "int32")
    with pytest.raises(InputError, match=message):
        jax.eval_shape(packed_attention, x, x, x, ids)
