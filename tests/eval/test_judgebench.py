"""Tests of JudgeBench: both orders settled as published, the published log written and read, unknown sources."""

import itertools
import json

import pytest
from eval_worker import ScriptedJudge, run_benchmark

from rmr1_jax.errors import InputError
from rmr1_jax.eval.evaluate import score_logs
from rmr1_jax.eval.judgebench import LOG, SOURCES, JudgeBench
from rmr1_jax.eval.logs import log_files
from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.rows import BadRow

BENCHMARK = JudgeBench()
SCORES = BENCHMARK.main_scores
ROW = {
    "pair_id": "p",
    "original_id": 1,
    "source": "mmlu-pro-law",
    "question": "q",
    "response_model": "gpt-4o-2024-05-13",
    "response_A": "right",
    "response_B": "wrong",
    "label": "A>B",
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    sources = ("mmlu-pro-law", "mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench")
    rows = [
        {**ROW, "pair_id": f"p{k}", "source": sources[k % 5], "question": f"q{k}", "label": ("A>B", "B>A")[k // 5 % 2]}
        for k in range(40)
    ]
    return write_rows(tmp_path / "dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl", rows)


def test_pairs_are_shown_in_the_order_of_the_data(data):
    pairs = list(BENCHMARK.load(data))
    assert [pair.better for pair in pairs] == [*"AAAAABBBBB"] * 4
    assert {(pair.response_a, pair.response_b) for pair in pairs} == {("right", "wrong")}
    assert (pairs[3].id, pairs[3].meta["section"]) == ("gpt-4o-2024-05-13/p3", "livebench-math")
    for change, reason in (({"label": "A=B"}, "expected 'A>B' or 'B>A'"), ({"question": None}, "expected a text")):
        with pytest.raises(BadRow, match=reason):
            list(BENCHMARK.load(write_rows(data, [{**ROW, **change}])))
    with pytest.raises(InputError, match="'trivia' is none of JudgeBench's: mmlu-pro, "):
        list(BENCHMARK.load(write_rows(data, [{**ROW, "source": "trivia"}])))


def published_accuracy(entries):
    """The rule as published: one point for each decision that names the right answer, minus one for the wrong."""
    flip = {"A>B": "B>A", "B>A": "A>B"}
    right = 0
    for entry in entries:
        first, second = (judgment and judgment["decision"] for judgment in entry["judgments"])
        decisions = (first, flip.get(second, second))
        wrong = flip[entry["label"]]
        right += sum((d == entry["label"]) - (d == wrong) for d in decisions) > 0
    return right / len(entries)


def test_all_pairs_of_decisions_count_as_published(tmp_path):
    decisions = ("A>B", "B>A", "A=B", None, "absent")
    entries = []
    for k, (label, first, second) in enumerate(itertools.product(("A>B", "B>A"), decisions, decisions)):
        judgments = [
            None if d == "absent" else {"judgment": {"response": f"I say {d}"}, "decision": d} for d in (first, second)
        ]
        entries.append({**ROW, "pair_id": f"p{k}", "label": label, "judge_name": "vanilla", "judgments": judgments})
    path = write_rows(tmp_path / "dataset=judgebench,response_model=m,judge_name=vanilla,judge_model=x.jsonl", entries)
    scores, failures = score_logs("judgebench", tmp_path, tmp_path / "out")
    assert failures == [] and scores[SCORES]["overall"] == published_accuracy(entries) == 14 / 50
    rows = list(BENCHMARK.judgements_of(read_rows(path)))
    for entry, row in zip(entries, rows, strict=True):
        assert row["correct"] == bool(published_accuracy([entry]))
    assert rows[1]["verdicts"] == [["A"], ["A"]] and rows[1]["texts"] == [["I say A>B"], ["I say B>A"]]


def test_our_log_extends_the_published_one_and_is_read_back(data, tmp_path):
    out = tmp_path / "out"
    _, scores = run_benchmark("judgebench", ScriptedJudge(), data, out, name="m", both_orders=True)
    (log,) = log_files(out / "JudgeBench", BENCHMARK.log_names)
    assert log == out / LOG.format(answers=ROW["response_model"], model="m")
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert list(entries[0]) == [*ROW, "judge_name", "judgments", "rmr1"]
    assert scores[SCORES]["overall"] == published_accuracy(entries) and list(scores[SCORES]) == [*SOURCES, "overall"]
    for source in SOURCES:
        own = [entry for entry in entries if entry["source"].startswith(source)]
        assert scores[SCORES][source] == published_accuracy(own)
    assert 0.4 < scores[SCORES]["overall"] < 1
    rows = [json.loads(line) for line in (out / "judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["meta"]["number"]
    assert list(BENCHMARK.judgements_of(read_rows(log))) == rows
    assert json.loads((out / "summary.json").read_text())["headline"] == pytest.approx(100 * scores[SCORES]["overall"])
    with pytest.raises(InputError, match="no judgements to score"):
        BENCHMARK.scores([])
