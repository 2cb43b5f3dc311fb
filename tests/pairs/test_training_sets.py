"""The rows of the public preference sets, each in its published schema."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.read import read_pairs, source_format
from rmr1_jax.pairs.rows import BadRow, ReadReport


def said(*texts):
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


SKYWORK = {"chosen": said("q", "good"), "rejected": said("q", "bad"), "source": "helpsteer2"}
SEVERAL = {"chosen": said("q", "a", "more", "good"), "rejected": said("q", "a", "more", "bad"), "source": "wildguard"}
CODE = {"instruction": "Be exact.", "input": "Write f.", "accepted": "def f(): 1", "rejected": "def f(: 1", "ID": 7}
MATH = {
    "dataset": "gsm8k",
    "prompt": "1+1+1?",
    "initial_reason_steps": "Step 1: 1+1=2.\n",
    "chosen": "Step 2: 2+1=3.",
    "rejected": "Step 2: 2+1=4.",
    "full_chosen": "Step 2: 2+1=3.\nSo 3.",
    "full_rejected": "Step 2: 2+1=4.\nSo 4.",
    "answer": "3",
}
ROWS = {"skywork": [SKYWORK, SEVERAL], "code-preference": [CODE], "math-step": [MATH]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def better_and_worse(pair: PreferencePair):
    sides = [[message.content for message in side] for side in (pair.conversation_a, pair.conversation_b)]
    return sides if pair.better == "A" else sides[::-1]


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (
            "skywork",
            [
                ([["q", "good"], ["q", "bad"]], {"source": "helpsteer2"}),
                ([["q", "a", "more", "good"], ["q", "a", "more", "bad"]], {"source": "wildguard"}),
            ],
        ),
        ("code-preference", [([["Write f.", "def f(): 1"], ["Write f.", "def f(: 1"]], {"ID": 7})]),
        (
            "math-step",
            [
                (
                    [
                        ["1+1+1?", "Step 1: 1+1=2.\nStep 2: 2+1=3.\nSo 3."],
                        ["1+1+1?", "Step 1: 1+1=2.\nStep 2: 2+1=4.\nSo 4."],
                    ],
                    {"dataset": "gsm8k", "answer": "3"},
                )
            ],
        ),
    ],
)
def test_rows_in_their_published_schema(tmp_path, format, expected):
    path = write(tmp_path / "rows.jsonl", ROWS[format])
    assert source_format(path) == format
    pairs = list(read_pairs(path))
    assert [(better_and_worse(pair), pair.meta) for pair in pairs] == expected
    assert [pair.id for pair in pairs] == [str(k) for k in range(len(pairs))]
    assert list(read_pairs(path, format)) == pairs
    pq.write_table(pa.Table.from_pylist(ROWS[format]), tmp_path / "rows.parquet")
    assert list(read_pairs(tmp_path / "rows.parquet")) == pairs


def test_the_seed_draws_which_answer_is_shown_first(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**CODE, "ID": k} for k in range(400)])
    shown = {seed: [pair.better for pair in read_pairs(path, seed=seed)] for seed in (0, 1)}
    assert shown[0] == [pair.better for pair in read_pairs(path)] != shown[1]
    for better in shown.values():
        assert 160 < better.count("A") < 240


def test_messages_of_both_sides_are_shared(tmp_path):
    (pair,) = read_pairs(write(tmp_path / "rows.jsonl", [SEVERAL]))
    assert all(pair.conversation_a[k].content is pair.conversation_b[k].content for k in range(3))


def test_conversations_that_diverge_early_are_kept_whole(tmp_path):
    row = {"chosen": said("q", "a", "then?", "b"), "rejected": said("q", "x"), "source": "s"}
    shorter = {"chosen": said("q", "a"), "rejected": said("q", "a", "then?", "b"), "source": "s"}
    pairs = list(read_pairs(write(tmp_path / "rows.jsonl", [row, shorter])))
    assert better_and_worse(pairs[0]) == [["q", "a", "then?", "b"], ["q", "x"]]
    assert better_and_worse(pairs[1]) == [["q", "a"], ["q", "a", "then?", "b"]]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (
            {**SKYWORK, "chosen": [{"role": "tool", "content": "x"}]},
            "chosen[0].role",
            "expected 'user' or 'assistant'",
        ),
        ({**SKYWORK, "rejected": said("q")}, "rejected", "must end with a message whose role is 'assistant'"),
        ({**SKYWORK, "rejected": "text"}, "rejected", "expected a list"),
        ({**CODE, "accepted": None}, "accepted", "is null, expected a text"),
        ({**MATH, "full_rejected": ["x"]}, "full_rejected", "expected a text"),
        ({**MATH, "initial_reason_steps": 3}, "initial_reason_steps", "is 3 (int), expected a text"),
    ],
)
def test_a_bad_row_names_its_place(tmp_path, row, field, reason):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(BadRow) as caught:
        list(read_pairs(path))
    bad = caught.value
    assert (bad.field, bad.place.line) == (field, 1) and reason in bad.reason
    assert str(bad).startswith(f"{path}:1: ")


def test_rows_can_be_skipped(tmp_path):
    bad = {**SKYWORK, "chosen": 3, "source": "magpie_ultra"}
    path, report = write(tmp_path / "rows.jsonl", [SKYWORK, bad, SEVERAL]), ReadReport()
    pairs = read_pairs(path, select=lambda row: row.value["source"] != "magpie_ultra", report=report)
    assert [pair.id for pair in pairs] == ["0", "2"]
    assert (report.read, report.kept, report.rejected, report.made) == (3, 3, 0, 2)
