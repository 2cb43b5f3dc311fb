"""Tests of RMB: best-of-N by hand, the released mean of the four sets, their A/B orders, the published logs."""

import json
import shutil

import pytest
from eval_worker import ScriptedJudge

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import FLAG, OURS, ArrayFiles
from rmr1_jax.eval.rmb import SETS, Rmb, meta_result, set_of
from rmr1_jax.judge.judgement import Voting
from rmr1_jax.judge.rows import judgement_row
from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.order import LegacyFlags
from rmr1_jax.prompts.verdict import eval_verdict

BENCHMARK = Rmb()
SCORES = BENCHMARK.main_scores
BON, PAIRWISE = "BoN_set/Helpfulness/Chat", "Pairwise_set/Harmlessness/S1"
RUN = "rmb/logs/RM-R1-DeepSeek-Distilled-Qwen-32B"


def score(records):
    """The score files of records, whose fields but `correct` are a row's meta."""
    return BENCHMARK.scores({"id": str(k), "correct": r["correct"], "meta": r} for k, r in enumerate(records))


@pytest.fixture
def data(shared_data, tmp_path):
    """The two shared sets without the logs beside them."""
    for name in ("BoN_set", "Pairwise_set"):
        shutil.copytree(shared_data / "rmb" / name, tmp_path / "data" / name)
    return tmp_path / "data"


def test_the_released_mean_of_the_four_sets(shared_data):
    released = shared_data / "released_scores/RM-R1-DeepSeek-Distilled-Qwen-32B"
    files = {
        str(path.relative_to(released)): json.loads(path.read_text(encoding="utf-8"))
        for path in released.glob("RMB/*/score_result/Final_score.json")
    }
    assert len(files) == 4
    assert json.dumps(meta_result(files), indent=1) == (released / SCORES).read_text(encoding="utf-8")


def test_an_item_is_right_only_if_all_its_comparisons_are():
    found = {
        f"{BON}/a": {"1": [1, 1], "2": [1, 0, 1]},
        f"{BON}/b": {"1": [1]},
        f"{PAIRWISE}": {"1": [1], "2": [0], "3": [1], "4": [1]},
    }
    made = [
        {"category": category, "item": item, "correct": bool(x)}
        for category, items in found.items()
        for item, own in items.items()
        for x in own
    ]
    files = score(reversed(made))
    assert files == {
        "RMB/Pairwise_set_Harmlessness/score_result/Final_score.json": [{"Overall_accuracy": 0.75}, {PAIRWISE: 0.75}],
        "RMB/BoN_set_Helpfulness/score_result/Final_score.json": [
            {
                "Absolute Accuracy (all correct / all)": 5 / 6,
                "BoN Final Accuracy": 2 / 3,
                "BoN Absolute Number of Correct": 2,
                "BoN Absolute Total Numbers": 3,
            },
            {f"{BON}/a": 0.5, f"{BON}/b": 1.0},
        ],
        SCORES: {"Pairwise Harmlessness": 0.75, "BoN Helpfulness": 2 / 3},  # two of the sets: no mean
    }
    made += [{"category": "/".join(parts), "item": "x", "correct": True} for parts in SETS.values()]
    whole = score(made)[SCORES]
    assert list(whole) == [*SETS, "Accuracy Averaged from Four Sections"]
    assert whole["Accuracy Averaged from Four Sections"] == pytest.approx((1 + 4 / 5 + 3 / 4 + 1) / 4, abs=1e-15)
    with pytest.raises(InputError, match="no judgements to score"):
        score([])


def test_score_files_look_like_the_released_ones(shared_data):
    released = shared_data / "released_scores/RM-R1-DeepSeek-Distilled-Qwen-32B"
    for parts in SETS.values():
        name = f"RMB/{'_'.join(parts)}/score_result/Final_score.json"
        overall, categories = json.loads((released / name).read_text(encoding="utf-8"))
        ours = score([{"category": category, "item": "1", "correct": True} for category in categories])[name]
        assert (list(ours[0]), list(ours[1])) == (list(overall), list(categories))


def test_an_unknown_category_is_refused():
    assert set_of("BoN_set/Harmlessness/S10") == "BoN Harmlessness"
    with pytest.raises(InputError, match="category_path 'Best/Helpfulness' is none of RMB's: Pairwise_set/Helpfulness"):
        set_of("Best/Helpfulness")


def test_the_order_of_each_set_is_drawn_by_itself(data):
    pairs = list(BENCHMARK.load(data))
    assert [pair.meta["number"] for pair in pairs] == list(range(len(pairs)))
    flags, sections = LegacyFlags(0), [pair.meta["section"] for pair in pairs]
    assert sections == sorted(sections, reverse=True) and set(sections) == {"Pairwise Helpfulness", "BoN Helpfulness"}
    for name in set(sections):
        own = [pair for pair in pairs if pair.meta["section"] == name]
        assert [pair.better == "B" for pair in own] == [flags[k] for k in range(len(own))]
    alone = list(BENCHMARK.load(data / "BoN_set/Helpfulness"))
    assert [pair.better for pair in alone] == [pair.better for pair in pairs if pair.meta["kind"] == "best-of-n"]
    (one,) = data.rglob("BoN_set/*/Rewrite/Paraphrasing.json")
    assert {pair.meta["category"] for pair in BENCHMARK.load(one)} == {"BoN_set/Helpfulness/Rewrite/Paraphrasing"}
    assert [pair.id for pair in BENCHMARK.load(one)] == [pair.id for pair in BENCHMARK.load(one.parent)]


@pytest.mark.parametrize("name", ["Pairwise_set_Helpfulness/logs.json", "BoN_set_Helpfulness/raw_logs.json"])
def test_every_result_of_the_published_logs_follows_from_its_text(shared_data, name):
    path = shared_data / RUN / name
    entries = json.loads(path.read_text(encoding="utf-8"))
    rows = list(BENCHMARK.judgements_of(read_rows(path)))
    for entry, row in zip(entries, rows, strict=True):
        verdict = eval_verdict(entry["answers"])
        assert entry["results"] == int(verdict == ("B" if entry[FLAG] else "A"))
        assert (row["correct"], row["winner"], row["meta"]["category"]) == (
            entry["results"] == 1,
            verdict,
            entry["category_path"],
        )
        assert "note" not in row
    assert len({row["id"] for row in rows}) == len(rows)


def test_our_logs_extend_the_published_ones_and_are_read_back_whole(shared_data, data, tmp_path):
    pairs = list(BENCHMARK.load(data))
    judged = dict(ScriptedJudge().stream(pairs, Voting()))
    rows = [json.loads(json.dumps(judgement_row(pair, judged[k]))) for k, pair in enumerate(pairs)]
    with ArrayFiles(tmp_path) as files:
        BENCHMARK.write_logs(files, rows, "m")
    back = []
    for name in ("Pairwise_set_Helpfulness/logs.json", "BoN_set_Helpfulness/raw_logs.json"):
        theirs = json.loads((shared_data / RUN / name).read_text(encoding="utf-8"))
        entries = json.loads((tmp_path / "RMB" / name).read_text(encoding="utf-8"))
        assert list(entries[0]) == [*theirs[0], OURS]
        assert [type(entries[0][key]) for key in theirs[0]] == [type(value) for value in theirs[0].values()]
        assert list(theirs[0]["text_chosen"][0]) == list(entries[0]["text_chosen"][0])
        back += BENCHMARK.judgements_of(read_rows(tmp_path / "RMB" / name))
    assert [entry["idx"] for entry in entries[:7]] == [0, 0, 1, 1, 2, 2, 3]  # losers of one item have one number
    assert {len(entry["text_chosen"]) for entry in entries} > {2}  # conversations of several turns are whole
    for row in rows:
        row["meta"] = {key: row["meta"][key] for key in ("benchmark", "kind", "category", "item", "section")}
    assert back == rows
