"""The sampler: draws against exact distributions, greedy text against Transformers, and what may not change a token."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rmr1_jax.errors import InputError
from rmr1_jax.mesh import Mesh, MeshConfig, make_mesh, single_device_mesh
from rmr1_jax.model.config import QwenConfig, read_config
from rmr1_jax.model.hf import load_params
from rmr1_jax.model.qwen import hidden_states, param_shardings
from rmr1_jax.sampler import engine
from rmr1_jax.sampler.engine import SamplingConfig, generate, sampling_weights
from rmr1_jax.sampler.logits import draw
from rmr1_jax.train.losses import token_logprobs

V = 96
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, n).tolist() for n in (3, 17, 1, 9, 30, 5)]
torch.set_num_threads(1)


class Model(NamedTuple):
    """A tiny random model in both libraries."""

    theirs: torch.nn.Module
    config: QwenConfig
    params: dict
    weights: dict
    mesh: Mesh

    def sample(self, prompts=PROMPTS, stops=(), **sampling):
        return generate(self.config, self.weights, prompts, SamplingConfig(**sampling), stops, mesh=self.mesh)

    def tokens(self, *args, **sampling):
        return [[s.token_ids for s in group] for group in self.sample(*args, **sampling)[0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=V, num_key_value_heads=2, max_position_embeddings=512, **shape)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():  # every weight matters: no bias is zero, no norm is one
            scale = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
            weight.copy_(torch.randn_like(weight) * scale + ("norm" in name))
    path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(path)
    ours = read_config(path)
    params = load_params(path, ours)
    return Model(theirs, ours, params, sampling_weights(params), single_device_mesh())


# ---- one draw


def exact(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution to draw from, token by token as the settings are defined."""
    probs = np.exp(logits / temperature)
    order = sorted(range(len(logits)), key=lambda i: -probs[i])
    order = order[:top_k] if top_k else order
    total, reached, kept = sum(probs[i] for i in order), 0.0, []
    for i in order:
        if reached >= top_p:
            break
        kept.append(i)
        reached += probs[i] / total
    probs[[i for i in range(len(logits)) if i not in kept]] = 0
    return probs / probs.sum()


draw_many = jax.jit(jax.vmap(draw, in_axes=(None, 0, None, None, None)))
LOGITS = np.random.default_rng(1).normal(0, 1.2, 20)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 6, 1.0),
        (1.0, 1, 1.0),
        (1.0, 99, 1.0),
        (1.0, 0, 0.7),
        (1.0, 0, 0.01),
        (0.7, 8, 0.8),
        (2.0, 4, 0.75),
    ],
)
def test_20000_draws_follow_the_exact_distribution(temperature, top_k, top_p):
    n = 20_000
    keys = jax.random.split(jax.random.key(7), n)
    drawn = draw_many(
        jnp.asarray(LOGITS, jnp.float32), keys, np.float32(temperature), np.int32(top_k), np.float32(top_p)
    )
    probs = exact(LOGITS, temperature, top_k, top_p)
    counts = np.bincount(drawn.token, minlength=len(LOGITS))
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    if kept.sum() > 1:
        assert scipy.stats.chisquare(counts[kept], n * probs[kept]).pvalue > 1e-3
    np.testing.assert_allclose(drawn.sampled_logp, np.log(probs[drawn.token]), atol=1e-5)
    np.testing.assert_allclose(drawn.logp, scipy.special.log_softmax(LOGITS)[drawn.token], atol=1e-5)


def test_top_k_comes_before_top_p():
    """The case that tells the two orders apart: over all tokens the first two reach less than top_p."""
    logits = np.log([0.3, 0.2, 0.15, 0.15, 0.1, 0.1])
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = draw_many(jnp.asarray(logits, jnp.float32), keys, np.float32(1), np.int32(3), np.float32(0.7))
    assert set(np.unique(drawn.token)) == {0, 1}  # of the three, 0.46 and 0.31; of all, the first four would be kept


def test_temperature_zero_is_greedy_whatever_else_is_set():
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = draw_many(jnp.asarray(LOGITS, jnp.float32), keys, np.float32(0), np.int32(3), np.float32(0.5))
    assert set(np.unique(drawn.token)) == {LOGITS.argmax()}
    np.testing.assert_allclose(drawn.logp, scipy.special.log_softmax(LOGITS).max(), atol=1e-5)
    np.testing.assert_array_equal(drawn.sampled_logp, 0)


# ---- whole samples (shapes are few on purpose: compiling is what takes the time here)


def test_64_greedy_tokens_are_those_of_transformers(model):
    ours = model.tokens(max_new_tokens=64, temperature=0.0)
    for prompt, (tokens,) in zip(PROMPTS, ours, strict=True):
        row = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(row), "do_sample": False, "max_new_tokens": 64}
        theirs = model.theirs.generate(row, pad_token_id=0, eos_token_id=None, **options)
        assert tokens == theirs[0, len(prompt) :].tolist()
    assert min(len(set(tokens)) for (tokens,) in ours) > 5  # one token over and over would prove little


def test_settings_take_effect_and_recompile_nothing(model):
    """Stop ids, temperature, top-k, top-p, seed and the limit within a bucket are arguments, not constants."""
    first = model.tokens(max_new_tokens=64, temperature=0.0)
    compiled = engine.prefill._cache_size(), engine.decode._cache_size()
    hot = model.tokens(max_new_tokens=64, temperature=1.0)
    assert hot != first
    assert model.tokens(max_new_tokens=64, temperature=1.0, seed=1) != hot
    assert model.tokens(max_new_tokens=64, temperature=1.0, top_k=1, seed=1) == first
    assert model.tokens(max_new_tokens=64, temperature=1.0, top_p=1e-6, seed=1) == first
    assert model.tokens(max_new_tokens=50, temperature=0.0) == [[t[:50]] for (t,) in first]
    one, two = first[0][0][9], first[1][0][20]
    for stops in ([one], [two], [one, two], [two, one, V + 5]):
        groups, _ = model.sample(stops=stops, max_new_tokens=64, temperature=0.0)
        for (sample,), (whole,) in zip(groups, first, strict=True):
            ends = [i for i, token in enumerate(whole) if token in stops]
            assert sample.token_ids == (whole[: ends[0] + 1] if ends else whole)
            assert sample.finish_reason == ("stop" if ends else "length")
            assert len(sample.logprobs) == len(sample.sampled_logprobs) == len(sample.token_ids)
        assert any(group[0].finish_reason == "stop" for group in groups)
    assert (engine.prefill._cache_size(), engine.decode._cache_size()) == compiled


def test_a_stop_as_the_first_and_as_the_last_allowed_token(model):
    (whole,), *_ = model.tokens(max_new_tokens=64)
    ((first,), *_), stats = model.sample(stops=[whole[0]], max_new_tokens=64)
    assert (first.token_ids, first.finish_reason) == (whole[:1], "stop")
    assert stats.occupancy < 1  # the others went on
    limit = next(i for i in range(49, 64) if whole[i] not in whole[:i]) + 1
    (last,), *_ = model.sample(stops=[whole[limit - 1]], max_new_tokens=limit)[0]
    assert (last.token_ids, last.finish_reason) == (whole[:limit], "stop")
    (only,), *_ = model.sample(max_new_tokens=1)[0]
    assert (only.token_ids, only.finish_reason) == (whole[:1], "length")


def test_a_cache_that_grows_gives_what_a_large_one_gives(model, monkeypatch):
    large, stats = model.sample(max_new_tokens=64)
    assert stats.dispatches == 1
    monkeypatch.setattr(engine, "FIRST_CAPACITY", 16)
    grown, stats = model.sample(max_new_tokens=64)
    assert stats.dispatches == 3  # 16, 32, 64
    for (a,), (b,) in zip(grown, large, strict=True):
        assert a.token_ids == b.token_ids and len(a.token_ids) == 64
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_sample_depends_on_seed_prompt_and_number_only(model, monkeypatch):
    settings = {"max_new_tokens": 24, "seed": 5}
    whole = model.tokens(n=2, **settings)
    assert len({tuple(t) for group in whole for t in group}) == 12
    assert model.tokens(PROMPTS[::-1], n=2, **settings) == whole[::-1]
    assert model.tokens([PROMPTS[4], *PROMPTS], n=2, **settings) == [whole[4], *whole]
    assert model.tokens(PROMPTS[2:3], n=2, **settings) == whole[2:3]
    assert [group[:2] for group in model.tokens(n=3, **settings)] == whole
    rows, real = [], engine._run_batch
    monkeypatch.setattr(engine, "_run_batch", lambda *args: rows.append(args[3]) or real(*args))
    assert model.tokens(n=2, max_rows=10, **settings) == whole
    assert rows == [5, 1]  # no more than 10 samples in flight, those that fill a batch up included


def test_samples_share_their_prompt(model):
    done = []
    sampling = SamplingConfig(n=2, max_new_tokens=24)
    groups, stats = generate(model.config, model.weights, PROMPTS, sampling, (), mesh=model.mesh, on_batch=done.append)
    assert done == [6] and stats.prefill_tokens == sum(map(len, PROMPTS)) and stats.occupancy == 1
    assert stats.new_tokens == stats.row_steps == sum(len(s.token_ids) for group in groups for s in group) == 6 * 2 * 24
    prompt_columns, own_columns = 8 * 32, 8 * 2 * 24  # six prompts in a batch of eight
    config = model.config
    column = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert stats.cache_bytes == (prompt_columns + own_columns) * column


trainer_logp = jax.jit(
    lambda config, params, rows, temperature: (
        token_logprobs(hidden_states(config, params, rows), params["head"], rows, temperature=temperature).logp
    ),
    static_argnums=0,
)


def trainer_logprobs(model, samples, temperature=1.0):
    """The trainer's log-probabilities of the samples' tokens, one row a prompt."""
    rows = np.zeros((len(PROMPTS), 56), np.int32)
    for row, prompt, sample in zip(rows, PROMPTS, samples, strict=True):
        ids = prompt + sample.token_ids
        row[: len(ids)] = ids
    logp = np.asarray(trainer_logp(model.config, model.params, rows, temperature))
    return [x[len(p) :][: len(s.token_ids)] for x, p, s in zip(logp, PROMPTS, samples, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainer_s(model, temperature):
    groups, _ = model.sample(n=2, max_new_tokens=24, temperature=temperature)
    for number in range(2):
        samples = [group[number] for group in groups]
        for given, field in ((1.0, "logprobs"), (temperature, "sampled_logprobs")):
            for trainer, sample in zip(trainer_logprobs(model, samples, given), samples, strict=True):
                np.testing.assert_allclose(getattr(sample, field), trainer, rtol=0, atol=1e-4)


def test_bfloat16(model):
    half = model._replace(weights=sampling_weights(model.params, dtype=jnp.bfloat16))
    assert {x.dtype.name for x in jax.tree.leaves(half.weights)} == {"bfloat16"}
    groups, stats = half.sample(n=2, max_new_tokens=24)
    assert stats.cache_bytes * 2 == model.sample(n=2, max_new_tokens=24)[1].cache_bytes
    samples = [group[0] for group in groups]
    for trainer, sample in zip(trainer_logprobs(model, samples), samples, strict=True):
        assert sample.logprobs.dtype == np.float32 and len(sample.token_ids) == 24
        np.testing.assert_allclose(sample.logprobs, trainer, rtol=0, atol=0.1)


def test_eight_devices_sample_what_one_does(model):
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        weights = sampling_weights(jax.device_put(model.params, param_shardings(model.config, mesh)))
    assert not weights["layers"][0]["gate"].is_fully_replicated
    sharded, _ = model._replace(mesh=mesh, weights=weights).sample(n=2, max_new_tokens=24)
    single, _ = model.sample(n=2, max_new_tokens=24)
    for group, expected in zip(sharded, single, strict=True):
        for a, b in zip(group, expected, strict=True):
            assert a.token_ids == b.token_ids
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


# ---- what is refused


def test_what_is_refused(model):
    assert model.sample([])[0] == []
    for prompts, message in (([[1], []], "prompt 1 has no tokens"), ([[1, V]], f"to {V}; the model has {V} tokens")):
        with pytest.raises(InputError, match=message):
            model.sample(prompts)
    with pytest.raises(InputError, match="17 stop token ids given; at most 16"):
        model.sample(stops=range(17))
    narrow = model._replace(config=dataclasses.replace(model.config, sliding_window=41))
    with pytest.raises(InputError, match=r"prompt 1 has 30 tokens; with max_new_tokens=12 .* window \(41\)"):
        narrow.sample([PROMPTS[0], PROMPTS[4]], max_new_tokens=12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"max_rows": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=rf"sampling\.{name}={value!r} must be"):
        SamplingConfig(**wrong)


# ---- text in, text out


def test_a_policy_completes_text(tiny_policy):
    tokenizer = tiny_policy.tokenizer
    prompts = ["Reverse a b c", tokenizer.encode("Say it")]
    groups = tiny_policy.sample(prompts, n=2, max_new_tokens=8, seed=3)
    assert [len(group) for group in groups] == [2, 2]
    for completion in (c for group in groups for c in group):
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert len(completion.logprobs) == len(completion.token_ids) and completion.finish_reason in ("stop", "length")
    as_ids, as_text = tiny_policy.sample(["Say it", tokenizer.encode(prompts[0])], n=2, max_new_tokens=8, seed=3)
    assert [[c.text for c in group] for group in (as_text, as_ids)] == [[c.text for c in group] for group in groups]
    stop = groups[0][0].token_ids[2]
    (again, _), _ = tiny_policy.sample(prompts, n=2, max_new_tokens=8, seed=3, stop_token_ids=[stop])
    assert again.finish_reason == "stop" and again.token_ids[-1] == stop


def test_logits_of_packed_rows_given_as_lists(tiny_policy):
    whole = tiny_policy.logits([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]], [[1, 1, 1, 2, 2]])
    np.testing.assert_allclose(whole[:, 3:], tiny_policy.logits([[8, 9]]), atol=1e-5)
