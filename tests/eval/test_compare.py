"""Tests of the comparison of two runs, against numbers worked out by hand and against SciPy."""

import json

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rmr1_jax.errors import InputError
from rmr1_jax.eval.compare import compare, comparison_text


def write(directory, outcomes, *, better="A", subset="mt-bench-hard", name=None):
    """A run: outcomes by id, 1 right, 0 wrong, None without a verdict."""
    directory.mkdir(exist_ok=True)
    rows = []
    for id, outcome in outcomes.items():
        letters = {1: better, 0: "B" if better == "A" else "A", None: None}
        meta = {"benchmark": "rewardbench", "subset": subset} if isinstance(subset, str) else subset(id)
        row = {"id": id, "better": better, "winner": letters[outcome], "status": "ok" if outcome is not None else "tie"}
        rows.append(row | {"correct": outcome == 1, "meta": meta})
    (directory / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name:
        (directory / "summary.json").write_text(json.dumps({"judge": name}))
    return directory


def test_counts_agreement_and_mcnemar_by_hand(tmp_path):
    """Both right 4, only A 8, only B 1, neither 3 of which one without a verdict of B's; two pairs are in one run."""
    a = dict.fromkeys(map(str, range(16)), 0) | dict.fromkeys(map(str, range(12)), 1) | {"extra": 1}
    b = dict.fromkeys(map(str, range(16)), 0) | dict.fromkeys("0123", 1) | {"12": 1, "15": None, "more": 1, "yet": 0}
    found = compare(write(tmp_path / "a", a, name="ours"), write(tmp_path / "b", b) / "judgements.jsonl")
    assert (found["a"], found["b"]) == ("ours", "b")
    assert (found["n"], found["only_in_a"], found["only_in_b"]) == (16, 1, 2)
    assert [found[key] for key in ("both", "only_a", "only_b", "neither")] == [4, 8, 1, 3]
    assert (found["accuracy_a"], found["accuracy_b"]) == (75, 31.25)
    assert found["p"] == pytest.approx(2 * (1 + 9) / 512, abs=1e-12)
    assert found["agreement"] == 37.5  # 4 times A, 2 times B
    # By chance: A says A 12, B 4; B says A 5, B 10, none 1: (12 x 5 + 4 x 10) / 256.
    chance = 100 / 256
    assert found["kappa"] == pytest.approx((0.375 - chance) / (1 - chance), abs=1e-12)
    assert found["difference"] == pytest.approx(43.75)


def test_the_interval_of_the_difference_equals_scipy_s(tmp_path):
    """RM-Bench items of nine pairs in two domains: SciPy resamples the items' own differences. Of 800
    items, the interval differs from a bootstrap's by little."""
    rng = np.random.default_rng(0)
    sizes = {"chat": 300, "code": 500}
    outcomes = [{d: (rng.random((n, 9)) < share).astype(int) for d, n in sizes.items()} for share in (0.7, 0.6)]

    def meta(id):
        domain, item, cell = id.split("/")
        i, j = divmod(int(cell), 3)
        benchmark = {"benchmark": "rm-bench", "item": f"{domain}/{item}", "domain": domain, "file": (j - i) % 3 + 1}
        return benchmark | {"chosen_style": i, "rejected_style": j}

    runs = [
        write(
            tmp_path / str(k),
            {f"{d}/{i}/{c}": int(v) for d, x in run.items() for (i, c), v in np.ndenumerate(x)},
            subset=meta,
        )
        for k, run in enumerate(outcomes)
    ]
    found = compare(*runs)
    samples = [outcomes[0][d].mean(1) - outcomes[1][d].mean(1) for d in sizes]
    wanted = scipy_stats.bootstrap(
        samples,
        lambda a, b, axis: (a.mean(axis) + b.mean(axis)) / 2,
        n_resamples=20_000,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found["difference"] == pytest.approx(50 * sum(x.mean() for x in samples))
    assert found["interval"] == pytest.approx([100 * wanted.low, 100 * wanted.high], abs=0.25)
    only = [int(sum((outcomes[k][d] > outcomes[1 - k][d]).sum() for d in sizes)) for k in (0, 1)]
    assert [found["only_a"], found["only_b"]] == only
    assert found["p"] == pytest.approx(scipy_stats.binomtest(only[0], sum(only)).pvalue, rel=1e-12)


def test_a_pair_shown_in_the_other_order_is_compared_by_its_answers(tmp_path):
    outcomes = {"1": 1, "2": 0, "3": None}
    a, b = write(tmp_path / "a", outcomes, better="A"), write(tmp_path / "b", outcomes, better="B")
    found = compare(a, b)
    assert found["agreement"] == 100 and found["kappa"] == pytest.approx(1) and found["p"] == 1
    low, high = found["interval"]  # three pairs without a difference say little: at most 1 - 0.05^(1/3) differ
    assert (low, high) == pytest.approx((-63.16, 63.16), abs=0.01)


def test_runs_that_cannot_be_compared(tmp_path):
    a = write(tmp_path / "a", {"1": 1})
    with pytest.raises(InputError, match="no id in common"):
        compare(a, write(tmp_path / "b", {"2": 1}))
    with pytest.raises(InputError, match=r"missing.*judgements\.jsonl|judgements\.jsonl.*(No such file|no such file)"):
        compare(a, tmp_path / "missing" / "judgements.jsonl")
    twice = tmp_path / "twice.jsonl"
    twice.write_text((a / "judgements.jsonl").read_text() * 2)
    for one, other in ((twice, a), (a, twice)):
        with pytest.raises(InputError, match="two rows have the id '1'"):
            compare(one, other)


def test_verdicts_of_rmr1_judge(tmp_path):
    """Verdicts have no benchmark, so the score is the accuracy."""
    for name, outcomes in (("a", (1, 1, 0)), ("b", (1, 0, 0))):
        rows = [{"id": str(k), "winner": "A", "status": "ok", "correct": bool(x)} for k, x in enumerate(outcomes)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (found["score_a"], found["score_b"]) == (pytest.approx(200 / 3), pytest.approx(100 / 3))
    (tmp_path / "b.jsonl").write_text('{"id": "0", "winner": "A", "status": "ok"}\n')
    with pytest.raises(InputError, match=r"b.jsonl:1: field 'correct' is missing"):
        compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_the_printed_table(tmp_path):
    same = {"1": 1, "2": 1}
    text = comparison_text(compare(write(tmp_path / "a", same), write(tmp_path / "b", same | {"2": 0, "3": 1})))
    assert "pairs in both: 2, only in A: 0, only in B: 1" in text
    assert "right: both 1, only A 1, only B 0, neither 0" in text
    assert "A-B            +50.00  (95% interval -50.51 to +88.63, n = 2)" in text
    assert "McNemar, exact: p = 1" in text and "kappa 0.000" in text


def test_few_pairs_have_an_interval_with_a_width(tmp_path):
    """One pair in each subset, as of `rmr1 eval --limit`: a bootstrap has no variance there."""
    meta = lambda id: {"benchmark": "rewardbench", "subset": {"1": "hep-go", "2": "donotanswer"}[id]}  # noqa: E731
    a, b = write(tmp_path / "a", {"1": 0, "2": 0}, subset=meta), write(tmp_path / "b", {"1": 1, "2": 0}, subset=meta)
    found = compare(a, b)
    assert found["difference"] == -50 and found["items"] == found["n"] == 2
    assert found["interval"] == pytest.approx([-88.6, 50.5], abs=0.1)
