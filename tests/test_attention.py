"""Attention against plain NumPy loops; the two-part form against the whole; packed rows against rows of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.data.pipeline import assemble
from rmr1_jax.data.tokens import Example
from rmr1_jax.model.attention import MAX_BLOCKS, QUERY_BLOCK, attend, attend_two
from rmr1_jax.model.config import parse_config
from rmr1_jax.model.qwen import hidden_states, init_params
from rmr1_jax.train.sft import sft_micro_loss


def by_loops(q, k, v, positions, segment_ids):
    """One query head and one query at a time, over exactly the keys that the rule lets it see."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for t in range(T):
            if segment_ids[b, t] == 0:
                continue
            seen = [
                s for s in range(T) if segment_ids[b, s] == segment_ids[b, t] and positions[b, s] <= positions[b, t]
            ]
            for n in range(N):
                scores = np.array([q[b, t, n] @ k[b, s, n // group] for s in seen]) / np.sqrt(H)
                probs = np.exp(scores - scores.max())
                out[b, t, n] = sum(p * v[b, s, n // group] for p, s in zip(probs / probs.sum(), seen, strict=True))
    return out


def layout(lengths: list[int], T: int) -> tuple[np.ndarray, np.ndarray]:
    """positions and segment_ids [T] of a packed row."""
    positions = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(T - sum(lengths))])
    segments = np.repeat(np.arange(len(lengths) + 1), [*lengths, T - sum(lengths)])
    return positions.astype(np.int32), ((segments + 1) * (segments < len(lengths))).astype(np.int32)


def random(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("T", "heads"),
    [(7, (4, 2)), (QUERY_BLOCK, (2, 2)), (2 * QUERY_BLOCK + 9, (4, 1)), (MAX_BLOCKS * QUERY_BLOCK + 40, (1, 1))],
    ids=str,
)
def test_attend_is_the_rule_itself(T, heads):
    """Segments, grouped heads and padding; short rows, a block, several, and so many that a block must be larger."""
    rng = np.random.default_rng(T)
    N, K = heads
    q, k, v = random(rng, 2, T, N, 6), random(rng, 2, T, K, 6), random(rng, 2, T, K, 6)
    rows = [layout([T // 2, T // 3], T), layout([T - T // 4, T // 4], T)]
    positions, segment_ids = (np.stack(x) for x in zip(*rows, strict=True))
    assert (segment_ids == 0).any() and segment_ids.max() == 2
    ours = np.asarray(jax.jit(attend)(q, k, v, positions, segment_ids))
    assert np.isfinite(ours).all()  # padding too: its gradient flows into the loss
    real = segment_ids > 0
    np.testing.assert_allclose(ours[real], by_loops(q, k, v, positions, segment_ids)[real], atol=1e-5)


def test_padding_changes_nothing_and_gets_no_gradient():
    rng = np.random.default_rng(0)
    q, k, v = random(rng, 1, 12, 4, 6), random(rng, 1, 12, 2, 6), random(rng, 1, 12, 2, 6)
    positions, segment_ids = (x[None] for x in layout([5, 3], 12))

    @jax.jit
    @jax.grad
    def gradient(kv):
        out = attend(q, *kv, positions, segment_ids)
        return jnp.sum(out * (segment_ids > 0)[..., None, None])

    assert all((x[:, 8:] == 0).all() and (x[:, :8] != 0).any() for x in gradient((k, v)))


def test_attend_two_is_attend_on_the_whole():
    P, R, N, K, H, S, C = 3, 2, 4, 2, 6, 10, 8
    rng = np.random.default_rng(1)
    q = random(rng, P, R, N, H)
    shared_k, shared_v = random(rng, P, K, S, H), random(rng, P, K, S, H)
    own_k, own_v = random(rng, P, R, K, C, H), random(rng, P, R, K, C, H)
    lengths, steps = [10, 1, 6], 5
    two = attend_two(
        q,
        *(shared_k, shared_v, np.arange(S) < np.asarray(lengths)[:, None]),
        *(own_k, own_v, np.arange(C) < steps),
    )
    for p, length in enumerate(lengths):
        for r in range(R):
            keys, values = (
                np.concatenate([shared[p, :, :length], own[p, r, :, :steps]], axis=1).swapaxes(0, 1)[None]
                for shared, own in ((shared_k, own_k), (shared_v, own_v))
            )
            T = length + steps
            queries = np.zeros((1, T, N, H), np.float32)
            queries[0, -1] = q[p, r]
            whole = attend(queries, keys, values, np.arange(T)[None], np.ones((1, T), np.int32))
            np.testing.assert_allclose(two[p, r], whole[0, -1], atol=1e-6)


def test_bfloat16_keeps_its_scores_in_float32():
    """Keys so alike that scores rounded to bfloat16 would all be the same."""
    q = jnp.full((1, 4, 1, 64), 4.0, jnp.bfloat16)
    k = jnp.full((1, 4, 1, 64), 4.0, jnp.bfloat16).at[0, 3, 0, 0].set(4.5)
    v = jnp.arange(4, dtype=jnp.bfloat16)[None, :, None, None] * jnp.ones((1, 4, 1, 64), jnp.bfloat16)
    out = attend(q, k, v, jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32))
    assert out.dtype == jnp.bfloat16
    weights = np.exp([0, 0, 0, 0.25])
    np.testing.assert_allclose(float(out[0, 3, 0, 0]), weights @ np.arange(4) / weights.sum(), rtol=0.01)


# ---- packed rows

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_packed_is_unpacked(model_type):
    """States, SFT loss and every gradient: rows of several examples, and the same examples in rows of their own."""
    config = parse_config({"model_type": model_type} | SHAPE, "test")
    params = init_params(config, jax.random.key(0))
    params["layers"] |= {k: v + 0.1 for k, v in params["layers"].items() if k.endswith(("bias", "norm"))}
    rng = np.random.default_rng(3)
    lengths, T = [9, 14, 5, 11, 20, 4], 32
    examples = [
        Example(str(n), rng.integers(0, 61, n).astype(np.int32), np.arange(n) >= rng.integers(1, n)) for n in lengths
    ]
    total = sum(x.trained.sum() for x in examples)
    weights = [(x.trained / total).astype(np.float32) for x in examples]
    packed, alone = [[0, 1, 2, 5], [3, 4], [], [], [], []], [[i] for i in range(6)]

    @jax.jit
    def run(params, batch):
        def loss(params):
            return sft_micro_loss(config, params, batch, dtype=jnp.float32, remat="none")[0]

        args = (batch[k] for k in ("tokens", "positions", "segment_ids"))
        return hidden_states(config, params, *args), jax.value_and_grad(loss)(params)

    results = []
    for rows in (packed, alone):
        batch = assemble(rows, examples, T, weights=weights)
        states, value = run(params, batch)
        places = [(b, row.index(i)) for i in range(6) for b, row in enumerate(rows) if i in row]
        starts = [sum(lengths[j] for j in rows[b][:at]) for b, at in places]
        by_example = [np.asarray(states)[b, s : s + n] for (b, _), s, n in zip(places, starts, lengths, strict=True)]
        results.append((by_example, value))
    (ours, (loss, gradients)), (theirs, (expected, wanted)) = results
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    assert all(float(jnp.abs(x).max()) > 1e-4 for x in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), gradients, wanted)
