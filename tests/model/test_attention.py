"""Attention against plain NumPy loops; the sampler's two forms; packed rows against rows of their own."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.data.examples import Example
from rmr1_jax.data.packing import assemble
from rmr1_jax.distributed.mesh import MeshConfig, activation_sharding, make_mesh, single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model.attention import MAX_BLOCKS, QUERY_BLOCK, attend, choose
from rmr1_jax.model.config import parse_config
from rmr1_jax.model.qwen import init_params, module_for, split, with_params
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
        out = attend(jnp.asarray(q), *kv, jnp.asarray(positions), jnp.asarray(segment_ids))
        return jnp.sum(out * (segment_ids > 0)[..., None, None])

    assert all((x[:, 8:] == 0).all() and (x[:, :8] != 0).any() for x in gradient((k, v)))


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
    params = init_params(module_for(config), jax.random.key(0))
    for part in (params["layers"], params["layers"]["attn"]):
        part |= {k: v + 0.1 for k, v in part.items() if k.endswith(("bias", "norm"))}
    rng = np.random.default_rng(3)
    lengths, T = [9, 14, 5, 11, 20, 4], 32
    examples = [
        Example(str(n), rng.integers(0, 61, n).astype(np.int32), np.arange(n) >= rng.integers(1, n)) for n in lengths
    ]
    total = sum(x.trained.sum() for x in examples)
    items = [SimpleNamespace(tokens=x.tokens, weights=(x.trained / total).astype(np.float32)) for x in examples]
    packed, alone = [[0, 1, 2, 5], [3, 4], [], [], [], []], [[i] for i in range(6)]

    @jax.jit
    def run(params, batch):
        def loss(params):
            return sft_micro_loss(split(module_for(config))[0], params, batch, dtype=jnp.float32, remat="none")[0]

        args = (batch[k] for k in ("tokens", "positions", "segment_ids"))
        return with_params(module_for(config), params).hidden_states(*args), jax.value_and_grad(loss)(params)

    results = []
    for rows in (packed, alone):
        batch = assemble([[items[i] for i in row] for row in rows], T, ["weights"])
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_the_whole_square(dtype):
    """Over several blocks, whose weights the backward pass computes again."""
    T, N, K, H = 2 * QUERY_BLOCK + 9, 4, 2, 6
    rng = np.random.default_rng(3)
    arrays = [jnp.asarray(random(rng, 2, T, heads, H), dtype) for heads in (N, K, K)]
    rows = [layout([T // 2, T // 3], T), layout([T - T // 4, T // 4], T)]
    positions, segments = (np.stack(x) for x in zip(*rows, strict=True))
    real = segments[:, :, None, None] > 0
    cotangent = np.where(real, random(rng, 2, T, N, H), 0)
    seen = (segments[:, :, None] == segments[:, None]) & (positions[:, None] <= positions[:, :, None])

    def square(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // K, axis=2)) / np.sqrt(H)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e9), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, N // K, axis=2))

    def gradients(attention):
        return jax.jit(jax.grad(lambda *x: jnp.sum(attention(*x) * cotangent), argnums=(0, 1, 2)))(*arrays)

    ours = gradients(lambda q, k, v: attend(q, k, v, jnp.asarray(positions), jnp.asarray(segments)))
    for a, b in zip(ours, gradients(square), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=(1e-5 if dtype == "float32" else 0.03) * np.abs(b).max())


# ---- the Pallas kernel, in Pallas' interpreter


def kernel_case(N, K, T=256, H=16):
    """Packed rows of several segments, with padding: q, k, v, positions, segment_ids, and where there are tokens."""
    rng = np.random.default_rng(N)
    q, k, v = random(rng, 4, T, N, H), random(rng, 4, T, K, H), random(rng, 4, T, K, H)
    rows = [layout(lengths, T) for lengths in ([100, 60, 33], [T], [1, 130, T - 131], [7])]
    positions, segment_ids = (np.stack(x) for x in zip(*rows, strict=True))
    return (q, k, v), (positions, segment_ids), segment_ids[:, :, None, None] > 0


@pytest.mark.parametrize(
    ("N", "K", "axes"),
    [(4, 2, None), (2, 2, None), (4, 1, MeshConfig(fsdp=4, tensor=2)), (4, 2, MeshConfig(replica=2, fsdp=2, tensor=2))],
    ids=str,
)
def test_the_tpu_s_kernel_is_the_same_attention(N, K, axes):
    """Values and gradients, packed rows included; heads that the tensor axis divides, and a key head that it cannot."""
    arrays, where, real = kernel_case(N, K)
    mesh = make_mesh(axes) if axes else single_device_mesh()
    cotangent = np.where(real, random(np.random.default_rng(9), *arrays[0].shape), 0)

    def run(implementation):
        def loss(q, k, v):
            out = attend(q, k, v, *where, implementation)
            return jnp.sum(out * cotangent), out

        placed = [jax.device_put(x, activation_sharding(mesh, "BTNH", x.shape)) for x in arrays]
        with jax.set_mesh(mesh):
            (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*placed)
        return [np.where(real, out, 0), *grads]

    for ours, xla in zip(run("interpret"), run("xla"), strict=True):
        np.testing.assert_allclose(ours, xla, rtol=0, atol=1e-4 * np.abs(xla).max())


@pytest.mark.slow
def test_the_tpu_s_kernel_trains_the_same():
    """The loss of SFT and its gradients through a whole model."""
    fields = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 256}
    config = parse_config(fields | {"rope_theta": 1e4, "tie_word_embeddings": True}, "test")
    params = init_params(module_for(config), jax.random.key(0))
    _, (positions, segment_ids), _ = kernel_case(4, 2)
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 60, positions.shape, np.int32), "positions": positions}
    batch |= {"segment_ids": segment_ids, "weights": ((positions > 0) & (segment_ids > 0)) / np.float32(500)}
    batch = {name: jnp.asarray(values) for name, values in batch.items()}

    def run(attention):
        graphdef = split(module_for(config))[0]
        loss = lambda params: sft_micro_loss(graphdef, params, batch, remat="full", attention=attention)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (ours, our_grads), (xla, xla_grads) = run("interpret"), run("xla")
    np.testing.assert_allclose(ours, xla, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(our_grads), jax.tree.leaves(xla_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1e-3, np.abs(b).max()))


def test_rows_that_a_tpu_cannot_take_are_refused():
    x = jnp.zeros((1, 200, 2, 16))
    with pytest.raises(InputError, match=r"row_length=200: TPU attention takes multiples of 128; try 256"):
        attend(x, x, x, jnp.arange(200)[None], jnp.ones((1, 200), jnp.int32), "pallas")


def test_what_auto_is():
    options = {"dtype": jnp.bfloat16, "head_dim": 64}
    assert choose("auto", jax.devices()[0], **options) == "xla"
    assert choose("pallas", jax.devices()[0], **options) == "pallas"
