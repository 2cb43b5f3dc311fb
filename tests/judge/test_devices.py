"""Tests that a judge on all devices of a process decides what one device decides, and keeps all of them busy."""

import json

import numpy as np
import pytest
from policies import tiny_policy
from scalar_models import their_model, written
from training import small_sft

from rmr1_jax.cli import main as cli
from rmr1_jax.data.examples import sft_example
from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.judge.judge import Judge
from rmr1_jax.judge.scalar import ScalarJudge, load_scalar
from rmr1_jax.pairs.pair import render_pair
from rmr1_jax.policy import load
from rmr1_jax.prompts.prompt import save_prompt
from rmr1_jax.quickstart.world import make_items, oracle_trace, to_pair, world_prompt
from rmr1_jax.train.optim import OptimConfig
from rmr1_jax.train.sft import sft

LAYOUTS = {1: "data 8 x tensor 1", 2: "data 4 x tensor 2", 4: "data 2 x tensor 4", 8: "data 1 x tensor 8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny judge that has learned to write traces, so that most of its verdicts are valid."""
    policy, out = tiny_policy(), tmp_path_factory.mktemp("judge")
    prompt, items = world_prompt(), make_items(24, split="sft")
    rows = [sft_example(policy.tokenizer, i.id, render_pair(prompt, to_pair(i)), oracle_trace(i)) for i in items]
    optimizer = OptimConfig(lr=2e-2, schedule="constant", warmup_ratio=0.0)
    config = small_sft(out=str(out), max_steps=60, rows_per_step=4, micro_rows=4, optimizer=optimizer)
    sft(config, policy=policy, examples=rows)
    return out / "model"


@pytest.fixture(scope="module")
def pairs():
    return [to_pair(item) for item in make_items(64, split="dev")]


def judged(policy, pairs, **options):
    # Sums over split heads round otherwise (log-probabilities differ by up to 1.2e-5), so that one of 10,000 draws
    # may be decided by rounding where two tokens tie. In seed 3 none is.
    return Judge(policy, world_prompt(), max_new_tokens=96, **options).compare_many(pairs, votes=2, seed=3)


@pytest.fixture(scope="module")
def expected(model, pairs):
    found = judged(load(model, "float32", single_device_mesh()), pairs)
    assert {"A", "B"} <= {j.winner for j in found} and len({j.text for j in found}) > 32
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tensor", LAYOUTS)
def test_eight_devices_judge_as_one_does(model, pairs, expected, tensor):
    """The model has four heads and two key-value heads: a tensor axis of 4 splits the former alone, 8 neither."""
    policy = load(model, "float32", tensor=tensor)
    assert policy.mesh.size == 8 and policy.mesh.shape["tensor"] == tensor
    found = judged(policy, pairs)
    assert [(j.winner, j.status, j.votes, j.texts) for j in found] == [
        (j.winner, j.status, j.votes, j.texts) for j in expected
    ]
    assert policy.stats.samples == 128 and f"on 8 devices ({LAYOUTS[tensor]})" in policy.stats_text()


@pytest.mark.slow
def test_64_pairs_keep_eight_banks_busy(model, pairs):
    """Two slots a bank, so that pairs wait until the end: hardly a slot is idle meanwhile, and no bank is spared."""
    policy = load(model, "float32")
    Judge(policy, world_prompt(), max_new_tokens=96, slots=16).compare_many(pairs, seed=1)
    stats = policy.stats
    assert stats.samples == 64 and stats.slots == 16
    assert stats.busy_new_tokens > 0.5 * stats.new_tokens
    assert stats.occupancy > 0.7


@pytest.mark.parametrize("tensor", LAYOUTS)
def test_eight_devices_score_as_one_does(tmp_path, pairs, tensor):
    directory = written(tmp_path, their_model())
    one, eight = (
        load_scalar(directory, "float32", single_device_mesh()),
        load_scalar(directory, "float32", tensor=tensor),
    )
    assert eight.mesh.size == 8 and eight.mesh.shape["tensor"] == tensor
    ours, theirs = (ScalarJudge(each).compare_many(pairs[:12]) for each in (eight, one))
    np.testing.assert_allclose([j.scores for j in ours], [j.scores for j in theirs], rtol=0, atol=1e-5)
    assert [j.winner for j in ours] == [j.winner for j in theirs]


def test_the_command_says_what_it_used(tmp_path, capsys):
    tiny_policy().save(tmp_path / "model")
    save_prompt(world_prompt(), tmp_path / "prompt.yaml")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for item in make_items(6, split="dev"):
            row = {k: getattr(item, k) for k in ("id", "question", "response_a", "response_b", "better")}
            file.write(json.dumps(row) + "\n")
    paths = ["--model", "model", "--input", "pairs.jsonl", "--prompt", "prompt.yaml"]
    paths = [part if part.startswith("--") else str(tmp_path / part) for part in paths]
    command = ["judge", *paths, "--dtype", "float32", "--max-new-tokens", "6", "--output", str(tmp_path / "v.jsonl")]
    assert cli.main([*command, "--tensor", "3"]) == 2
    assert "tensor=3 does not divide the 8 devices" in capsys.readouterr().err
    assert cli.main([*command, "--tensor", "4", "--slots", "2"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("sampled 6 texts, "))
    assert "on 8 devices (data 2 x tensor 4), occupancy " in line
    assert cli.main(command) == 0  # nothing is left to sample
    assert "sampled" not in capsys.readouterr().err
