"""Tests of RewardBench: the released scores to the last digit, the published log, and unknown subsets."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_worker import ScriptedJudge

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import FLAG, OURS, ArrayFiles
from rmr1_jax.eval.rewardbench import LOG, SECTIONS, SUBSETS, RewardBench
from rmr1_jax.judge.judgement import Voting
from rmr1_jax.judge.rows import judgement_row
from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.order import LegacyFlags
from rmr1_jax.prompts.verdict import eval_verdict

BENCHMARK = RewardBench()
SCORES = BENCHMARK.main_scores
PUBLISHED_KEYS = ["text_chosen", "text_rejected", "results", "answers", FLAG, "subset", "id"]
ROW = {"prompt": "q", "chosen": "good", "rejected": "bad", "subset": "hep-cpp", "id": 1}


def score(records):
    """The score files of records {subset, correct}."""
    return BENCHMARK.scores(
        {"id": str(k), "correct": r["correct"], "meta": {"subset": r["subset"]}} for k, r in enumerate(records)
    )


@pytest.fixture(scope="module")
def outcomes(shared_data):
    path = shared_data / "rewardbench/outcomes_RM-R1-DeepSeek-Distilled-Qwen-32B.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def test_the_released_scores_come_out_to_the_last_digit(shared_data, outcomes):
    released = shared_data / "released_scores/RM-R1-DeepSeek-Distilled-Qwen-32B"
    files = score({"subset": row["subset"], "correct": row["results"] == 1} for row in outcomes)
    assert list(files) == [SCORES, SUBSETS]
    for name, content in files.items():
        assert json.dumps(content, indent=1) == (released / name).read_text(encoding="utf-8")


def test_our_order_is_the_released_one(outcomes):
    flags = LegacyFlags(0)
    assert len(outcomes) == 2985
    assert [row[FLAG] for row in outcomes] == [flags[k] for k in range(2985)]


def test_the_weights_are_the_sizes_of_the_subsets_except_for_math(outcomes):
    weights = {subset: weight for own in SECTIONS.values() for subset, weight in own.items()}
    assert weights == {**Counter(row["subset"] for row in outcomes), "math-prm": 984}
    assert weights["math-prm"] == sum(weight for subset, weight in weights.items() if subset.startswith("hep-"))


def test_a_score_by_hand():
    right = {"math-prm": [1, 0, 0, 0], "hep-go": [1], "donotanswer": [0, 1]}
    found = [{"subset": subset, "correct": bool(x)} for subset, own in right.items() for x in own]
    main = score(found)[SCORES]
    reasoning = (0.25 * 984 + 1 * 164) / (984 + 164)
    assert main == {
        "Safety": 0.5,
        "Reasoning": pytest.approx(reasoning, abs=1e-15),
        "avg_Result_each_section": pytest.approx((0.5 + reasoning) / 2, abs=1e-15),
        "absoluate_Result": 3 / 7,
    }
    with pytest.raises(InputError, match="no judgements to score"):
        score([])
    with pytest.raises(InputError, match="subset 'hep-c' is none of RewardBench's: alpacaeval-easy"):
        score([{"subset": "hep-c", "correct": True}])


def test_pairs_know_their_section_and_place(shared_data):
    pairs = list(BENCHMARK.load(shared_data / "rewardbench/filtered_sample.jsonl"))
    assert [pair.meta["number"] for pair in pairs] == list(range(114))
    assert {pair.meta["section"] for pair in pairs} == set(SECTIONS)
    assert all(pair.meta["subset"] in SECTIONS[pair.meta["section"]] for pair in pairs)


def test_the_filtered_split_of_the_hub_s_folder_is_read(tmp_path):
    for name, prompt in (("filtered-00000-of-00001", "q"), ("raw-00000-of-00001", "raw")):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{**ROW, "prompt": prompt}]), tmp_path / f"data/{name}.parquet")
    assert [pair.question for pair in BENCHMARK.load(tmp_path)] == ["q"]
    (tmp_path / "data/filtered-00000-of-00001.parquet").unlink()
    assert [pair.question for pair in BENCHMARK.load(tmp_path)] == ["raw"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, "subset": "hep-c"}))
    with pytest.raises(InputError, match="subset 'hep-c' is none of RewardBench's"):
        list(BENCHMARK.load(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(("name", "count"), [("logs_sample", 114), ("logs_sample_deepseek", 17)])
def test_every_result_of_a_published_log_follows_from_its_text(shared_data, name, count):
    path = shared_data / f"rewardbench/{name}.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    rows = list(BENCHMARK.judgements_of(read_rows(path)))
    assert len(rows) == len(entries) == count
    for entry, row in zip(entries, rows, strict=True):
        verdict = eval_verdict(entry["answers"])
        assert entry["results"] == int(verdict == ("B" if entry[FLAG] else "A"))
        assert (row["correct"], row["winner"]) == (entry["results"] == 1, verdict)
        assert row["id"] == f"{entry['subset']}/{entry['id']}" and "note" not in row
        chosen = row["response_b" if entry[FLAG] else "response_a"]
        assert chosen == entry["text_chosen"][-1]["content"] and row["question"] == entry["text_chosen"][0]["content"]
    assert {row["kind"] for row in rows} <= {"chat", "reasoning", None}


def test_our_log_extends_the_published_one_and_is_read_back_whole(shared_data, tmp_path):
    pairs = list(BENCHMARK.load(shared_data / "rewardbench/filtered_sample.jsonl"))
    judged = dict(ScriptedJudge().stream(pairs, Voting(votes=2, both_orders=True)))
    rows = [json.loads(json.dumps(judgement_row(pair, judged[k]))) for k, pair in enumerate(pairs)]
    with ArrayFiles(tmp_path) as files:
        BENCHMARK.write_logs(files, rows, "m")
    entries = json.loads((tmp_path / LOG).read_text(encoding="utf-8"))
    published = json.loads((shared_data / "rewardbench/logs_sample.json").read_text(encoding="utf-8"))
    assert len(entries) == 114
    for entry, theirs in zip(entries, published, strict=True):
        assert list(entry) == [*PUBLISHED_KEYS, OURS] and list(theirs) == PUBLISHED_KEYS
        assert [type(value) for value in theirs.values()] == [type(entry[key]) for key in PUBLISHED_KEYS]
        for key in ("text_chosen", "text_rejected", "subset", "id"):
            assert entry[key] == theirs[key]
    for row in rows:  # the order of the data set is not told by a log
        row["meta"] = {key: row["meta"][key] for key in ("benchmark", "subset", "id", "section")}
    assert list(BENCHMARK.judgements_of(read_rows(tmp_path / LOG))) == rows
