"""The public preference sets' rows, each in its real schema, and pairs taken out of published rows again."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.pairs.read import read_pairs, source_format
from rmr1_jax.pairs.rows import BadRow, ReadReport
from rmr1_jax.pairs.training_sets import read_published
from rmr1_jax.prompts.cor import get_prompt
from rmr1_jax.prompts.recover import recover_prompt


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
def test_rows_in_their_real_schema(tmp_path, format, expected):
    path = write(tmp_path / "rows.jsonl", ROWS[format])
    assert source_format(path) == format
    pairs = list(read_pairs(path))
    assert [(better_and_worse(pair), pair.meta) for pair in pairs] == expected
    assert [pair.id for pair in pairs] == [str(k) for k in range(len(pairs))]
    assert list(read_pairs(path, format)) == pairs
    pq.write_table(pa.Table.from_pylist(ROWS[format]), tmp_path / "rows.parquet")
    assert list(read_pairs(tmp_path / "rows.parquet")) == pairs


def test_which_is_shown_first_is_drawn_by_the_seed(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**CODE, "ID": k} for k in range(400)])
    shown = {seed: [pair.better for pair in read_pairs(path, seed=seed)] for seed in (0, 1)}
    assert shown[0] == [pair.better for pair in read_pairs(path)] != shown[1]
    for better in shown.values():
        assert 160 < better.count("A") < 240


def test_what_both_sides_say_is_held_once(tmp_path):
    (pair,) = read_pairs(write(tmp_path / "rows.jsonl", [SEVERAL]))
    assert all(pair.conversation_a[k].content is pair.conversation_b[k].content for k in range(3))


def test_conversations_that_part_early_are_kept_whole(tmp_path):
    row = {"chosen": said("q", "a", "then?", "b"), "rejected": said("q", "x"), "source": "s"}
    shorter = {"chosen": said("q", "a"), "rejected": said("q", "a", "then?", "b"), "source": "s"}
    pairs = list(read_pairs(write(tmp_path / "rows.jsonl", [row, shorter])))
    assert better_and_worse(pairs[0]) == [["q", "a", "then?", "b"], ["q", "x"]]
    assert better_and_worse(pairs[1]) == [["q", "a"], ["q", "a", "then?", "b"]]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (
            {**SKYWORK, "chosen": [{"role": "system", "content": "x"}]},
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
def test_a_bad_row_says_where_it_stands(tmp_path, row, field, reason):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(BadRow) as caught:
        list(read_pairs(path))
    bad = caught.value
    column = path.read_text().index(json.dumps(field.split("[")[0]) + ": ") + len(json.dumps(field.split("[")[0])) + 3
    assert (bad.field, bad.place.line, bad.place.column) == (field, 1, column) and reason in bad.reason
    assert str(bad).startswith(f"{path}:1:{column}: ")


def test_rows_can_be_passed_over(tmp_path):
    bad = {**SKYWORK, "chosen": 3, "source": "magpie_ultra"}
    path, report = write(tmp_path / "rows.jsonl", [SKYWORK, bad, SEVERAL]), ReadReport()
    pairs = read_pairs(path, select=lambda row: row.value["source"] != "magpie_ultra", report=report)
    assert [pair.id for pair in pairs] == ["0", "2"]
    assert (report.read, report.kept, report.rejected, report.made) == (3, 3, 0, 2)


# ---- published rows ----


@pytest.mark.parametrize("name", ["rlvr", "reasoning_rlvr", "distill_sft"])
def test_pairs_of_published_rows_render_to_the_same_text(shared_data, name):
    path = shared_data / f"published_rows/{name}.jsonl"
    rows, pairs = list(read_published(path)), list(read_pairs(path, "published"))
    prompt = recover_prompt(row.messages for row in rows)
    assert [render_pair(prompt, pair) for pair in pairs] == [row.messages for row in rows]
    assert [pair.id for pair in pairs] == [row.id for row in rows]
    for row, pair in zip(rows, pairs, strict=True):
        assert pair.better == (row.better or row.trace.split("<answer>[[")[-1][0])


def test_pairs_of_published_rows_are_the_data_set_s(shared_data):
    """What was rendered from RewardBench comes back as RewardBench's own questions and answers."""
    source = read_pairs(shared_data / "rewardbench/filtered_sample.jsonl")
    back = read_pairs(shared_data / "published_rows/rlvr.jsonl", "published")
    assert [(pair.question, better_and_worse(pair)) for pair in back] == [
        (pair.question, better_and_worse(pair)) for pair in source
    ]


def test_conversations_of_published_rows(tmp_path):
    prompt = get_prompt("cor")
    turns = [("user", "q"), ("assistant", "User is a word: fine"), ("user", "two\nlines"), ("assistant", "good")]
    pair = PreferencePair.from_preference("x", turns, [*turns[:3], ("assistant", "")], chosen_in_b=True)
    rows = [
        {"context_messages": render_pair(prompt, pair), "winner": "model_b"},
        {"context_messages": prompt.render("q", "a", "b"), "winner": "<answer>[[A]]</answer>"},
        {
            "context_messages": prompt.render_conversations(pair.conversation_b, pair.conversation_a),
            "winner": "model_a",
        },
    ]
    # As released: the second chatbot's name is misspelt where the better conversation stands in A.
    text = rows[2]["context_messages"][-1]["content"]
    rows[2]["context_messages"][-1]["content"] = text.replace("\nChatbot B: ", "\nChabot B: ")
    back = list(read_pairs(write(tmp_path / "rows.jsonl", rows), "published"))
    assert [(each.conversation_a, each.conversation_b, each.better) for each in back] == [
        (pair.conversation_a, pair.conversation_b, "B"),
        (PreferencePair.from_answers("y", "q", "a", "b").conversation_a, (("user", "q"), ("assistant", "b")), "A"),
        (pair.conversation_b, pair.conversation_a, "A"),
    ]
    assert [render_pair(prompt, each) for each in back[:2]] == [row["context_messages"] for row in rows[:2]]


def test_bad_published_rows(tmp_path):
    prompt = get_prompt("cor")
    good = {"context_messages": prompt.render("q", "a", "b"), "winner": "model_a"}
    unsure = {**good, "winner": "I cannot say which."}
    other = {"context_messages": said("a question of another kind"), "winner": "model_b"}
    talk = prompt.render_conversations([("user", "q"), ("assistant", "a")], [("user", "q"), ("assistant", "b")])
    talk[-1]["content"] = talk[-1]["content"].replace("User: q", "Guest: q", 1)
    several = [{"context_messages": talk, "winner": "model_a"}, {"context_messages": 3, "winner": "model_a"}]
    path = write(tmp_path / "rows.jsonl", [good] * 300 + [unsure, other, *several])
    report = ReadReport()
    kept = read_pairs(path, "published", on_bad_row="quarantine", rejects=tmp_path / "bad.jsonl", report=report)
    assert len(list(kept)) == 300 and (report.read, report.rejected) == (304, 4)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert "is no trace that ends with a verdict" in reasons[0]
    assert "is not in the frame of the source's other rows" in reasons[1]
    assert "conversation A is no list of turns" in reasons[2] and "expected a list" in reasons[3]
    with pytest.raises(InputError, match=r"rows\.jsonl: row 1: the user turn holds neither"):
        list(read_pairs(write(tmp_path / "rows.jsonl", [other]), "published"))
    with pytest.raises(InputError, match="say format: published"):
        read_pairs(path)
