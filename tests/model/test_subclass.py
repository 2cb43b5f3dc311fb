"""A researcher changes a part of the model by subclassing: it loads, trains, samples, and is an NNX module as any."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from training import run, small_sft

from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model.attention import attend
from rmr1_jax.model.qwen import Attention, Block, Qwen, split, weight, with_params
from rmr1_jax.policy import load


class SoftCapAttention(Attention):
    @staticmethod
    def transform_scores(scores):
        return 2.0 * jnp.tanh(scores / 2.0)


class SoftCapBlock(Block):
    Attention = SoftCapAttention


class SoftCapQwen(Qwen):
    Block = SoftCapBlock


def reference(q, k, v, transform):
    """Causal attention of one row in NumPy, with the scores transformed before the softmax."""
    _, T, N, H = q.shape
    k, v = (np.repeat(np.asarray(x, np.float64), N // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), k) / np.sqrt(H)
    scores = np.where(np.tri(T, dtype=bool), transform(scores), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def inputs(T: int):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, T, n, 8)).astype(np.float32) * 2 for n in (4, 2, 2))
    return q, k, v, np.arange(T, dtype=np.int32)[None], np.ones((1, T), np.int32)


def test_transformed_scores_and_their_gradients():
    q, k, v, positions, segments = map(jnp.asarray, inputs(150))  # two blocks
    ours = attend(q, k, v, positions, segments, "xla", SoftCapAttention.transform_scores)
    np.testing.assert_allclose(ours, reference(q, k, v, lambda s: 2 * np.tanh(s / 2)), rtol=0, atol=2e-6)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = SoftCapAttention.transform_scores(jnp.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5)
        scores = jnp.where(jnp.tri(150, dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)

    def loss(attention):
        return lambda q, k, v: (attention(q, k, v) * jnp.cos(jnp.arange(8.0))).sum()

    def blocked(q, k, v):
        return attend(q, k, v, positions, segments, "xla", SoftCapAttention.transform_scores)

    grads = [jax.grad(loss(f), argnums=(0, 1, 2))(q, k, v) for f in (blocked, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), *grads)


def test_a_kernel_that_cannot_transform_scores_is_refused():
    with pytest.raises(InputError, match="attention=interpret: the Pallas kernel cannot transform scores"):
        attend(*map(jnp.asarray, inputs(128)), "interpret", SoftCapAttention.transform_scores)


@pytest.fixture(scope="module")
def capped(tiny_policy, tmp_path_factory):
    """The same weights, scaled so that scores reach the cap, under the subclass."""
    sharp = jax.tree.map(lambda x: x, tiny_policy.params)
    sharp["layers"]["attn"]["q"] = sharp["layers"]["attn"]["q"] * 8
    path = tmp_path_factory.mktemp("model")
    tiny_policy.with_params(sharp).save(path)
    mesh = single_device_mesh()
    return load(path, "float32", mesh, module=SoftCapQwen), load(path, "float32", mesh)


def test_the_sampler_and_the_training_forward_agree(capped):
    ours, plain = capped
    prompt = list(range(5, 40))
    [[sample]] = ours.sample([prompt], max_new_tokens=24, temperature=0.0, stop_token_ids=[])
    row = np.asarray([prompt + sample.token_ids], np.int32)
    logp = jax.nn.log_softmax(ours.logits(row))[0, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(np.asarray(logp), np.asarray(sample.token_ids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(sample.logprobs, chosen, rtol=0, atol=2e-5)
    assert sample.token_ids == np.asarray(jnp.argmax(logp, axis=-1)).tolist()
    assert np.abs(np.asarray(ours.logits(row) - plain.logits(row))).max() > 1e-3  # the cap does something


def test_a_subclass_trains(capped, tmp_path):
    policy = capped[0]
    config, before = small_sft(out=str(tmp_path), max_steps=1), policy.params
    trained = run("sft", config, policy)
    assert type(trained.model) is SoftCapQwen
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), trained.params, before)
    assert min(moved["layers"]["attn"]["q"], moved["layers"]["mlp"]["up"]) > 0


def test_a_parameter_without_a_name_on_disk_is_refused(tiny_policy, tmp_path):
    class GatedAttention(Attention):
        def __init__(self, config):
            super().__init__(config)
            self.sink = weight(config, "N", fill=0.0)

    class GatedBlock(Block):
        Attention = GatedAttention

    class GatedQwen(Qwen):
        Block = GatedBlock

    tiny_policy.save(tmp_path)
    with pytest.raises(InputError, match=r"GatedQwen has parameters .*: layers\.attn\.sink; add their names to TABLE"):
        load(tmp_path, "float32", module=GatedQwen)


def test_the_tools_of_flax_and_orbax_work_on_it(tiny_policy, tmp_path, capsys):
    model = tiny_policy.model
    graphdef, params = split(model)
    state = nnx.state(model, nnx.Param)
    assert {w.dims for w in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Param))} >= {"LDNH", "VD", "D"}
    assert all(len(w.dims) == w.ndim for w in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Param)))
    nnx.display(model)
    assert "dims='LDNH'" in capsys.readouterr().out
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    again = nnx.merge(graphdef, restored)
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(again(tokens), with_params(model, params)(tokens))
