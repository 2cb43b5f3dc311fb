"""Our Qwen against the Transformers one (torch on CPU), random weights: logits, gradients, greedy text, both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from policies import shapes_of
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.model.config import parse_config, read_config
from rmr1_jax.model.hf import load_params, save_params
from rmr1_jax.model.qwen import Qwen, init_params, module_for, param_dims, split, with_params

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CASES = {
    "qwen2 untied, derived head": ("qwen2", {}),
    "qwen2 tied, one kv head, theta 1e4": (
        "qwen2",
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_theta": 1e4},
    ),
    "qwen2 all kv heads, given head": ("qwen2", {"num_key_value_heads": 4, "head_dim": 24}),
    "qwen2 linear": ("qwen2", {"rope_scaling": LINEAR, "rope_theta": 1e4}),
    "qwen2 yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3 untied, given head": ("qwen3", {"head_dim": 32}),
    "qwen3 tied, one kv head, theta 1e4": (
        "qwen3",
        {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_theta": 1e4, "head_dim": 16},
    ),
    "qwen3 all kv heads, default head": ("qwen3", {"num_key_value_heads": 4}),
    "qwen3 linear": ("qwen3", {"rope_scaling": LINEAR, "head_dim": 16}),
    "qwen3 yarn": ("qwen3", {"rope_scaling": YARN, "head_dim": 16, "rope_theta": 1e4}),
}
torch.set_num_threads(1)  # for models this small, threads only wait for each other


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
    return with_params(Qwen(config), params)(tokens)


TOKENS = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, 40)).astype(np.int32)


def their_model(model_type: str, seed: int = 0, **changes):
    """A random Transformers model whose every weight matters: biases are not zero, norms are not one."""
    torch.manual_seed(seed)
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[model_type](**BASE | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
            weight.copy_(torch.randn_like(weight) * scale + ("norm" in name))
    return model


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def random_params(config):
    """As `their_model`, made by numpy because JAX would compile a generator for every shape."""
    rng = np.random.default_rng(5)
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), param_dims(module_for(config)))
    return jax.tree.map(
        lambda name, shape: (0.2 * rng.standard_normal(shape) + ("norm" in name)).astype(np.float32),
        names,
        shapes_of(config),
    )


def ours(path, **options):
    config = read_config(path)
    return config, load_params(path, module_for(config), **options)


@pytest.mark.parametrize("model_type, changes", CASES.values(), ids=CASES)
def test_logits(tmp_path, model_type, changes):
    model = their_model(model_type, **changes)
    model.save_pretrained(tmp_path)
    config, params = ours(tmp_path)
    theirs = their_logits(model, TOKENS)
    assert theirs.std() > 0.3  # weights so small that anything would pass
    np.testing.assert_allclose(logits(config, params, TOKENS), theirs, rtol=0, atol=1e-4)


def test_logits_of_a_row_longer_than_a_block_and_than_the_trained_length(tmp_path):
    model = their_model("qwen2", num_hidden_layers=1, rope_scaling=YARN)
    model.save_pretrained(tmp_path)
    config, params = ours(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 96, (1, 300)).astype(np.int32)
    np.testing.assert_allclose(logits(config, params, tokens), their_logits(model, tokens), rtol=0, atol=1e-4)


def test_logits_of_a_bfloat16_checkpoint_computed_in_float32(tmp_path):
    their_model("qwen2", tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path)
    config, params = ours(tmp_path)
    # Loaded anew: .bfloat16() rounds their rotary frequencies too, and .float() would not bring them back.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(logits(config, params, TOKENS), their_logits(model, TOKENS), rtol=0, atol=1e-4)


def test_module_holds_the_same_weights():
    config = parse_config({"model_type": "qwen3"} | BASE, "test")
    params = jax.tree.map(jnp.asarray, random_params(config))
    model = with_params(Qwen(config), params)
    assert jax.tree.structure(split(model)[1]) == jax.tree.structure(param_dims(model))
    np.testing.assert_array_equal(jax.jit(model)(TOKENS), logits(config, params, TOKENS))


@pytest.mark.parametrize(
    "model_type, changes",
    [("qwen2", {"num_hidden_layers": 2}), ("qwen3", {"num_hidden_layers": 2, "tie_word_embeddings": True})],
)
def test_gradients_of_the_sft_loss(tmp_path, model_type, changes):
    """Mean next-token cross-entropy where the mask says so; their gradients are stored and loaded as if weights."""
    model = their_model(model_type, **changes)
    model.save_pretrained(tmp_path / "weights")
    config, params = ours(tmp_path / "weights")
    mask = np.random.default_rng(2).random((2, 39)) < 0.6

    @jax.jit
    @jax.value_and_grad
    def our_loss(params):
        logprobs = jax.nn.log_softmax(with_params(Qwen(config), params)(TOKENS)[:, :-1])
        return -jnp.take_along_axis(logprobs, TOKENS[:, 1:, None], axis=-1)[..., 0].mean(where=mask)

    tokens = torch.from_numpy(TOKENS).long()
    losses = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    loss = losses[torch.from_numpy(mask)].mean()
    loss.backward()
    (tmp_path / "gradients").mkdir()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    save_file(gradients, tmp_path / "gradients" / "model.safetensors", metadata={"format": "pt"})
    theirs = load_params(tmp_path / "gradients", module_for(config))

    value, ours_ = our_loss(params)
    assert value == pytest.approx(loss.item(), abs=1e-5)
    errors = jax.tree.map(lambda a, b: np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b), ours_, theirs)
    assert max(jax.tree.leaves(errors)) <= 1e-3, errors  # a gradient of zero would give NaN, which fails too


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_64_greedy_tokens(tmp_path, model_type):
    model = their_model(model_type, seed=3)
    model.save_pretrained(tmp_path)
    config, params = ours(tmp_path)
    prompt = TOKENS[:, :8]
    end = prompt.shape[1] + 64
    theirs = model.generate(
        torch.from_numpy(prompt).long(),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        do_sample=False,
        max_new_tokens=64,
        pad_token_id=0,
    ).numpy()

    @jax.jit
    def greedy(params, row):
        def step(i, row):
            token = jnp.argmax(with_params(Qwen(config), params)(row)[:, i - 1], axis=-1)
            return row.at[:, i].set(token.astype(row.dtype))

        return jax.lax.fori_loop(prompt.shape[1], end, step, row)

    assert len(set(theirs[:, 8:].ravel().tolist())) > 10  # one token over and over would prove little
    np.testing.assert_array_equal(greedy(params, np.pad(prompt, ((0, 0), (0, 64)))), theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type, tied", [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)])
def test_export_loads_in_transformers(tmp_path, model_type, tied, dtype):
    raw = {"model_type": model_type, "rope_scaling": YARN, "head_dim": 24}
    config = parse_config(BASE | raw | {"tie_word_embeddings": tied, "num_hidden_layers": 2}, "test")
    params = random_params(config)
    save_params(tmp_path, module_for(config), params, dtype=dtype, max_shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == getattr(torch, dtype)
    stored = jax.tree.map(lambda x: x.astype(dtype), params)
    np.testing.assert_allclose(logits(config, stored, TOKENS), their_logits(model.float(), TOKENS), rtol=0, atol=1e-4)
    again = load_params(tmp_path, module_for(read_config(tmp_path)), dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, again, stored)


@pytest.mark.parametrize(
    "model_type, sizes",
    [("qwen2", (2, 2, 2)), ("qwen2", (1, 8, 1)), ("qwen2", (1, 1, 8)), ("qwen3", (2, 2, 2))],
    ids=str,
)
def test_sharded_is_the_same_as_one_device(tmp_path, model_type, sizes):
    their_model(model_type, tie_word_embeddings=model_type == "qwen3", num_hidden_layers=2).save_pretrained(tmp_path)
    mesh = make_mesh(MeshConfig(replica=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    config, single = ours(tmp_path)
    _, sharded = ours(tmp_path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, sharded, single)
    assert not sharded["layers"]["mlp"]["gate"].is_fully_replicated
    with jax.set_mesh(mesh):
        on_mesh = logits(config, sharded, TOKENS)
    np.testing.assert_allclose(on_mesh, logits(config, single, TOKENS), rtol=0, atol=1e-5)


def test_shapes_follow_from_the_letters():
    config = parse_config({"model_type": "qwen2"} | BASE, "test")
    shapes = shapes_of(config)
    assert shapes["layers"]["attn"]["q"] == (3, 64, 4, 16) and shapes["layers"]["attn"]["k"] == (3, 64, 2, 16)
    assert shapes["head"] == (64, 96)
    params = jax.eval_shape(lambda key: init_params(module_for(config), key, dtype=jnp.bfloat16), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
