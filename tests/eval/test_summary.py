"""Tests of the summary against numbers worked out by hand and against SciPy."""

import itertools
import json
import tracemalloc
from datetime import UTC, datetime

import numpy as np
import pytest
from scipy import stats as scipy_stats

import rmr1_jax
from rmr1_jax.errors import InputError
from rmr1_jax.eval.rewardbench import SECTIONS
from rmr1_jax.eval.rm_bench import RmBench
from rmr1_jax.eval.summary import summarize, write_summary

_OTHER = {"A": "B", "B": "A"}


def row(id="1", correct=True, *, better="A", meta=None, verdicts=None, tokens=None, **changes):
    winner = better if correct else _OTHER[better]
    return {
        "id": id,
        "better": better,
        "winner": winner,
        "status": "ok",
        "correct": correct,
        "question": "?",
        "response_a": "a" * 10,
        "response_b": "b" * 20,
        "meta": {"benchmark": "rewardbench", "subset": "mt-bench-hard"} if meta is None else meta,
        "kind": "chat",
        "texts": [["text"]],
        "verdicts": [[winner]] if verdicts is None else verdicts,
        "tokens": [[100]] if tokens is None else tokens,
    } | changes


def rm_bench_rows(matrix, domain="chat", item=0):
    """The nine rows of an item; matrix[i][j]: whether chosen style i beat rejected style j."""
    for file, i in itertools.product(range(3), range(3)):
        j = (i + file) % 3
        meta = {"benchmark": "rm-bench", "item": str(item), "domain": domain, "file": file + 1}
        meta |= {"chosen_style": i, "rejected_style": j}
        yield row(f"{item}#{i}-{j}", bool(matrix[i][j]), meta=meta)


def rmb_rows(kind, goal, outcomes, item=0):
    folder = {"pairwise": "Pairwise_set", "best-of-n": "BoN_set"}[kind]
    meta = {"benchmark": "rmb", "kind": kind, "category": f"{folder}/{goal}/Rewrite", "item": f"{goal}#{item}"}
    return [row(f"{kind}{goal}{item}-{k}", right, meta=meta) for k, right in enumerate(outcomes)]


def by_name(groups):
    return {group["name"]: (group["n"], group["accuracy"]) for group in groups}


def test_rewardbench_weighs_subsets_by_the_published_table():
    """math-prm has the weight 984 and hep-python 164, whatever the number of rows: (984 x 0.5 + 164 x 1) / 1148."""
    subsets = {"math-prm": [1, 0], "hep-python": [1, 1, 1, 1], "mt-bench-hard": [1, 0, 0, 0]}
    rows = [
        row(f"{subset}{k}", bool(right), meta={"benchmark": "rewardbench", "subset": subset})
        for subset, outcomes in subsets.items()
        for k, right in enumerate(outcomes)
    ]
    found = summarize(rows, {}, {"Reasoning": 0.5})
    reasoning = (984 * 0.5 + 164) / 1148
    assert found["headline"] == pytest.approx(100 * (reasoning + 0.25) / 2, abs=1e-9)
    assert by_name(found["sections"]) == {"Chat Hard": (4, 25.0), "Reasoning": (6, pytest.approx(100 * reasoning))}
    assert found["accuracy"] == pytest.approx(60) and found["n"] == 10 and found["scores"] == {"Reasoning": 0.5}
    assert by_name(found["subsets"])["math-prm"] == (2, 50.0)


def test_the_score_and_interval_of_a_released_run(shared_data):
    """All 2,985 published outcomes: score and sections as released; the interval as SciPy's
    Jeffreys interval of as many independent pairs as have a mean of this variance."""
    table = json.loads((shared_data / "rewardbench/outcomes_RM-R1-DeepSeek-Distilled-Qwen-32B.json").read_text())
    outcomes = [dict(zip(table["columns"], values, strict=True)) for values in table["rows"]]
    meta = [{"benchmark": "rewardbench", "subset": outcome["subset"]} for outcome in outcomes]
    rows = [row(str(k), o["results"] == 1, meta=m) for k, (o, m) in enumerate(zip(outcomes, meta, strict=True))]
    found = summarize(rows, {}, {})
    run = shared_data / "released_scores/RM-R1-DeepSeek-Distilled-Qwen-32B"
    released = json.loads((run / "reward_bench/score_result/main_score.json").read_text())
    assert found["n"] == 2985
    assert found["headline"] == pytest.approx(100 * released["avg_Result_each_section"], abs=1e-9)
    assert found["accuracy"] == pytest.approx(100 * released["absoluate_Result"], abs=1e-9)
    for section in found["sections"]:
        assert section["accuracy"] == pytest.approx(100 * released[section["name"]], abs=1e-9)

    variance = 0.0  # of a weighted sum of subsets' means
    for weights in SECTIONS.values():
        for subset, weight in weights.items():
            right = np.array([o["results"] for o in outcomes if o["subset"] == subset])
            variance += (weight / sum(weights.values()) / 4) ** 2 * right.var() / len(right)
    share = found["headline"] / 100
    n = share * (1 - share) / variance
    wanted = 100 * scipy_stats.beta(n * share + 0.5, n * (1 - share) + 0.5).ppf([0.025, 0.975])
    assert found["interval"] == pytest.approx(wanted, abs=0.05)


def test_rm_bench_counts_items_cells_and_difficulties():
    chat = [[1, 0, 0], [1, 1, 0], [1, 1, 0]]  # hard 0 of 3, normal 2 of 3, easy 3 of 3
    maths = [[1, 1, 1], [0, 0, 1], [0, 0, 0]]  # hard 3, normal 1, easy 0
    rows = [*rm_bench_rows(chat), *rm_bench_rows(maths, "math", 1)]
    found = summarize(rows, {}, {})
    assert found["headline"] == pytest.approx(100 * (5 / 9 + 4 / 9) / 2)
    sections = by_name(found["sections"])
    assert sections["chat"] == (1, pytest.approx(500 / 9)) and sections["math"] == (1, pytest.approx(400 / 9))
    assert [sections[name][1] for name in ("hard", "normal", "easy")] == pytest.approx([50, 50, 50])
    assert found["styles"] == {
        "chat": [[100 * x for x in line] for line in chat],
        "math": [[100 * x for x in line] for line in maths],
    }


def test_the_released_scorer_reads_file_three_for_file_two():
    matrix = [[1, 0, 1], [1, 1, 0], [0, 1, 1]]  # file 2 is (0,1), (1,2), (2,0): all wrong; the rest is right
    assert summarize(rm_bench_rows(matrix), {}, {})["headline"] == pytest.approx(600 / 9)
    slipped = summarize(rm_bench_rows(matrix), {}, {}, scoring=RmBench(released=True))
    assert slipped["headline"] == pytest.approx(100) and slipped["styles"]["chat"] == [[100.0] * 3] * 3


def test_safety_is_one_domain():
    rows = [*rm_bench_rows([[1] * 3] * 3, "safety-refuse"), *rm_bench_rows([[0] * 3] * 3, "safety-response", 1)]
    assert by_name(summarize(rows, {}, {})["sections"])["safety"] == (2, 50.0)


def test_a_best_of_n_item_is_right_only_if_all_its_pairs_are():
    rows = [
        *rmb_rows("best-of-n", "Helpfulness", [1, 1, 1]),
        *rmb_rows("best-of-n", "Helpfulness", [1, 1, 0], item=1),
        *rmb_rows("pairwise", "Harmlessness", [1]),
    ]
    found = summarize(rows, {}, {})
    assert by_name(found["sections"]) == {"Pairwise Harmlessness": (1, 100.0), "BoN Helpfulness": (2, 50.0)}
    assert found["headline"] == pytest.approx(75)
    assert found["accuracy"] == pytest.approx(600 / 7)


def test_the_interval_of_the_headline_equals_scipy_s():
    """Two domains of a size that differs, items of nine pairs, against scipy.stats.bootstrap over the same items. With
    1,100 items the prior no longer matters."""
    rng = np.random.default_rng(0)
    chances = {domain: rng.beta(2, 1, (n, 1, 1)) for domain, n in (("chat", 800), ("math", 300))}
    matrices = {domain: rng.random((len(chance), 3, 3)) < chance for domain, chance in chances.items()}
    rows = (
        row_
        for domain, items in matrices.items()
        for number, matrix in enumerate(items)
        for row_ in rm_bench_rows(matrix.tolist(), domain, number)
    )
    found = summarize(rows, {}, {})
    samples = [items.mean((1, 2)) for items in matrices.values()]
    wanted = scipy_stats.bootstrap(
        samples,
        lambda a, b, axis: (a.mean(axis) + b.mean(axis)) / 2,
        n_resamples=20_000,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found["interval"] == pytest.approx([100 * wanted.low, 100 * wanted.high], abs=0.25)
    assert found["interval"][1] - found["interval"][0] > 3


def test_one_item_in_each_subset_has_an_interval_with_a_width():
    """As of `rmr1 eval --limit`: a bootstrap has no variance there."""
    rows = [
        row(str(k), k == 1, meta={"benchmark": "rewardbench", "subset": s})
        for k, s in enumerate(["hep-go", "donotanswer", "mt-bench-hard"])
    ]
    found = summarize(rows, {}, {})
    assert found["headline"] == pytest.approx(100 / 3) and found["items"] == 3
    assert found["interval"] == pytest.approx([100 * x for x in scipy_stats.beta(1.6, 2.6).ppf([0.025, 0.975])])
    assert [(s["n"], s["interval"]) for s in found["sections"]] == [
        (1, pytest.approx(wanted)) for wanted in ([0, 95], [5, 100], [0, 95])
    ]


def test_groups_have_the_interval_of_a_share():
    rows = [row(str(k), k < 7, kind="reasoning" if k < 8 else None) for k in range(10)]
    kinds = {group["name"]: group for group in summarize(rows, {}, {})["by_kind"]}
    assert (kinds["reasoning"]["n"], kinds["none"]["n"]) == (8, 2)
    assert kinds["reasoning"]["interval"] == pytest.approx(
        100 * scipy_stats.beta(7.6, 1.6).ppf([0.025, 0.975]), abs=1e-9
    )


def test_lengths():
    rows = [
        row("1", True, better="B", tokens=[[100, 200]], verdicts=[["B", "B"]]),  # b is the longer one
        row("2", False, better="A", tokens=[[512]]),
        row("3", True, response_a="a" * 400, response_b="b" * 600, tokens=[[9000]]),
        row("4", False, response_a="a" * 5, response_b="b" * 5, tokens=[]),
    ]
    found = by_name(summarize(rows, {}, {})["by_length"])
    assert found == {
        "answers: under 500 characters": (3, pytest.approx(100 / 3)),
        "answers: 1,000 to 2,000 characters": (1, 100.0),
        "better answer is the longer one": (1, 100.0),
        "better answer is the shorter one": (2, 50.0),
        "trace: under 256 tokens": (1, 100.0),
        "trace: 512 to 1,024 tokens": (1, 0.0),
        "trace: 4,096 tokens or more": (1, 100.0),
    }


def test_statuses_and_tokens():
    rows = [
        row("1", tokens=[[100]]),
        row("2", False, winner=None, status="invalid", verdicts=[[None]], tokens=[[300]]),
        row("3", False, winner=None, status="tie", verdicts=[["A"], ["B"]], tokens=[[100], [500]]),
        row("4", False, winner=None, status="too_long", verdicts=[], tokens=[], texts=[]),
    ]
    found = summarize(rows, {"rule": "strict"}, {})
    assert (found["invalid"], found["ties"], found["too_long"]) == (1, 1, 1)
    assert found["tokens"] == {"mean": 250.0, "p50": 200.0, "p99": pytest.approx(494), "max": 500}


def test_a_budget_takes_the_verdict_from_a_text_that_is_longer():
    rows = [
        row("1", tokens=[[512]]),
        row("2", tokens=[[513]]),
        row("3", False, tokens=[[4000]]),
        row("4", tokens=[[9000]]),
    ]
    found = summarize(rows, {"rule": "strict"}, {})
    assert [line["tokens"] for line in found["budget"]] == [512, 1024, 2048, 4096, 8192]
    assert [line["accuracy"] for line in found["budget"]] == [25, 50, 50, 50, 50]
    assert [line["score"] for line in found["budget"]] == [25, 50, 50, 50, 50]
    assert [line["invalid"] for line in found["budget"]] == [3, 2, 2, 1, 1]
    assert [line["truncated"] for line in found["budget"]] == [3, 2, 2, 1, 1]
    assert found["notes"] == [
        "budget: by truncation, a text of more tokens counts as one without a verdict (rule: strict)"
    ]


def test_a_budget_s_majority_is_of_the_texts_that_are_whole():
    """Three votes B, A, A for a pair whose better answer is B; at 1,024 tokens only the first is whole."""
    votes = row("1", False, better="B", verdicts=[["B", "A", "A"]], tokens=[[800, 3000, 3000]], texts=[["", "", ""]])
    found = summarize([votes], {"rule": "strict"}, {})
    assert [line["accuracy"] for line in found["budget"]] == [0, 100, 100, 0, 0]


def test_a_tokenizer_finds_a_verdict_before_the_cut():
    """One word a token. The published rule reads [[A]] wherever it stands; in the second order letters are mapped."""
    texts = [["x " * 600 + "[[A]] " + "x " * 500], ["x " * 700 + "[[B]] " + "x " * 500]]
    both = row("1", True, verdicts=[["A"], ["A"]], tokens=[[1101], [1201]], texts=texts)
    cut = lambda text, n: " ".join(text.split()[:n])  # noqa: E731
    found = summarize([both], {"rule": "eval"}, {}, cut=cut)
    assert [line["accuracy"] for line in found["budget"]] == [0, 100, 100, 100, 100]
    assert [line["truncated"] for line in found["budget"]] == [2, 2, 0, 0, 0]
    assert summarize([both], {"rule": "eval"}, {})["budget"][1]["accuracy"] == 0


@pytest.mark.parametrize("key", ["max_new_tokens", "max_tokens"])
def test_budgets_end_at_the_run_s_own_limit(key):
    """A run cut at 600 tokens says nothing about 8,192; two of its texts fill the limit, one of them with a verdict."""
    rows = [row("1", tokens=[[600]]), row("2", tokens=[[500]])]
    rows += [row("3", False, winner=None, status="invalid", verdicts=[[None]], tokens=[[600]])]
    found = summarize(rows, {"rule": "strict", key: 600}, {})
    assert [line["tokens"] for line in found["budget"]] == [512, 600]
    assert [line["accuracy"] for line in found["budget"]] == pytest.approx([100 / 3, 200 / 3])
    assert [(line["n"], line["truncated"], line["invalid"]) for line in found["budget"]] == [(3, 2, 2), (3, 2, 1)]
    assert found["budget"][-1]["score"] == found["headline"] and "own limit of 600 tokens" in found["notes"][0]
    rows[0] |= {"finish_reasons": [["stop"]]}  # its verdict was the last token that fitted
    assert [line["truncated"] for line in summarize(rows, {"rule": "strict", key: 600}, {})["budget"]] == [2, 1]
    (only,) = summarize(rows, {"rule": "strict", key: 200}, {})["budget"]
    assert only["tokens"] == 200


def test_both_orders():
    rows = [
        row("1", verdicts=[["A"], ["A"]], tokens=[[1], [1]]),  # the same answer: once shown first, once second
        row("2", False, verdicts=[["A"], ["B"]], winner=None, status="tie", tokens=[[1], [1]]),  # both shown first
        row("3", False, better="B", verdicts=[["A"], ["B"]], winner=None, status="tie", tokens=[[1], [1]]),
        row("4", True, verdicts=[[None], ["A"]], tokens=[[1], [1]]),
        row("5", verdicts=[["A"], ["A"]], tokens=[[1], [1]]),
    ]
    assert summarize(rows, {}, {})["orders"] == {
        "pairs": 5,
        "n": 4,
        "consistency": 50.0,
        "first_position_share": pytest.approx(600 / 9),
        "accuracy_ab": 60.0,
        "accuracy_ba": 80.0,
    }
    assert summarize([row()], {}, {})["orders"] is None


def test_votes():
    verdicts = [list("BAAAA"), list("AABBB"), list("AAAAA"), ["A", None, None, None, None]]
    winners = ["A", "B", "A", "A"]
    rows = [
        row(str(k), winner == "A", verdicts=[votes], tokens=[[1] * 5])
        for k, (votes, winner) in enumerate(zip(verdicts, winners, strict=True))
    ]
    found = summarize(rows, {}, {})["votes"]
    assert (found["k"], found["n"]) == (5, 4)
    assert found["by_k"] == [{"k": 1, "accuracy": 75}, {"k": 3, "accuracy": 100}, {"k": 5, "accuracy": 75}]
    assert found["confidence"] == [
        {"share": pytest.approx(60), "n": 1, "accuracy": 0},
        {"share": pytest.approx(80), "n": 1, "accuracy": 100},
        {"share": pytest.approx(100), "n": 2, "accuracy": 100},
    ]
    assert summarize([row()], {}, {})["votes"] is None


def test_rows_of_other_or_unknown_benchmarks_are_refused():
    with pytest.raises(InputError, match="no judgement"):
        summarize([], {}, {})
    with pytest.raises(InputError, match="is of rm-bench, those before of rewardbench"):
        summarize([row(), *rm_bench_rows([[1] * 3] * 3)], {}, {})
    with pytest.raises(InputError, match=r"judgement '1'.*subset"):
        summarize([row(meta={"benchmark": "rewardbench"})], {}, {})
    with pytest.raises(InputError, match=r"judgement '0#0-0'.*domain"):
        summarize(rm_bench_rows([[1] * 3] * 3, "poetry"), {}, {})
    with pytest.raises(InputError, match=r"judgement 'pairwisepeace0-0'.*category"):
        summarize(rmb_rows("pairwise", "peace", [1]), {}, {})
    with pytest.raises(InputError, match=r"the rule 'loose'"):
        summarize([row()], {"rule": "loose"}, {})
    with pytest.raises(InputError, match="judgement '1': subset 'poetry' is none of RewardBench's"):
        summarize([row(meta={"benchmark": "rewardbench", "subset": "poetry"})], {}, {})


def test_a_summary_file(tmp_path):
    rows = [row(str(k), k % 3 != 0) for k in range(9)]
    (tmp_path / "judgements.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "judgements.jsonl.run.json").write_text('{"rule": "strict", "votes": 1}')
    path = write_summary(tmp_path, {"Chat Hard": 2 / 3}, judge="ours")
    found = json.loads(path.read_text())
    assert path == tmp_path / "summary.json" and found["judge"] == "ours" and found["n"] == 9
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["version"] == rmr1_jax.__version__ and datetime.fromisoformat(about["written"]) <= datetime.now(UTC)
    assert found["settings"] == {"rule": "strict", "votes": 1} and found["headline"] == pytest.approx(200 / 3)
    (tmp_path / "judgements.jsonl").write_text('{"id": "1", "status": "ok", "better": "A", "winner": "A"}\n')
    with pytest.raises(InputError, match=r"judgements.jsonl:1: field 'correct' is missing"):
        write_summary(tmp_path, {})


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(tmp_path):
    """3,000 judgements of 100,000 characters each are 300 MB; a summary holds a few MB."""

    def rows():
        for k in range(300):
            yield row(str(k), texts=[["x" * 1_000_000]])

    with (tmp_path / "judgements.jsonl").open("w") as file:
        for row_ in rows():
            file.write(json.dumps(row_) + "\n")
    write_summary(tmp_path, {})  # imports and warms up
    tracemalloc.start()
    write_summary(tmp_path, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
