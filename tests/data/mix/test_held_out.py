"""The held-out part of a mixture: no question is in both parts, and a question stays in its part."""

import pytest
from mixtures import counts, error_of, made, own, simple

from rmr1_jax.pairs.read import read_pairs


def test_a_question_is_in_one_part(tmp_path):
    rows = [
        own(k, id=f"{k}-{n}", question=f"What is {k % 50}?", response_a=f"{k} {n}") for k in range(100) for n in "ab"
    ]
    report, pairs, written = made(simple(tmp_path, rows), tmp_path, "held_out=0.3")
    held_out = list(read_pairs(tmp_path / "out/held_out.jsonl"))
    assert not {pair.question for pair in pairs} & {pair.question for pair in held_out}
    assert len({pair.question for pair in pairs + held_out}) == 50
    assert (len(pairs), len(held_out)) == (report.pairs, report.held_out) == (written["pairs"], written["held_out"])
    assert counts(report) == {"read": 200, "kept": len(pairs)} and report.sources[0].held_out == len(held_out)
    assert 8 <= len({pair.question for pair in held_out}) <= 22  # 15 are expected
    assert abs(2 * sum(pair.better == "A" for pair in held_out) - len(held_out)) <= 1
    assert "held out" in report.table().splitlines()[0]
    # The parts stay as they are with another seed, other spelling, more rows, and a larger share.
    asked = {pair.question for pair in held_out}
    shouted = [row | {"question": row["question"].upper() + "!"} for row in rows] + [own(k) for k in range(200, 300)]
    made(simple(tmp_path, shouted), tmp_path, "held_out=0.3", "seed=5", f"out={tmp_path / 'b'}")
    other = {pair.question for pair in read_pairs(tmp_path / "b/held_out.jsonl")}
    assert {question for question in other if "?" in question} == {question.upper() + "!" for question in asked}
    made(simple(tmp_path, rows), tmp_path, "held_out=0.6", f"out={tmp_path / 'c'}")
    assert asked < {pair.question for pair in read_pairs(tmp_path / "c/held_out.jsonl")}


def test_training_rows_that_share_words_with_the_held_out_part(tmp_path):
    long = " ".join(f"word{k}" for k in range(15))
    rows = [own(k, question=f"{k} {long}") for k in range(20)] + [own(30), own(31)]
    report, pairs, _ = made(simple(tmp_path, rows), tmp_path, "held_out=0.5")
    near = report.sources[0].overlaps["held_out"]["near"]
    assert near == sum(long in pair.question for pair in pairs) > 0
    assert f"own: overlaps with held_out: 0 exact, {near} near" in report.table()
    tree = simple(tmp_path, rows) | {"overlap": {"action": "remove"}}
    report, pairs, _ = made(tree, tmp_path, "held_out=0.5", f"out={tmp_path / 'b'}")
    assert not any(long in pair.question for pair in pairs) and report.sources[0].overlap == near


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_part_without_pairs_is_refused(tmp_path, share):
    tree = simple(tmp_path, [own(k) for k in range(4)])
    assert f"held_out={share}: all 4 pairs are in one part" in error_of(made, tree, tmp_path, f"held_out={share}")


def test_without_a_held_out_part_older_mixtures_are_continued(tmp_path):
    tree = simple(tmp_path, [own(k) for k in range(4)])
    _, _, written = made(tree, tmp_path)
    assert "held_out" not in written["config"] and not (tmp_path / "out/held_out.jsonl").exists()
    assert "another held_out" in error_of(made, tree, tmp_path, "held_out=0.5")
