"""The rings of the cache against a dictionary of what each slot's owner has written; prompts' chunks against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.sampler.cache import Cache, step_of_column, visible_steps, widen, write_chunk, write_step

B, K, H = 5, 2, 3


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
