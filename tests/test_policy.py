"""A policy from a model directory: all is checked at once, and the weights are read once, where they are needed."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from policies import CONFIG, ScriptedPolicy, tiny_policy

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh, single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.judge.judge import Judge
from rmr1_jax.model.qwen import Qwen
from rmr1_jax.model.stored_model import StoredModel
from rmr1_jax.policy import Policy, load, model_text


@pytest.fixture
def directory(tmp_path):
    tiny_policy().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reads(monkeypatch) -> list[bool]:
    """`stacked` of each reading of a model directory."""
    seen, read = [], StoredModel.read

    def recorded(self, *args, stacked=True, **options):
        seen.append(stacked)
        return read(self, *args, stacked=stacked, **options)

    monkeypatch.setattr(StoredModel, "read", recorded)
    return seen


def bytes_of(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def completions(policy: Policy) -> list[list[int]]:
    groups = policy.sample(["2 + 3 =", "Reverse a b c"], n=2, max_new_tokens=8, seed=1)
    return [completion.token_ids for group in groups for completion in group]


def test_sampling_holds_the_weights_once(directory, reads):
    expected = completions(tiny_policy())
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    policy = load(directory, "float32", single_device_mesh())
    assert policy.config == tiny_policy().config and reads == []
    assert not [x for x in jax.live_arrays() if id(x) not in before]  # nothing is allocated before it is needed
    assert completions(policy) == expected
    assert completions(policy) == expected
    gc.collect()
    held = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    weights = bytes_of(tiny_policy().params)
    assert weights <= held <= 1.02 * weights
    assert reads == [False]


def test_a_policy_and_what_it_gives_fit_in_a_line(directory):
    policy = load(directory, "float32", make_mesh(MeshConfig(fsdp=8)))
    size = sum(x.size for x in jax.tree.leaves(policy.params))
    assert 1e4 < size < 1e6
    assert repr(policy) == f"Policy(Qwen2 {size / 1e6:.1f}M, {policy.config.num_layers} layers, float32, mesh 1x8x1)"
    assert repr(Judge(policy)) == f"Judge({policy!r}, prompt='cor', rule='strict')"
    completion = load(directory, "float32", single_device_mesh()).sample(["Reverse a b c"], max_new_tokens=40)[0][0]
    assert len(repr(completion)) < 200 and repr(completion).endswith(
        f", {len(completion.token_ids)} tokens, {completion.finish_reason})"
    )
    script = ScriptedPolicy(lambda *_: "word " * 500 + "<answer>[[A]]</answer>")
    found = repr(Judge(script).compare("q", "a", "b"))
    assert len(found) < 250 and found.startswith("Judgement(winner='A', status='ok', votes={'A': 1, ")


def test_a_published_size_in_a_few_words():
    """Qwen2.5-0.5B has 0.49 billion parameters and 24 layers, by its model card."""
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_layers": 24, "num_heads": 14, "head_dim": 64}
    module = Qwen(dataclasses.replace(CONFIG, vocab_size=151936, **shape))
    assert model_text(module, "bfloat16", single_device_mesh()) == "Qwen2 0.5B, 24 layers, bfloat16, mesh 1x1x1"


def test_the_training_layout_is_read_once_and_serves_sampling_too(directory, reads):
    policy = load(directory, "float32", single_device_mesh())
    jax.tree.map(np.testing.assert_array_equal, policy.params, tiny_policy().params)
    tokens = np.arange(8)[None]
    np.testing.assert_array_equal(policy.logits(tokens), tiny_policy().logits(tokens))
    assert completions(policy) == completions(tiny_policy())
    assert reads == [True]


def test_other_weights_take_the_place_of_those_that_were_not_read(directory, reads):
    trained = load(directory, "float32", single_device_mesh()).with_params(tiny_policy().params)
    assert completions(trained) == completions(tiny_policy())
    assert trained.config == tiny_policy().config and reads == []


def test_narrow_weights_are_rounded_before_they_are_sampled_from(directory):
    policy = load(directory, "float32", master_dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), tiny_policy().params)
    np.testing.assert_array_equal(policy.weights["embed"], rounded["embed"])


def test_damage_is_found_at_once(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="cut short"):
        load(directory)
    with pytest.raises(InputError, match=r"dtype 'float8' is not known"):
        load(directory, "float8")


def test_a_model_that_was_not_read_is_saved_one_array_at_a_time(directory, reads, tmp_path):
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    load(directory, "float32").save(tmp_path / "again")
    load(directory, "float32", master_dtype="bfloat16").save(tmp_path / "rounded")
    gc.collect()
    assert not [x for x in jax.live_arrays() if id(x) not in before] and reads == []
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), tiny_policy().params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "rounded", "bfloat16").params, rounded)
