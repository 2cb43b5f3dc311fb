"""Rows of two lengths: every sequence in a row, and the losses, gradients and resumed runs of rows of one length."""

import dataclasses
import functools
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from training import assert_same, metrics_but_timings, run, small_grpo, to_mesh

from rmr1_jax.data.examples import Example
from rmr1_jax.data.packing import Packing, plan_slots, sft_batches
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh, place_rows, single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import parse_config
from rmr1_jax.model.qwen import init_params, module_for, split
from rmr1_jax.sampler.sample import Sample, SamplingConfig
from rmr1_jax.train.config import GrpoConfig, SftConfig
from rmr1_jax.train.grpo import grpo_micro_loss
from rmr1_jax.train.losses import PolicyLossConfig, policy_loss
from rmr1_jax.train.metrics import read_metrics
from rmr1_jax.train.micro_batches import mini_batch, positions_of, to_micro_batches
from rmr1_jax.train.optim import compile_update, init_state
from rmr1_jax.train.rollout import Group, RlPrompt
from rmr1_jax.train.sft import batches_of, sft, sft_micro_loss

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
MODEL = parse_config({"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2} | SHAPE, "test")
GRAPHDEF = split(module_for(MODEL))[0]
SHARDED = MeshConfig(replica=2, fsdp=2, tensor=2)
SFT = functools.partial(SftConfig, out="o", dtype="float32", row_length=64, rows_per_step=16, micro_rows=4)


def examples_of(lengths, seed=0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(str(i), rng.integers(1, 61, n).astype(np.int32), np.arange(n) >= n // 2) for i, n in enumerate(lengths)
    ]


def random_lengths(seed: int, count: int) -> np.ndarray:
    """One in eight needs a long row."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(count) < 1 / 8, rng.integers(17, 65, count), rng.integers(2, 17, count))


@pytest.mark.parametrize("max_items", [None, 2])
def test_a_plan_has_every_example_once_an_epoch(max_items):
    for seed in range(4):
        lengths = random_lengths(seed, 300)
        packing = Packing(max_items, 16, 4)
        one, plan = (plan_slots(lengths, 64, packing, epochs=n, seed=seed) for n in (1, 3))
        assert Counter(i for slot in plan for row in slot for i in row) == dict.fromkeys(range(300), 3)
        assert {len(slot) for slot in plan} == {1, 4}
        for slot in plan:
            for row in slot:
                assert sum(lengths[row]) <= (64 if len(slot) == 1 else 16) and len(row) <= (max_items or 300)
        turns = [plan[i : i + 4] for i in range(0, len(plan), 4)]
        assert all(len({len(slot) for slot in turn}) == 1 for turn in turns)
        assert all(len(turn) == 4 for turn in turns[:-1])
        whole = len(one) // 4 * 4  # only the last short rows of an epoch wait for the next one
        assert plan[: whole - 4] == one[: whole - 4]
        if max_items is None:  # the long rows of a micro-batch are filled before short ones are begun
            assert sum(lengths[lengths > 0]) * 3 / (64 * len(plan)) > 0.9


def test_batches_begin_anywhere_and_are_the_same_on_two_hosts():
    examples = examples_of(random_lengths(0, 200))
    options = {"row_length": 64, "batch_rows": 8, "epochs": 2, "seed": 1, "packing": Packing(None, 16, 4)}
    whole, total = sft_batches(examples, **options)
    whole = list(whole)
    assert len(whole) == total and {len(batch.rows) for batch in whole} == {1, 2}
    rest = sft_batches(examples, **options, start=total // 2)[0]
    hosts = [list(sft_batches(examples, **options, own=own)[0]) for own in ([0, 1, 4, 5], [2, 3, 6, 7])]
    for a, b in zip(rest, whole[total // 2 :], strict=True):
        assert a.items == b.items
        jax.tree.map(np.testing.assert_array_equal, [rows.arrays for rows in a.rows], [rows.arrays for rows in b.rows])
    for k, batch in enumerate(whole):
        for c, rows in enumerate(batch.rows):
            parts = [host[k].rows[c] for host in hosts]
            assert {part.used for part in parts} == {rows.used}
            for name, array in rows.arrays.items():
                halves = [part.arrays[name].reshape(-1, 2, array.shape[1]) for part in parts]
                np.testing.assert_array_equal(np.concatenate(halves, axis=1).reshape(array.shape), array)
            assert not rows.arrays["segment_ids"][rows.used :].any()
        assert sum(batch.lengths) == sum((rows.arrays["segment_ids"] > 0).sum() for rows in batch.rows)
        assert batch.trained_tokens == sum(rows.arrays["trained"].sum() for rows in batch.rows)


@pytest.fixture(scope="module")
def updates():
    """(loss, stacks, mesh) -> (weights less their gradient, metrics)."""
    params = jax.device_get(init_params(module_for(MODEL), jax.random.key(0)))

    def update(loss, stacks, mesh):
        with jax.set_mesh(mesh):
            optimizer = optax.sgd(1.0)
            state = init_state(to_mesh(module_for(MODEL), params, mesh), optimizer)
            stacks = [(place_rows(mesh, "ABT", jax.device_get(arrays), 4), count) for arrays, count in stacks]
            state, metrics = compile_update(state, loss=loss, optimizer=optimizer, clip=1e9)(state, stacks)
        return state.params, metrics

    return update


def test_an_sft_update_is_that_of_rows_of_one_length(updates):
    """Also sharded over eight devices. The step has micro-batches of both lengths."""
    mesh = single_device_mesh()
    examples = examples_of(random_lengths(2, 60))
    loss = functools.partial(sft_micro_loss, GRAPHDEF, dtype="float32")
    (batch,) = batches_of(SFT(epochs=1, rows_per_step=32), examples, mesh)()[0]
    (two,) = batches_of(SFT(epochs=1, rows_per_step=32, short_row_length=16), examples, mesh)()[0]
    whole, facts = to_micro_batches(batch, 4, mesh)
    stacks, new_facts = to_micro_batches(two, 4, mesh)
    assert [arrays["tokens"].shape[2] for arrays, _ in stacks] == [64, 16]
    assert new_facts["trained_tokens"] == facts["trained_tokens"] and new_facts["packed"] > 1.2 * facts["packed"]
    used = sum(int((arrays["segment_ids"][:count] > 0).sum()) for arrays, count in stacks)
    assert new_facts["packed"] == used / sum(arrays["tokens"][:count].size for arrays, count in stacks)
    expected, metrics = updates(loss, whole, mesh)
    assert float(metrics["grad_norm"]) > 0.1
    for on in (mesh, make_mesh(SHARDED)):
        ours, our_metrics = updates(loss, stacks, on)
        assert_same(our_metrics, metrics, atol=1e-5)
        assert_same(ours, expected, atol=1e-6)


def made_groups(seed: int) -> list[Group]:
    rng, groups = np.random.default_rng(seed), []
    for n in range(24):
        prompt = int(rng.integers(1, 8 if n % 3 else 30))
        lengths = rng.integers(1, 5 if n % 3 else 17, 4)
        logp = [rng.normal(-3, 0.3, k).astype(np.float32) for k in lengths]
        samples = [Sample(rng.integers(0, 61, len(x)).tolist(), x, x, "stop") for x in logp]
        rewards = rng.normal(size=4).astype(np.float32)
        tokens = rng.integers(0, 61, prompt).astype(np.int32)
        groups.append(Group(RlPrompt("", tokens, "A"), samples, [""] * 4, rewards, rewards))
    return groups


@pytest.mark.parametrize("share", [True, False])
def test_a_grpo_update_is_that_of_rows_of_one_length(updates, share):
    """Also sharded over eight devices, with sequence ratios, an importance cap and an entropy term."""
    mesh, groups = single_device_mesh(), made_groups(0)
    policy = PolicyLossConfig(ratio="sequence", kl_coef=0.0, entropy_coef=0.1, importance_cap=1.2)
    config = GrpoConfig(
        out="o", dtype="float32", row_length=96, micro_rows=4, max_prompt_length=64, loss=policy, share_prompts=share,
        sampling=SamplingConfig(max_new_tokens=16), aggregation="token",
    )  # fmt: skip
    short = dataclasses.replace(config, short_row_length=32)
    loss = functools.partial(grpo_micro_loss, GRAPHDEF, config, policy_loss, dtype="float32")
    whole, two = (mini_batch(groups, each, skip_unmixed=False) for each in (config, short))
    assert [arrays["tokens"].shape[2] for arrays, _ in two.stacks] == [96, 32]
    assert positions_of(two.stacks) <= positions_of(whole.stacks)
    assert sum(two.lengths) == sum(int((arrays["segment_ids"] > 0).sum()) for arrays, _ in two.stacks)
    for arrays, count in two.stacks:
        assert not arrays["segment_ids"][count:].any() and arrays["segment_ids"][count - 1].any()
    expected, metrics = updates(loss, whole.stacks, mesh)
    assert float(metrics["grad_norm"]) > 0.1
    for on in (mesh, make_mesh(SHARDED)):
        ours, our_metrics = updates(loss, two.stacks, on)
        sums = {"tokens", "ratio_mean", "importance_mean", "entropy", "clip_fraction", "importance_capped"}
        for name, value in metrics.items():
            scale = float(metrics["tokens"]) if name in sums else 1
            np.testing.assert_allclose(our_metrics[name] / scale, value / scale, rtol=0, atol=1e-5, err_msg=name)
        assert_same(ours, expected, atol=1e-6)


def test_short_rows_are_used_only_where_they_save_positions():
    """Groups that all fit into one long micro-batch stay there; none is kept without a group."""
    groups = made_groups(1)
    config = GrpoConfig(
        out="o", row_length=96, short_row_length=32, micro_rows=64, max_prompt_length=64,
        sampling=SamplingConfig(max_new_tokens=16),
    )  # fmt: skip
    ((arrays, count),) = mini_batch(groups, config, skip_unmixed=False).stacks
    assert (arrays["tokens"].shape, count) == ((1, 64, 96), 1)
    unmixed = dataclasses.replace(groups[0], advantages=np.zeros(4, np.float32))
    small = [g for g in groups if len(g.prompt.tokens) < 8 and max(len(s.token_ids) for s in g.samples) < 5]
    ((arrays, count),) = mini_batch(small, config, skip_unmixed=False).stacks
    assert (arrays["tokens"].shape, count) == ((1, 64, 32), 1)
    ((arrays, count),) = mini_batch([unmixed], config, skip_unmixed=True).stacks
    assert (arrays["tokens"].shape, count) == ((1, 64, 96), 1)


def test_a_length_that_does_not_divide():
    with pytest.raises(
        InputError, match="short_row_length=20 must divide row_length=64; 16 does, and null turns it off"
    ):
        SFT(short_row_length=20)
    assert SFT(short_row_length=64).short_rows is None


def resumed(config, train):
    """Train to the end, then again from the checkpoint before the last one; assert that they are bitwise equal."""
    expected, metrics = train(config), metrics_but_timings(config.out)
    shutil.rmtree(max(Path(config.out, "checkpoints").iterdir(), key=lambda path: int(path.name)))
    shutil.rmtree(f"{config.out}/model")
    assert_same(train(config).params, expected.params)
    assert metrics_but_timings(config.out) == metrics
    return metrics


@pytest.mark.slow
def test_a_resumed_sft_run_is_bitwise_the_whole_one(tiny_policy, tmp_path):
    config = SFT(
        out=str(tmp_path / "run"),
        short_row_length=16,
        rows_per_step=2,
        micro_rows=1,
        max_steps=5,
        epochs=9,
        save_every=2,
    )
    examples = examples_of(random_lengths(3, 30))
    metrics = resumed(config, lambda config: sft(config, policy=tiny_policy, examples=examples))
    assert all(row["packed"] > 0.5 for row in metrics)


@pytest.mark.slow
def test_a_resumed_grpo_run_is_bitwise_the_whole_one(tiny_policy, tmp_path):
    config = small_grpo(
        out=str(tmp_path / "run"), row_length=384, short_row_length=128, micro_rows=2, steps=3, save_every=1,
        mini_batch_prompts=2,
    )  # fmt: skip
    resumed(config, lambda config: run("grpo", config, tiny_policy))
    positions = [row["positions"] for row in read_metrics(config.out)]
    assert all(n % (2 * 128) == 0 for n in positions) and any(n % (2 * 384) for n in positions)  # short rows were used
