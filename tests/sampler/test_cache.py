"""The rings of the cache against a dictionary of what each slot's owner has written; prompts' chunks against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.model.attention import attend
from rmr1_jax.sampler.cache import (
    Cache,
    Members,
    Part,
    attend_chunk,
    attend_slots,
    step_of_column,
    visible_steps,
    widen,
    write_chunk,
    write_step,
)

B, K, H = 5, 2, 3


def random(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def softmax_over(q, keys, values):
    """One query [N, H] over keys and values [S, K, H], in float64."""
    N, H = q.shape
    group = N // keys.shape[1]
    out = np.zeros((N, H))
    for n in range(N):
        scores = (keys[:, n // group].astype(float) @ q[n].astype(float)) / np.sqrt(H)
        probs = np.exp(scores - scores.max())
        out[n] = probs / probs.sum() @ values[:, n // group]
    return out


def test_a_column_holds_the_latest_step_that_fell_on_it():
    for width in (1, 4, 6):
        for step in range(15):
            latest = [max(t for t in range(step - width, step + 1) if t % width == c) for c in range(width)]
            assert step_of_column(np.int32(step), width).tolist() == latest


@pytest.mark.parametrize("seed", range(3))
def test_an_owner_sees_its_own_steps_and_all_of_them(seed):
    """Slots change owners at any step and live up to the ring's width, and the ring is widened twice on the way: what
    is visible is exactly what the present owner wrote."""
    rng = np.random.default_rng(seed)
    widths, width = [12, 36], 6
    ring = Cache([], [], [jnp.zeros((B, K, H, width))], [jnp.zeros((B, K, width, H))])
    write, visible = jax.jit(write_step), jax.jit(visible_steps, static_argnums=2)
    start, written = np.zeros(B, np.int32), [{} for _ in range(B)]
    full = 0
    for step in range(70):
        if step in (20, 45):  # neither on the ring's first turn nor at its end
            width = widths.pop(0)
            ring = widen(ring, width)
        for b in range(B):
            # Slot 0 lives as long as the ring allows, the others leave by chance.
            if len(written[b]) == width or (b and rng.random() < 0.1):
                start[b], written[b] = step, {}
        k, v = rng.normal(size=(2, B, K, H)).astype(np.float32)
        own_k, own_v = write(ring.own_k[0], ring.own_v[0], k, v, np.int32(step))
        ring = Cache([], [], [own_k], [own_v])
        assert ring.width == width
        seen = np.asarray(visible(np.int32(step), start, width))
        at = np.asarray(step_of_column(np.int32(step), width))
        for b in range(B):
            written[b][step] = k[b], v[b]
            assert sorted(at[seen[b]]) == sorted(written[b])
            for column in np.nonzero(seen[b])[0]:
                k_written, v_written = written[b][at[column]]
                np.testing.assert_array_equal(own_k[b, :, :, column], k_written)
                np.testing.assert_array_equal(own_v[b, :, column], v_written)
        full += len(written[0]) == width
    assert not widths and full > 2  # rings were full, and went round


def test_a_chunk_is_written_where_it_belongs_and_nowhere_else():
    E, S, T = 4, 12, 5
    rng = np.random.default_rng(0)
    prompt_k = rng.normal(size=(E, K, H, S)).astype(np.float32)
    prompt_v = rng.normal(size=(E, K, S, H)).astype(np.float32)
    k, v = rng.normal(size=(2, 3, T, K, H)).astype(np.float32)
    # The last row only fills the batch up, and points where the first one writes.
    entry, start, active = np.array([2, 0, 2]), np.array([7, 0, 7]), np.array([True, True, False])
    got = jax.jit(write_chunk)(prompt_k, prompt_v, k, v, entry, start, active)
    for p in range(2):
        columns = slice(start[p], start[p] + T)
        prompt_k[entry[p], :, :, columns] = k[p].transpose(1, 2, 0)
        prompt_v[entry[p], :, columns] = v[p].transpose(1, 0, 2)
    for ours, expected in zip(got, (prompt_k, prompt_v), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_what_is_written_takes_the_cache_s_dtype():
    half = jnp.zeros((B, K, H, 4), jnp.bfloat16), jnp.zeros((B, K, 4, H), jnp.bfloat16)
    one = jnp.full((B, K, H), 1.01)
    assert {x.dtype.name for x in write_step(*half, one, one, 2)} == {"bfloat16"}
    chunk, rows = jnp.full((1, 2, K, H), 1.01), np.zeros(1, np.int32)
    assert {x.dtype.name for x in write_chunk(*half, chunk, chunk, rows, rows, rows == 0)} == {"bfloat16"}


@pytest.mark.parametrize("scale", [1, 30], ids=lambda scale: f"scores times {scale}")
@pytest.mark.parametrize(("N", "K"), [(4, 2), (3, 3), (4, 1)], ids=str)
def test_attend_slots_is_a_softmax_over_the_prompt_and_the_slot_s_own_keys(N, K, scale):
    """Prompts with three slots, with one, with none; of different lengths, one without any key; rings with holes."""
    B, E, H, S, W = 6, 4, 8, 5, 7
    rng = np.random.default_rng(N)
    q = scale * random(rng, B, N, H)
    prompt_k, prompt_v, own_k, own_v = (
        random(rng, *shape) for shape in ((E, K, H, S), (E, K, S, H), (B, K, H, W), (B, K, W, H))
    )
    lengths = np.array([5, 0, 2, 3])
    table = np.array([[4, 0, 2], [3, 1, 5], [5, 0, 0], [0, 0, 0]], np.int32)  # any number where it has fewer
    entry, rank = np.array([0, 1, 0, 1, 0, 2], np.int32), np.array([1, 1, 2, 0, 0, 0], np.int32)
    assert (table[entry, rank] == np.arange(B)).all()
    own_visible = rng.random((B, W)) < 0.5
    own_visible[:, 3] |= ~own_visible.any(axis=1)
    own_visible[0] = np.arange(W) == 6
    got = jax.jit(attend_slots)(
        q,
        Part(prompt_k, prompt_v, np.arange(S) < lengths[:, None]),
        Part(own_k, own_v, own_visible),
        Members(table, entry, rank),
    )
    for b in range(B):
        seen = slice(lengths[entry[b]])
        keys = [prompt_k[entry[b]].transpose(2, 0, 1)[seen], own_k[b].transpose(2, 0, 1)[own_visible[b]]]
        values = [prompt_v[entry[b]].swapaxes(0, 1)[seen], own_v[b].swapaxes(0, 1)[own_visible[b]]]
        expected = softmax_over(q[b], np.concatenate(keys), np.concatenate(values))
        np.testing.assert_allclose(got[b], expected, rtol=0, atol=2e-6 * scale)


def test_attend_slots_in_bfloat16_sums_in_float32():
    """1,200 equal keys with the value 1, and one more: a sum of the weights in bfloat16 would stop at 256."""
    S, W, H = 1200, 4, 8
    prompt_k, own_k = jnp.zeros((1, 1, H, S), jnp.bfloat16), jnp.zeros((2, 1, H, W), jnp.bfloat16)
    prompt_v, own_v = jnp.ones((1, 1, S, H), jnp.bfloat16), jnp.full((2, 1, W, H), 401, jnp.bfloat16)
    members = Members(np.array([[0, 1]]), np.array([0, 0]), np.array([0, 1]))
    q, own_visible = jnp.ones((2, 1, H), jnp.bfloat16), np.array([[True, False, False, False], [True] * 4])
    everything = np.ones((1, S), bool)
    out = jax.jit(attend_slots)(q, Part(prompt_k, prompt_v, everything), Part(own_k, own_v, own_visible), members)
    assert out.dtype == jnp.bfloat16
    value = float(jnp.bfloat16(401))
    expected = [(S + value) / (S + 1), (S + 4 * value) / (S + 4)]
    np.testing.assert_allclose(out[:, 0, 0].astype(np.float32), expected, rtol=0.005)


def test_attend_chunk_is_attend_on_the_prompt_so_far():
    """Chunks that begin anywhere in a prompt; what the cache holds behind them is not looked at."""
    P, T, N, K, H, S = 3, 6, 4, 2, 8, 20
    rng = np.random.default_rng(2)
    starts = np.array([0, 5, S - T])
    q = random(rng, P, S, N, H)
    k, v = random(rng, P, S, K, H), random(rng, P, S, K, H)
    chunk = np.stack([q[p, start : start + T] for p, start in enumerate(starts)])
    positions = starts[:, None] + np.arange(T)
    got = jax.jit(attend_chunk)(chunk, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), positions.astype(np.int32))
    whole = jax.jit(attend)(q, k, v, np.tile(np.arange(S), (P, 1)), np.ones((P, S), np.int32))
    for p, start in enumerate(starts):
        np.testing.assert_allclose(got[p], whole[p, start : start + T], rtol=0, atol=1e-6)
