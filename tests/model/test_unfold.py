"""Attention in rows whose responses share a prompt: XLA's form against loops, unfolded rows against XLA's form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.distributed.mesh import MeshConfig, activation_sharding, make_mesh, single_device_mesh
from rmr1_jax.model.attention import attend
from rmr1_jax.model.unfold import UNFOLDED_ROWS, attend_unfolded, unfolding

# Rows as groups (tokens of the shared prompt, tokens of each response); the rest of a row is padding.
ROWS = (
    [(20, [9, 1, 14]), (0, [6]), (3, [2, 2, 2, 2, 2])],
    [(0, [5, 7]), (1, [60])],
    [(40, [30, 25, 33])],  # no padding
    [],
)


def layout(rows=ROWS, T=128):
    """positions, segment_ids and parents, [B, T] int32."""
    arrays = np.zeros((3, len(rows), T), np.int32)
    for b, row in enumerate(rows):
        end = number = 0
        for prompt, responses in row:
            parent = number + 1 if prompt else 0
            for length, start, above in [(prompt, 0, 0)] * bool(prompt) + [(n, prompt, parent) for n in responses]:
                number, begin, end = number + 1, end, end + length
                arrays[:, b, begin:end] = [start + np.arange(length), np.full(length, number), np.full(length, above)]
    return arrays


def random_rows(seed: int, count: int = 6, T: int = 128):
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        row, used = [], 0
        while used < T - 20:
            prompt, responses = int(rng.integers(0, 12)), rng.integers(1, 12, rng.integers(1, 5)).tolist()
            used += prompt + sum(responses)
            if used <= T and sum(p * len(r) + sum(r) for p, r in [*row, (prompt, responses)]) <= UNFOLDED_ROWS * T:
                row.append((prompt, responses))
        rows.append(row)
    return rows


def arrays(B, T, N=4, K=2, H=16):
    rng = np.random.default_rng(N)
    return [jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K)]


def test_a_token_sees_its_own_segment_and_its_parent():
    inputs = arrays(len(ROWS), 128, N=2, K=1)
    positions, segments, parents = layout()
    out = np.asarray(attend(*inputs, *map(jnp.asarray, (positions, segments)), parents=jnp.asarray(parents)))
    q, k, v = map(np.asarray, inputs)
    for b, t in zip(*np.nonzero(segments), strict=True):
        seen = [
            s
            for s in range(128)
            if segments[b, s] in (segments[b, t], parents[b, t] or -1) and positions[b, s] <= positions[b, t]
        ]
        assert len(seen) == positions[b, t] + 1  # whatever is before it in its own text
        for n in range(2):
            scores = np.exp(np.array([q[b, t, n] @ k[b, s, 0] for s in seen]) / 4)
            np.testing.assert_allclose(out[b, t, n], scores @ v[b, seen, 0] / scores.sum(), atol=1e-5)


def values_and_gradients(attention, inputs, cotangent):
    def loss(q, k, v):
        out = attention(q, k, v)
        return jnp.sum(jnp.where(cotangent != 0, out, 0) * cotangent), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.where(cotangent != 0, out, 0), *grads]


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_unfolded_is_folded(seed):
    """With XLA's attention as the kernel, which knows segments only."""
    rows = ROWS if seed is None else random_rows(seed)
    positions, segments, parents = map(jnp.asarray, layout(rows))
    inputs = arrays(len(rows), 128)
    rng = np.random.default_rng(0)
    cotangent = np.where(np.asarray(segments)[:, :, None, None] > 0, rng.normal(size=inputs[0].shape), 0)

    def kernel(q, k, v, segment_ids):
        at = jnp.broadcast_to(jnp.arange(q.shape[1]), segment_ids.shape)  # positions: the order alone
        return attend(q, k, v, at, segment_ids)

    ours = values_and_gradients(lambda *x: attend_unfolded(kernel, *x, segments, parents), inputs, cotangent)
    folded = values_and_gradients(lambda *x: attend(*x, positions, segments, parents=parents), inputs, cotangent)
    for a, b in zip(ours, folded, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_where_tokens_are_in_an_unfolded_row():
    _, segments, parents = layout([[(2, [1, 2]), (0, [2])]], 8)
    plan = unfolding(jnp.asarray(segments), jnp.asarray(parents))
    assert plan.source.tolist() == [[0, 1, 2, 0, 1, 3, 4, 5, 6] + [0] * 15]
    assert plan.unfolded_ids.tolist() == [[2, 2, 2, 3, 3, 3, 3, 4, 4] + [0] * 15]


def test_a_row_that_unfolds_to_too_much_is_not_a_number():
    _, segments, parents = (jnp.asarray(x) for x in layout([[(20, [2] * 6)], [(20, [1] * 4)]], 32))
    q, k, v = arrays(2, 32)
    out = attend_unfolded(lambda q, k, v, ids: q, q, k, v, segments, parents)
    assert jnp.isnan(out[0]).all() and not jnp.isnan(out[1]).any()


@pytest.mark.parametrize("axes", [None, MeshConfig(replica=2, fsdp=2, tensor=2)], ids=str)
def test_the_tpu_s_kernel_takes_shared_prompts(axes):
    where = layout()
    inputs = arrays(len(ROWS), 128)
    mesh = make_mesh(axes) if axes else single_device_mesh()
    real = where[1][:, :, None, None] > 0
    cotangent = np.where(real, np.random.default_rng(1).normal(size=inputs[0].shape), 0)
    placed = [jax.device_put(x, activation_sharding(mesh, "BTNH", x.shape)) for x in inputs]
    positions, segments, parents = map(jnp.asarray, where)

    def run(name):
        with jax.set_mesh(mesh):
            attention = lambda *x: attend(*x, positions, segments, name, parents=parents)  # noqa: E731
            return values_and_gradients(attention, placed, cotangent)

    for ours, xla in zip(run("interpret"), run("xla"), strict=True):
        np.testing.assert_allclose(ours, xla, rtol=0, atol=1e-4 * np.abs(xla).max())
