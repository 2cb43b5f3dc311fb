"""The sampler: greedy text against Transformers, and what may not change a token.

Compiling is what takes the time here, so shapes are few: one warm engine serves most tests, and the shapes of the rest
are among its own where that can be.
"""

import dataclasses
import functools
import itertools
import re
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from training import to_mesh
from transformers import AutoModelForCausalLM, Qwen2Config

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh, single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig, read_config
from rmr1_jax.model.hf import load_params
from rmr1_jax.model.qwen import module_for, with_params
from rmr1_jax.sampler import engine as engine_module
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.engine import Engine, Run
from rmr1_jax.sampler.programs import make_controls, stack_slots
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.shapes import free_cache_gib
from rmr1_jax.sampler.slots import Bank
from rmr1_jax.sampler.weights import sampling_weights
from rmr1_jax.train.logprobs import token_logprobs

V = 150
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, n).tolist() for n in (3, 17, 1, 9, 41, 5, 26, 33)]
MANY = [RNG.integers(0, V, n).tolist() for n in RNG.integers(1, 42, 30)]
STOPS = [7, 19, 20, 88]  # by chance one comes after some 40 tokens
torch.set_num_threads(1)


class Model(NamedTuple):
    """A tiny random model in both libraries, and an engine for it with everything compiled."""

    theirs: torch.nn.Module
    config: QwenConfig
    params: dict
    weights: dict
    mesh: Mesh
    engine: Engine

    def sample(self, prompts=PROMPTS, stops=(), **sampling):
        settings = SamplingConfig(**{"max_new_tokens": 64} | sampling)
        return self.engine.generate(self.weights, prompts, stops, sampling=settings)

    def tokens(self, *args, **sampling):
        return tokens_of(self.sample(*args, **sampling)[0])


def tokens_of(groups):
    return [[sample.token_ids for sample in group] for group in groups]


def place(config: QwenConfig, params: dict, mesh: Mesh, dtype=jnp.float32) -> dict:
    with jax.set_mesh(mesh):
        return sampling_weights(with_params(module_for(config), params), dtype=dtype)


def generate(config: QwenConfig, weights: dict, prompts, sampling: SamplingConfig, stops, *, mesh: Mesh):
    """Samples with an engine made for just these prompts."""
    engine = Engine.for_prompts(module_for(config), weights, prompts, sampling, mesh=mesh)
    return engine.generate(weights, prompts, stops)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Model:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=V, num_key_value_heads=2, max_position_embeddings=1024, **shape)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():  # every weight matters: no bias is zero, no norm is one
            scale = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
            weight.copy_(torch.randn_like(weight) * scale + ("norm" in name))
    path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(path)
    ours, mesh = read_config(path), single_device_mesh()
    params = load_params(path, module_for(ours))
    engine = Engine(
        module_for(ours), SamplingConfig(n=3, max_new_tokens=128, slots=8), prompts=8, longest=41, mesh=mesh
    )
    return Model(theirs, ours, params, place(ours, params, mesh), mesh, engine)


@pytest.fixture(scope="module")
def model(bare) -> Model:
    with compilations() as names:
        count = bare.engine.warm_up(bare.weights)
    # What the sampler counts is what JAX compiles, but for the empty caches.
    assert count == len([name for name in names if name != "jit(empty_cache)"])
    assert names.count("jit(decode)") == len(bare.engine.shapes.widths) * len(bare.engine.shapes.sizes)
    return bare


class compilations:
    """The names of the programs that are compiled in a `with` block, as JAX itself reports them."""

    def __enter__(self) -> list[str]:
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self.names

    def _listen(self, event: str, _: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(details["fun_name"])

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


# ---- whole samples


def test_nothing_compiles_after_warm_up(model):
    """Workloads of different lengths, temperatures, truncations, stops and numbers of prompts; new weights too. This
    test comes first: the others would warm what `warm_up` forgot."""
    engine, updated = model.engine, jax.tree.map(lambda x: x * np.float32(1.01), model.params)
    with compilations() as names:
        assert engine.warm_up(model.weights) == 0
        groups, stats = model.sample(PROMPTS[:1], max_new_tokens=128, temperature=0.0)
        assert stats.compiles == 0 and len(groups[0][0].token_ids) == 128
        groups, stats = model.sample(MANY, stops=STOPS, n=3, max_new_tokens=128, top_p=0.9)
        assert stats.compiles == 0 and max(len(s.token_ids) for group in groups for s in group) > 64
        # All slots are free at once, and the next prompts come when the rings are wide.
        _, stats = model.sample(MANY, max_new_tokens=100, temperature=0.3)
        assert stats.compiles == 0 and stats.new_tokens == 30 * 100
        weights = place(model.config, updated, model.mesh)
        settings = SamplingConfig(n=2, max_new_tokens=40, temperature=0.7, top_k=7, seed=3)
        _, stats = engine.generate(weights, PROMPTS[:5], range(16), sampling=settings)
        assert stats.compiles == 0
    assert names == []


def theirs_greedy(model, prompts, new: int) -> list[list[int]]:
    """Transformers' own generate on all prompts at once, padded on the left."""
    longest = max(map(len, prompts))
    rows = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None}
    return model.theirs.generate(rows, attention_mask=mask, **options)[:, longest:].tolist()


def test_256_greedy_tokens_of_8_unequal_prompts_at_once_are_those_of_transformers(model):
    sampling = dataclasses.replace(model.engine.sampling, max_new_tokens=256)
    engine = Engine(module_for(model.config), sampling, prompts=8, longest=41, mesh=model.mesh)
    assert engine.shapes.widths == (64, 128, 256)  # the first two are warm
    greedy = SamplingConfig(max_new_tokens=256, temperature=0.0)
    groups, stats = engine.generate(model.weights, PROMPTS, (), sampling=greedy)
    ours = [tokens for (tokens,) in tokens_of(groups)]
    assert ours == theirs_greedy(model, PROMPTS, 256)
    assert stats.row_steps == 8 * 256 and stats.occupancy == 1  # all of them at once
    assert min(len(set(tokens)) for tokens in ours) > 5  # one token over and over would prove little


def test_settings_take_effect_and_recompile_nothing(model):
    """Stop ids, temperature, top-k, top-p, min-p, seed and the limit are arguments, not constants."""
    with compilations() as names:
        first = model.tokens(temperature=0.0)
        hot = model.tokens(temperature=1.0)
        assert hot != first
        assert model.tokens(temperature=1.0, seed=1) != hot
        assert model.tokens(temperature=1.0, top_k=1, seed=1) == first
        assert model.tokens(temperature=1.0, top_p=1e-6, seed=1) == first
        assert model.tokens(temperature=1.0, min_p=0.999999, seed=1) == first
        assert model.tokens(temperature=1.0, min_p=0.05) != hot
        assert model.tokens(temperature=0.0, max_new_tokens=50) == [[t[:50]] for (t,) in first]
        one, two = first[0][0][9], first[1][0][20]
        for stops in ([one], [two], [one, two], [two, one, V + 5]):
            groups, stats = model.sample(stops=stops, temperature=0.0)
            for (sample,), (whole,) in zip(groups, first, strict=True):
                ends = [i for i, token in enumerate(whole) if token in stops]
                assert sample.token_ids == (whole[: ends[0] + 1] if ends else whole)
                assert sample.finish_reason == ("stop" if ends else "length")
                assert len(sample.logprobs) == len(sample.sampled_logprobs) == len(sample.token_ids)
            assert any(group[0].finish_reason == "stop" for group in groups)
            assert stats.compiles == 0
    assert names == []


def test_a_stop_as_the_first_and_as_the_last_allowed_token(model):
    (whole,), *_ = model.tokens()
    ((first,), *_), stats = model.sample(stops=[whole[0]])
    assert (first.token_ids, first.finish_reason) == (whole[:1], "stop")
    assert stats.occupancy < 1  # the others went on
    limit = next(i for i in range(49, 64) if whole[i] not in whole[:i]) + 1
    (last,), *_ = model.sample(stops=[whole[limit - 1]], max_new_tokens=limit)[0]
    assert (last.token_ids, last.finish_reason) == (whole[:limit], "stop")
    (only,), *_ = model.sample(max_new_tokens=1)[0]
    assert (only.token_ids, only.finish_reason) == (whole[:1], "length")


@functools.partial(jax.jit, static_argnums=0)
def trainer_logp(config, params, rows, temperature):
    hidden = with_params(module_for(config), params).hidden_states(rows)
    return token_logprobs(hidden, params["head"], rows, temperature=temperature).logp


def trainer_logprobs(model, samples, temperature=1.0):
    """The trainer's log-probabilities of the samples' tokens, one row a prompt."""
    rows = np.zeros((len(PROMPTS), 176), np.int32)
    for row, prompt, sample in zip(rows, PROMPTS, samples, strict=True):
        ids = prompt + sample.token_ids
        row[: len(ids)] = ids
    logp = np.asarray(trainer_logp(model.config, model.params, rows, temperature))
    return [x[len(p) :][: len(s.token_ids)] for x, p, s in zip(logp, PROMPTS, samples, strict=True)]


@pytest.mark.parametrize(("temperature", "seed"), [(1.0, 44), (0.7, 22)])
def test_log_probabilities_are_the_trainer_s(model, monkeypatch, temperature, seed):
    """Over whole samples, in slots that were refilled, and rings that had gone round before they grew."""
    grown, reshape = [], Run._reshape

    def watched(run):
        before = run.width
        reshape(run)
        grown.extend([int(run.banks[0].arrays.step)] * (run.width - before))

    monkeypatch.setattr(Run, "_reshape", watched)
    stops = [*STOPS, 40, 60, 100, 120]
    groups, _ = model.sample(stops=stops, n=3, max_new_tokens=128, temperature=temperature, seed=seed)
    assert grown[0] > 64  # the seeds are chosen for this
    assert max(len(sample.token_ids) for group in groups for sample in group) > 64
    for number in range(3):
        samples = [group[number] for group in groups]
        for given, field in ((1.0, "logprobs"), (temperature, "sampled_logprobs")):
            for trainer, sample in zip(trainer_logprobs(model, samples, given), samples, strict=True):
                np.testing.assert_allclose(getattr(sample, field), trainer, rtol=0, atol=1e-4)


def test_bfloat16(model):
    weights = place(model.config, model.params, model.mesh, jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(weights)} == {"bfloat16"}
    groups, stats = generate(
        model.config, weights, PROMPTS, SamplingConfig(max_new_tokens=24, slots=8), (), mesh=model.mesh
    )
    columns, numbers = 8 * 64 + 8 * 32, 2 * 2 * 2 * 8  # prompts and rings; keys and values, layers, heads, numbers each
    assert stats.cache_bytes == columns * numbers * 2
    samples = [sample for (sample,) in groups]
    for trainer, sample in zip(trainer_logprobs(model, samples), samples, strict=True):
        assert sample.logprobs.dtype == np.float32 and len(sample.token_ids) == 24
        np.testing.assert_allclose(sample.logprobs, trainer, rtol=0, atol=0.1)


# ---- what may not change a token


@pytest.fixture(scope="module")
def alike(model):
    """Samples to compare with, by temperature."""
    return {t: model.sample(stops=STOPS, n=3, seed=5, temperature=t)[0] for t in (1.0, 0.0)}


def assert_same(groups, expected) -> None:
    assert tokens_of(groups) == tokens_of(expected)
    for a, b in zip(itertools.chain(*groups), itertools.chain(*expected), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
        assert a.finish_reason == b.finish_reason


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_the_number_of_slots_changes_no_token(model, alike, slots, temperature):
    settings = SamplingConfig(n=3, max_new_tokens=64, seed=5, slots=slots, temperature=temperature)
    groups, stats = generate(model.config, model.weights, PROMPTS, settings, STOPS, mesh=model.mesh)
    assert stats.slots == slots
    assert_same(groups, alike[temperature])
    if temperature:
        lengths = [len(sample.token_ids) for group in groups for sample in group]
        assert len(set(lengths)) > 10 and {"stop", "length"} == {s.finish_reason for g in groups for s in g}
        assert len({tuple(tokens) for group in tokens_of(groups) for tokens in group}) == 24


def test_order_and_neighbours_change_no_token(model, alike):
    settings, expected = {"stops": STOPS, "seed": 5}, alike[1.0]
    assert_same(model.sample(PROMPTS[::-1], n=3, **settings)[0], expected[::-1])
    assert_same(model.sample([PROMPTS[4], *PROMPTS], n=3, **settings)[0], [expected[4], *expected])
    assert_same(model.sample(PROMPTS[2:3], n=3, **settings)[0], expected[2:3])
    assert_same(model.sample(PROMPTS, n=2, **settings)[0], [group[:2] for group in expected])
    assert_same(model.sample(MANY + PROMPTS, n=3, **settings)[0][len(MANY) :], expected)


def test_acommon_prefix_changes_no_token(model):
    """Together the prompts have 32 tokens in common, beside another one none. One is just one token longer."""
    prefix = MANY[0] + PROMPTS[7]
    prompts = [[*prefix[:32], i + 1, *PROMPTS[i][: i % 8]] for i in range(8)]
    assert len(prompts[0]) == 33 and max(map(len, prompts)) == 40
    settings = {"stops": STOPS, "n": 3}
    together, stats = model.sample(prompts, **settings)
    apart, more = model.sample([*prompts, [5]], **settings)
    assert_same(together, apart[:-1])
    assert stats.prefill_tokens == 32 + 7 * 16 and more.prefill_tokens > 8 * 32
    # A prompt that ends within the common part: what is shared is whole chunks that all have.
    shorter, _ = model.sample([*prompts, prefix[:32]], **settings)
    assert_same(shorter[:-1], together)
    assert_same(shorter[-1:], model.sample([prefix[:32]], **settings)[0])


def compiled_decode(engine: Engine, weights: dict) -> str:
    """The program that decodes in all slots, as the compiler leaves it."""
    banks = [Bank(*engine.shapes.sizes[0]) for _ in range(engine.shapes.banks)]
    with jax.set_mesh(engine.mesh):
        arguments = make_controls(engine.sampling, ()), engine.empty_cache(engine.shapes.widths[0])
        lowered = programs.decode.lower(engine.graphdef, weights, *arguments, stack_slots(banks, [0] * len(banks)))
    return lowered.compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [MeshConfig(replica=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=8)], ids=str
)
def test_eight_devices_sample_what_one_does(model, alike, axes):
    mesh = make_mesh(axes)
    weights = place(model.config, to_mesh(module_for(model.config), model.params, mesh), mesh)
    assert weights["layers"][0]["mlp"]["gate"].is_fully_replicated == (axes.tensor == 1)
    settings = SamplingConfig(n=3, max_new_tokens=64, seed=5, slots=8)
    engine = Engine(module_for(model.config), settings, prompts=8, longest=41, mesh=mesh)
    if axes.tensor > 1:
        # The loops of the banks end at different times: who waits inside one for another bank waits forever.
        text = compiled_decode(engine, weights)
        assert text.count("collective-permute(") == 0  # all devices take part in one
        groups = set(re.findall(r"replica_groups=(\[.*?\](?:<=\[.*?\])?|{{.*?}})", text))
        assert groups and groups <= {"[4,2]<=[8]", "{{0,1},{2,3},{4,5},{6,7}}"}
        engine.warm_up(weights)
    with compilations() as names:
        sharded, stats = engine.generate(weights, PROMPTS, STOPS)
    assert (names == []) == (stats.compiles == 0) == (axes.tensor > 1)
    assert_same(sharded, alike[1.0])
    assert stats.busy_row_steps > 0 and stats.cache_bytes == engine.shapes.cache_bytes(model.config, 4)
    settings = dataclasses.replace(settings, temperature=0.0)
    assert_same(engine.generate(weights, PROMPTS, STOPS, sampling=settings)[0], alike[0.0])


# ---- refill, memory


def test_slots_are_refilled_as_they_come_free(model):
    groups, stats = model.sample(MANY, stops=STOPS, n=3, max_new_tokens=128)
    lengths = [len(sample.token_ids) for group in groups for sample in group]
    assert 25 < np.mean(lengths) < 60 and max(lengths) == 128 and min(lengths) < 5  # very unequal
    assert stats.occupancy >= 0.9 and stats.slots == 8
    assert stats.new_tokens == sum(lengths) and stats.prompt_tokens == sum(map(len, MANY))
    # Until the last sample has its slot and after, together.
    assert stats.new_tokens > stats.busy_new_tokens > 0.8 * stats.new_tokens
    assert stats.row_steps > stats.busy_row_steps
    assert sum(lengths) <= stats.row_steps < 1.1 * sum(lengths)  # the last ones ran in fewer rows
    assert stats.row_steps / (8 * 16) <= stats.dispatches and stats.seconds > 0


@pytest.mark.slow
def test_long_prompts_are_prefilled_once_and_their_prefix_once_for_all(model):
    rng = np.random.default_rng(1)
    system = rng.integers(0, V, 160).tolist()
    prompts = [rng.integers(0, V, n).tolist() for n in (512, 448, 449, 500, 471, 480, 511, 460, 450, 505)]
    shared = [system + prompt[160:] for prompt in prompts]
    sampling = SamplingConfig(max_new_tokens=16, temperature=0.0, slots=8)
    engine = Engine(module_for(model.config), sampling, prompts=10, longest=512, mesh=model.mesh)
    assert engine.shapes.room == 512
    used = []
    for texts in (prompts, shared):
        with compilations() as names:
            groups, stats = engine.generate(model.weights, texts, ())
        assert stats.compiles == len(names) - names.count("jit(empty_cache)") > 0  # it is told where it is not warm
        assert tokens_of(groups) == [[tokens] for tokens in theirs_greedy(model, texts, 16)]
        used.append(stats.prefill_tokens)
    unique = sum(map(len, prompts))
    assert unique - 10 <= used[0] <= 1.25 * unique
    assert used[1] <= 1.25 * (unique - 9 * 160) and used[1] < used[0] - 7 * 160


def test_the_slots_follow_from_the_budget(model, alike):
    sizes = {"n": 3, "max_new_tokens": 64, "seed": 5, "slots": 256}
    budget = 120_000 / 2**30
    settings = SamplingConfig(**sizes, cache_gib=budget)
    groups, stats = generate(model.config, model.weights, PROMPTS, settings, STOPS, mesh=model.mesh)
    # Three slots, as many prompts: six times 64 columns of 2 layers, keys and values, 2 heads of 8 numbers in float32.
    assert stats.slots == 3 and stats.cache_bytes == 6 * 64 * 256 <= budget * 2**30
    assert_same(groups, alike[1.0])
    little = SamplingConfig(**sizes, cache_gib=1e-5)
    with pytest.raises(InputError, match=r"cache_gib=1e-05 holds no sample of 41 \+ 64 tokens .*; give at least"):
        generate(model.config, model.weights, PROMPTS, little, STOPS, mesh=model.mesh)


@pytest.mark.parametrize(("tensor", "whole_on"), [(1, 1), (2, 1), (4, 4)])
def test_the_budget_is_what_a_cache_may_take(tiny_policy, tensor, whole_on):
    """A tensor axis that does not divide the key-value heads holds the cache whole on each of its devices."""
    config = tiny_policy.config
    assert config.num_kv_heads == 2
    limits = ({"bytes_limit": n * 2**30, "bytes_in_use": 2**30} for n in (7, 6))
    told = [SimpleNamespace(memory_stats=lambda told=told: told) for told in limits]
    shape = {"replica": 2, "fsdp": 4 // tensor, "tensor": tensor}
    mesh = Mock(spec=Mesh, local_devices=told, shape=shape)
    assert free_cache_gib(mesh, config) == pytest.approx(0.8 * 5 * 8 / whole_on)
    told[1].memory_stats = lambda: None
    assert free_cache_gib(mesh, config) is None


def test_samples_share_their_prompt(model):
    groups, stats = model.sample(PROMPTS[:2], n=3, max_new_tokens=24)
    assert stats.new_tokens == sum(len(s.token_ids) for group in groups for s in group) == 6 * 24
    assert stats.prefill_tokens == 2 * 16 and stats.prompt_tokens == 20  # 2 and 16 tokens, not three times


# ---- as they finish


def test_streamed_samples_come_early_each_once_and_are_generate_s(model):
    expected, whole = model.sample(MANY, stops=STOPS, n=3)
    settings = SamplingConfig(n=3, max_new_tokens=64)
    seen, tokens, dispatches = {}, [], []
    for prompt, number, sample in model.engine.stream(model.weights, MANY, STOPS, sampling=settings):
        assert (prompt, number) not in seen
        seen[prompt, number] = sample
        tokens.append(model.engine.stats.new_tokens)
        dispatches.append(model.engine.stats.dispatches)
        assert model.engine.stats.new_tokens >= sum(len(s.token_ids) for s in seen.values())
    assert_same([[seen[p, i] for i in range(3)] for p in range(len(MANY))], expected)
    assert len(seen) == 90
    assert tokens == sorted(tokens) and tokens[0] < 0.1 * tokens[-1] and tokens[-1] == whole.new_tokens
    assert len(set(dispatches)) > 30 and dispatches[-1] == whole.dispatches


def test_a_stream_that_is_left_leaves_nothing_behind(model):
    expected = model.tokens(stops=STOPS, n=3)
    stream = functools.partial(model.engine.stream, model.weights, sampling=SamplingConfig(n=3, max_new_tokens=64))
    left = stream(MANY, STOPS)
    for _ in range(5):
        next(left)
    left.close()
    assert model.tokens(stops=STOPS, n=3) == expected
    # One that is merely not read on does not disturb others, nor they it.
    waiting, results = stream(PROMPTS, STOPS), {}
    prompt, number, sample = next(waiting)
    results[prompt, number] = sample.token_ids
    assert model.tokens(stops=STOPS, n=3) == expected
    results |= {(prompt, number): sample.token_ids for prompt, number, sample in waiting}
    assert [[results[p, i] for i in range(3)] for p in range(8)] == expected


def test_samples_come_as_they_finish_and_a_bar_shows_the_rate(model, monkeypatch, capsys):
    settings = SamplingConfig(n=3, max_new_tokens=64)
    monkeypatch.setattr(engine_module, "pace", lambda brief: {"mininterval": 0})
    stream = model.engine.stream(model.weights, PROMPTS, STOPS, sampling=settings, bar=True)
    at = [model.engine.stats.new_tokens for _ in stream]
    assert len(at) == 24 and at[0] < 0.5 * at[-1]
    shown = capsys.readouterr().err
    assert "/24 [" in shown and re.search(r"\d tok/s, [5-8] live", shown)
    model.engine.generate(model.weights, PROMPTS, STOPS, sampling=settings)
    assert capsys.readouterr().err == ""


# ---- what is refused


def test_what_is_refused(model):
    assert model.sample([])[0] == []
    assert generate(model.config, model.weights, [], SamplingConfig(), (), mesh=model.mesh)[0] == []
    for prompts, message in (
        ([[1], []], "prompt 1 has no tokens"),
        ([[1, V]], f"to {V}; the model has {V} tokens"),
        ([[-1]], "ids from -1"),
        ([[1] * 42], "prompt 0 has 42 tokens; this engine was made for at most 41"),
    ):
        with pytest.raises(InputError, match=message):
            model.sample(prompts)
    with pytest.raises(InputError, match="17 stop token ids given; at most 16"):
        model.sample(stops=range(17))
    for more in ({"n": 4}, {"max_new_tokens": 129}):
        with pytest.raises(InputError, match=r"more than the engine was made for \(3, 128\)"):
            model.sample(**more)
    narrow = dataclasses.replace(model.config, sliding_window=41)
    with pytest.raises(InputError, match=r"prompt 1 has 33 tokens; with max_new_tokens=12 .* window \(41\)"):
        settings = SamplingConfig(max_new_tokens=12)
        generate(narrow, model.weights, [PROMPTS[0], PROMPTS[7]], settings, (), mesh=model.mesh)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"min_p": -0.1},
        {"min_p": 1.0},
        {"slots": 0},
        {"cache_gib": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=rf"^SamplingConfig: {name}: Input should be .* \(got {value!r}\)$"):
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
