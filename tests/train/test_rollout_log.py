"""rollouts.jsonl: which texts it holds, its keys, and that a continued run doubles no line."""

import dataclasses
import json

import numpy as np
from training import small_grpo

from rmr1_jax.quickstart.world import make_items, to_pair
from rmr1_jax.sampler.sample import Sample
from rmr1_jax.train.rollout import Group, RlPrompt
from rmr1_jax.train.rollout_log import RolloutLog

RIGHT, BOTH, BARE = "so <answer>[[A]]</answer>", "[[A]] or [[B]]", "no idea"


def group(name: str, texts: list[str], meta=None, reason="stop") -> Group:
    samples = [Sample(list(range(len(t))), *np.zeros((2, len(t)), np.float32), reason) for t in texts]
    rewards = np.arange(len(texts), dtype=np.float32)
    return Group(RlPrompt(name, np.arange(5, 9, dtype=np.int32), "A", meta), samples, texts, rewards, rewards)


def lines(config) -> list[dict]:
    with open(f"{config.out}/rollouts.jsonl") as file:
        return [json.loads(line) for line in file]


def test_one_text_of_each_group_comes_first(tmp_path, tiny_policy):
    pair = to_pair(make_items(1, split="grpo")[0])
    groups = [group("p", [RIGHT, BOTH], pair), group("q", [BOTH, RIGHT]), group("r", [BARE, BARE], reason="length")]
    config = small_grpo(out=str(tmp_path), log_rollouts=4)
    RolloutLog(config, tiny_policy.tokenizer, 0).write(7, groups)
    first, second, third, fourth = lines(config)
    assert first == {
        "step": 7,
        "id": "p",
        "question": pair.question,
        "response_a": pair.response_a,
        "response_b": pair.response_b,
        "better": "A",
        "text": RIGHT,
        "reward": 0.0,
        "verdict": "A",
        "status": "ok",
        "new_tokens": len(RIGHT),
        "finish_reason": "stop",
    }
    assert second["prompt"] == tiny_policy.tokenizer.decode(range(5, 9)) and "question" not in second
    assert (second["id"], second["verdict"], second["status"], second["reason"]) == (
        "q",
        None,
        "invalid",
        "several_verdicts",
    )
    assert (third["id"], third["reason"], third["finish_reason"]) == ("r", "cut_off", "length")
    assert (fourth["id"], fourth["text"], fourth["reward"]) == ("p", BOTH, 1.0)


def test_a_continued_run_writes_each_line_once(tmp_path, tiny_policy):
    config = small_grpo(out=str(tmp_path), log_rollouts=2)
    for start, end in ((0, 4), (2, 6)):
        log = RolloutLog(config, tiny_policy.tokenizer, start)
        for step in range(start, end):
            log.write(step, [group(f"{start}-{step}", [RIGHT] * 3)])
    assert [row["id"] for row in lines(config)[::2]] == ["0-0", "0-1", "2-2", "2-3", "2-4", "2-5"]
    assert len(lines(config)) == 12


def test_none_are_written_if_none_are_asked_for(tmp_path, tiny_policy, capsys):
    RolloutLog(small_grpo(out=str(tmp_path), log_rollouts=0), tiny_policy.tokenizer, 0).write(0, [group("p", [RIGHT])])
    assert not (tmp_path / "rollouts.jsonl").exists() and not capsys.readouterr().err


def test_one_text_is_shown_now_and_then(tmp_path, tiny_policy, capsys):
    config = small_grpo(out=str(tmp_path), show_rollout_every=2)
    log = RolloutLog(config, tiny_policy.tokenizer, 0)
    for step in range(3):
        log.write(step, [group(f"p{step}", ["\x1b[2Jthink\n" + "long " * 200 + RIGHT])])
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if line.startswith("step")] == [
        f"step {step}, p{step}: reward 0, verdict A, better A, 1035 tokens" for step in (0, 2)
    ]
    assert len(shown) == 4
    assert shown[1].startswith("  \ufffd[2Jthink long ") and shown[1].endswith(RIGHT) and len(shown[1]) < 320
    silent = dataclasses.replace(config, show_rollout_every=0)
    RolloutLog(silent, tiny_policy.tokenizer, 3).write(4, [group("p", [BARE])])
    assert not capsys.readouterr().err
