"""Stage two: every published objective runs, packing and sharding change nothing, and a killed run goes on bitwise."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import (
    EIGHT_DEVICES,
    assert_same,
    metrics_but_timings,
    on_mesh,
    plain_step,
    run,
    run_and_kill,
    small_grpo,
    small_prompts,
    vowels,
)

from rmr1_jax.distributed.mesh import make_mesh, single_device_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.model.qwen import split
from rmr1_jax.policy import load
from rmr1_jax.sampler.sample import Sample, SampleStats, SamplingConfig
from rmr1_jax.train import grpo as stage
from rmr1_jax.train import rollout
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.grpo import grpo, grpo_micro_loss, read_prompts
from rmr1_jax.train.losses import PolicyLossConfig, policy_loss
from rmr1_jax.train.metrics import read_metrics
from rmr1_jax.train.micro_batches import mini_batch
from rmr1_jax.train.optim import OptimConfig
from rmr1_jax.train.rollout import Group, RlPrompt, next_prompts, roll_out
from rmr1_jax.train.run_directory import start_run

OFF = PolicyLossConfig(kl_coef=0.0)
# The published recipes, small. Between them they have every aggregation and every option of the loss.
RECIPES = {
    "rm-r1": {},
    "dapo": {
        "loss": PolicyLossConfig(clip_high=0.28, kl_coef=0.0),
        "aggregation": "token",
        "dynamic_sampling": 3,
    },
    "dr-grpo": {"loss": OFF, "aggregation": "constant", "normalize_std": False},
    "gspo": {"loss": PolicyLossConfig(ratio="sequence", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0)},
    "cispo": {
        "loss": PolicyLossConfig(surrogate="cispo", clip_low=1.0, kl_coef=0.0, entropy_coef=1e-3),
        "aggregation": "token",
    },
    "tis, mini-batches": {
        "loss": PolicyLossConfig(importance_cap=2.0, kl_kind="k2", kl_coef=1e-2),
        "aggregation": "micro_batch",
        "mini_batch_prompts": 2,
        "row_length": 96,
        "micro_rows": 2,
    },
}

RESUMED = ("rm-r1", "dapo", "tis, mini-batches")  # those whose runs differ in what they must remember


@pytest.fixture(scope="module")
def model(tiny_policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("grpo") / "model"
    tiny_policy.save(path)
    return path


@pytest.fixture(scope="module")
def policy(model):
    return load(model, "float32", single_device_mesh())


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    """recipe -> (config, trained policy) of an uninterrupted run of it; each is made once."""

    @functools.cache
    def make(name: str):
        steps = 20 if name in RESUMED else 2
        config = small_grpo(
            out=str(tmp_path_factory.mktemp("whole")), steps=steps, save_every=3, eval_data="given", **RECIPES[name]
        )
        return config, run("grpo", config, policy)

    return make


# ---- one update


def made_groups(policy, rewards=((1, -1, 1, 1), (0, 0, 0, 0), (2, 0, 1, 1))) -> list[Group]:
    """Prompts of the small world with random responses of many lengths, and the sampler's numbers beside them."""
    rng = np.random.default_rng(0)
    groups = []
    for prompt, row in zip(small_prompts(policy), np.asarray(rewards, np.float32), strict=False):
        samples = []
        for _ in row:
            ids = rng.integers(3, 600, rng.integers(1, 13)).tolist()
            logp = rng.normal(-6.5, 0.3, len(ids)).astype(np.float32)
            samples.append(Sample(ids, logp, logp, "length"))
        groups.append(Group(prompt, samples, [""] * len(row), row, row - row.mean()))
    return groups


def batch_of(groups, *, skip_unmixed=False, **options):
    """Arrays [1, 16, 128] with the sampler's log-probabilities as those before the update."""
    config = small_grpo(out="", **options)
    ((batch, count),), *_ = mini_batch(groups, config, skip_unmixed=skip_unmixed)
    return batch | {"old_logp": batch["sampler_logp"]}, count


def micro_loss(policy, loss, max_segments=64):
    config = small_grpo(out="", loss=loss, max_segments=max_segments)
    forward = {"dtype": jnp.float32, "temperature": 1.0, "remat": "none"}
    return functools.partial(grpo_micro_loss, split(policy.model)[0], config, policy_loss, **forward)


@pytest.fixture(scope="module")
def step(policy):
    return plain_step(policy, micro_loss(policy, OFF))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_packed_is_unpacked(policy, step, ratio):
    """Several sequences to a row, and one to a row: the same loss, gradient and metrics."""
    if ratio == "sequence":
        step = plain_step(policy, micro_loss(policy, PolicyLossConfig(ratio="sequence", kl_coef=0.0)))
    groups = made_groups(policy)
    (packed, one), (alone, two) = (batch_of(groups, max_segments=n, share_prompts=False) for n in (64, 1))
    assert (packed["segment_ids"].max(), alone["segment_ids"].max(), one, two) == (2, 1, 1, 1)
    (ours, metrics), (theirs, expected) = step(policy.params, packed, 1), step(policy.params, alone, 1)
    assert float(expected["grad_norm"]) > 0.1 and abs(float(expected["loss"])) > 1e-3
    assert_same(ours, theirs, atol=1e-5)
    assert_same(metrics, expected, atol=1e-4)  # sums over tokens, not means


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant", "micro_batch"])
def test_skipping_unmixed_groups_changes_neither_loss_nor_gradient(policy, step, aggregation):
    groups = made_groups(policy)
    (less, _), (all_, _) = (batch_of(groups, aggregation=aggregation, skip_unmixed=skip) for skip in (True, False))
    if aggregation != "micro_batch":
        assert (less["segment_ids"] > 0).sum() < (all_["segment_ids"] > 0).sum()
    (ours, metrics), (theirs, expected) = step(policy.params, less, 1), step(policy.params, all_, 1)
    assert float(expected["grad_norm"]) > 0.05
    assert_same(ours, theirs, atol=1e-6)
    assert metrics["loss"] == pytest.approx(float(expected["loss"]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axes", EIGHT_DEVICES, ids=str)
def test_eight_devices_update_as_one_does(policy, step, axes):
    """The weights less their gradient, the loss and its metrics."""
    sharded = on_mesh(policy, make_mesh(axes))
    batch, count = batch_of(made_groups(policy))
    expected, metrics = step(policy.params, batch, count)
    params, their_metrics = plain_step(sharded, micro_loss(sharded, OFF))(sharded.params, batch, count)
    assert not params["layers"]["mlp"]["gate"].is_fully_replicated
    assert_same(params, expected, atol=1e-5)
    means = [{k: v / sums["tokens"] for k, v in sums.items()} for sums in jax.device_get((their_metrics, metrics))]
    assert_same(*means, atol=2e-6)  # per token: a sum of hundreds has no more digits


# ---- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs(policy, whole, recipe):
    config, trained = whole(recipe)
    rows = read_metrics(config.out)
    assert [row["step"] for row in rows] == list(range(config.steps))
    wanted = {"reward", "accuracy", "valid", "verdict_a", "response_length", "truncated", "mixed_groups", "entropy"}
    wanted |= {"loss", "grad_norm", "clip_fraction", "ratio_mean", "importance_mean", "lr", "packed", "trained_tokens"}
    wanted |= {"tokens_per_second", "prompts_consumed", "new_tokens", "prompt_tokens"}
    wanted |= {"kl"} if config.loss.kl_coef else set()
    for row in rows:
        assert wanted <= row.keys() and ("kl" in row) == ("kl" in wanted)
        assert all(v is not None and np.isfinite(v) for k, v in row.items() if k != "stage")
        # Four prompts of 49 tokens, once each, and 16 texts of 13 places fill a fifth of 16 rows of 128.
        assert 0.15 < row["packed"] <= 1 and row["positions"] > 0
        assert 0 <= row["trained_tokens"] <= row["new_tokens"]
        assert row["importance_mean"] == pytest.approx(1, abs=1e-3)  # the sampler's numbers are the trainer's
    assert rows[0]["grad_norm"] > 0 and rows[0]["entropy"] > 1
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained.params, policy.params)
    assert all(x > 1e-3 for x in jax.tree.leaves(moved))
    if config.loss.kl_coef:
        assert rows[0]["kl"] < 1e-6 * (1 if config.updates_per_step == 1 else 1e6) and rows[-1]["kl"] > 1e-4
    assert_same(load(f"{config.out}/model", "float32", single_device_mesh()).params, trained.params)


@pytest.mark.slow
def test_it_learns(policy, whole):
    rewards = [row["reward"] for row in read_metrics(whole("rm-r1")[0].out)]
    assert np.mean(rewards[-3:]) > 1.5 * np.mean(rewards[:3])  # without training the two differ by a tenth
    assert min(rewards[-3:]) > max(rewards[:3])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RESUMED)
def test_a_killed_run_ends_as_an_uninterrupted_one(model, policy, whole, tmp_path, recipe):
    config, expected = whole(recipe)
    killed = dataclasses.replace(config, out=str(tmp_path))
    run_and_kill("grpo", model, killed, step=4)
    assert len(read_metrics(tmp_path)) == 5
    resumed = run("grpo", killed, policy)
    assert_same(resumed.params, expected.params)
    assert metrics_but_timings(tmp_path) == metrics_but_timings(config.out)
    texts = [(Path(out) / "rollouts.jsonl").read_text() for out in (tmp_path, config.out)]
    assert texts[0] == texts[1] and texts[0].count("\n") == 4 * config.steps


@pytest.mark.slow
def test_the_first_update_of_several_has_ratio_one(policy, tmp_path, monkeypatch):
    """`old_logp` is of the weights that sampled: they are those of the first of two updates, not of the second."""
    updates = []
    monkeypatch.setattr(stage, "check_finite", lambda row, *_, **__: updates.append(dict(row)) or True)
    config = small_grpo(out=str(tmp_path), steps=2, **RECIPES["tis, mini-batches"])
    run("grpo", config, policy)
    first, second = updates[::2], updates[1::2]
    assert len(first) == len(second) == 2
    for u in first:  # but for the last bit: the one program computes gradients too
        assert [u["ratio_mean"], u["ratio_max"], u["clip_fraction"]] == pytest.approx([1, 1, 0], abs=2e-6)
    assert all(u["ratio_max"] > 1.1 and u["clip_fraction"] > 0 for u in second)
    for row, pair in zip(read_metrics(tmp_path), zip(first, second, strict=True), strict=True):
        assert row["loss"] == pytest.approx(np.mean([u["loss"] for u in pair]))
        assert row["grad_norm"] == pytest.approx(np.mean([u["grad_norm"] for u in pair]))
        assert row["ratio_max"] == max(u["ratio_max"] for u in pair)
        assert row["trained_tokens"] == sum(u["tokens"] for u in pair) == row["new_tokens"]


# ---- extending


@pytest.mark.slow
def test_a_reward_and_a_loss_of_one_s_own(policy, tmp_path):
    """REINFORCE. No group of a constant reward is mixed, yet a loss that is not ours sees all of them."""
    seen, rollouts = [], []

    def reward(text, prompt):
        seen.append((text, prompt.id))
        return 1.0

    def reinforce(config, inputs):
        logp = jnp.where(inputs.weights > 0, inputs.logp, 0)
        metrics = {"mine": jnp.sum(inputs.weights > 0) * 2.0}
        return -jnp.sum(inputs.weights * (inputs.advantages + 1) * logp), metrics

    config = small_grpo(out=str(tmp_path), steps=1, loss=OFF)
    prompts = small_prompts(policy)
    given = {"policy": policy, "prompts": prompts, "reward": reward}
    trained = grpo(config, loss=reinforce, on_rollout=lambda *args: rollouts.append(args), **given)
    ((number, groups),) = rollouts
    assert number == 0 and [(t, g.prompt.id) for g in groups for t in g.texts] == seen and len(seen) == 16
    (row,) = read_metrics(tmp_path)
    assert row["mine"] == 2 and row["trained_tokens"] == row["new_tokens"] and row["loss"] > 1
    assert np.abs(np.subtract(trained.params["embed"], policy.params["embed"])).max() > 1e-3

    out = tmp_path / "ours"
    same = grpo(dataclasses.replace(config, out=str(out)), **given)
    assert_same(same.params, policy.params)  # ours has nothing to learn here, and no decay is set
    assert read_metrics(out)[0]["trained_tokens"] == 0


# ---- rollouts


def scripted(monkeypatch) -> list:
    """Makes the sampler answer every prompt with one token, and with two; records (prompts, sampling) of its calls."""
    calls = []

    def for_prompts(model, weights, prompts, sampling, *, mesh):
        return SimpleNamespace(generate=lambda weights, prompts, stops, *, bar: fake(prompts, sampling))

    def fake(prompts, sampling):
        calls.append((prompts, sampling))
        groups = [[Sample([5] * (i + 1), np.zeros(i + 1), np.zeros(i + 1), "stop") for i in range(2)] for _ in prompts]
        return groups, SampleStats(prompt_tokens=len(prompts), new_tokens=3 * len(prompts))

    monkeypatch.setattr(rollout.Engine, "for_prompts", for_prompts)
    monkeypatch.setattr(rollout, "sampling_weights", lambda model, dtype, mesh: split(model)[1])
    return calls


def test_dynamic_sampling_fills_a_batch_with_mixed_groups(policy, monkeypatch):
    calls = scripted(monkeypatch)
    prompts = [RlPrompt(str(i), np.full(4, i, np.int32), "A") for i in range(12)]
    config = small_grpo(out="", dynamic_sampling=3, seed=5)

    def first_only(text, prompt, mixed):
        return float(prompt.id in mixed and text == policy.tokenizer.decode([5]))

    def roll(mixed: str, consumed=0):
        calls.clear()
        reward = functools.partial(first_only, mixed=mixed.split())
        return roll_out(config, policy, prompts, consumed, 7, reward)

    order = [p.id for p in next_prompts(prompts, 12, 0, 5)]
    groups, consumed, facts = roll(" ".join(order))
    assert [g.prompt.id for g in groups] == order[:4] and (consumed, facts["rounds"]) == (4, 1)
    few = [order[1], order[5], order[6], order[9]]
    groups, consumed, facts = roll(" ".join(few))
    assert [g.prompt.id for g in groups] == few and (consumed, facts["rounds"]) == (12, 3)
    assert (facts["prompt_tokens"], facts["new_tokens"]) == (12, 36)
    seeds = [sampling.seed for _, sampling in calls]
    assert len(set(seeds)) == 3
    groups, consumed, _ = roll(order[2])
    assert [g.prompt.id for g in groups] == [order[2], *order[:2], order[3]] and consumed == 12
    assert [sampling.seed for _, sampling in calls] == seeds  # of (seed, step, round), and of nothing else
    groups, consumed, _ = roll(" ".join(order), consumed=4)
    assert [g.prompt.id for g in groups] == order[4:8] and consumed == 4


# ---- refusals


def test_another_config_is_refused_and_named(tmp_path):
    start_run(small_grpo(out=str(tmp_path)), tmp_path)
    changed = small_grpo(out=str(tmp_path), loss=PolicyLossConfig(kl_coef=0.5), mini_batch_prompts=2)
    with pytest.raises(InputError, match=r"mini_batch_prompts was 4, is 2; loss.kl_coef was 0.001, is 0.5\)"):
        grpo(changed)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(policy, tmp_path):
    def bad(config, inputs):
        return jnp.float32(jnp.nan), {}

    config = small_grpo(out=str(tmp_path), steps=1)
    with pytest.raises(RunError, match=r"step 0: loss is nan on update 0 of the prompts \['grpo-"):
        grpo(config, policy=policy, prompts=small_prompts(policy), reward=vowels, loss=bad)
    assert not list((tmp_path / "checkpoints").iterdir()) and not (tmp_path / "model").exists()


def test_prompts_that_cannot_be_used(policy, tmp_path, capsys):
    given = {"policy": policy, "prompts": small_prompts(policy)}
    config = small_grpo(out=str(tmp_path / "a"), max_prompt_length=10)
    with pytest.raises(InputError, match="no prompt is at most max_prompt_length=10 tokens"):
        grpo(config, **given)
    assert "dropped 10 of 10 prompts longer than 10 tokens" in capsys.readouterr().err
    sharded = given | {"policy": on_mesh(policy, make_mesh())}
    with pytest.raises(InputError, match="micro_rows=4 must be divisible by the mesh's 8 row shards"):
        grpo(small_grpo(out=str(tmp_path / "b"), micro_rows=4), **sharded)


def test_published_rows_as_prompts(policy, tmp_path):
    messages = [{"role": "user", "content": "Which?"}]
    path = tmp_path / "rows.jsonl"
    rows = [{"context_messages": messages, "winner": w} for w in ("model_a", "model_b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(path, policy)
    assert [p.better for p in prompts] == ["A", "B"] and [p.id for p in prompts] == ["rows-0", "rows-1"]
    assert prompts[0].tokens.tolist() == policy.tokenizer.render(messages)
    path.write_text(json.dumps({"context_messages": messages, "winner": "<eval>a trace</eval>"}))
    with pytest.raises(InputError, match="row rows-0 has a trace as its winner"):
        read_prompts(path, policy)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"prompts_per_step": 6, "mini_batch_prompts": 4},
            "prompts_per_step=6 must be a multiple of mini_batch_prompts=4",
        ),
        ({"row_length": 91}, r"row_length=91 cannot hold .* at least .* = 92"),
        ({"dtype": "half"}, r"dtype: Input should be 'float32' or 'bfloat16' \(got 'half'\)"),
        ({"structure": "x"}, "structure='x' must be one of"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(InputError, match=message):
        small_grpo(out="", **wrong)


def test_defaults_are_the_published_recipe():
    config = GrpoConfig(out="")
    assert (config.prompts_per_step, config.mini_batch_prompts, config.updates_per_step) == (1024, 128, 8)
    assert config.sampling == SamplingConfig(n=7, max_new_tokens=8192)
    assert config.optimizer == OptimConfig(lr=1e-6, schedule="constant", warmup_ratio=0, b2=0.999, weight_decay=0.01)
