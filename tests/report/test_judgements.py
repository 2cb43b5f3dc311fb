"""Judgements prepared for the page: their texts, the values they are filtered by, and the compressed pieces."""

import base64
import itertools
import json
import zlib

import pytest
from evaluations import judgement, trace
from run_directories import write_lines

from rmr1_jax.report.judgements import contests, pack, shown_judgements


def test_offsets_are_in_utf16_code_units(tmp_path):
    answer = "🙂🙂 Some short words here"
    file = write_lines(tmp_path / "judgements.jsonl", [judgement(0, response_a=answer)])
    (row,) = shown_judgements(file, [])
    spans = [span for _, _, spans in json.loads(row["traces"])[0][0]["blocks"] for span in spans]
    ((start, end),) = next(where[-1] for _, kind, *where in spans if kind == "quote")
    assert answer.encode("utf-16-le")[2 * start : 2 * end].decode("utf-16-le") == "short words"
    assert row["quotes"] == ["found", "not found"]


def test_quotes_of_the_second_order_are_located_in_the_exchanged_answers(tmp_path):
    row = judgement(0, texts=[[trace("A")], [trace("B", said="Others")]], verdicts=[["A"], ["A"]])
    (read,) = shown_judgements(write_lines(tmp_path / "judgements.jsonl", [row]), [])
    assert read["quotes"] == ["found", "not found"] * 2
    assert read["facets"]["orders"] == "agree" and read["facets"]["quotes"] == "some not found"


def test_the_question_of_two_conversations_is_their_common_beginning(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    asked = [*turns, {"role": "user", "content": "And?"}]
    sides = {side: [*asked, {"role": "assistant", "content": side}] for side in "ab"}
    row = judgement(0, conversation_a=sides["a"], conversation_b=sides["b"])
    same = judgement(1, conversation_a=turns, conversation_b=turns)
    for name in ("question", "response_a", "response_b"):
        del row[name], same[name]
    first, second = shown_judgements(write_lines(tmp_path / "judgements.jsonl", [row, same]), [])
    assert (first["question"], first["a"], first["b"]) == ("User: Hi\n\nChatbot: Yes?\n\nUser: And?", "a", "b")
    assert (second["question"], second["a"], second["b"]) == ("Hi", "Yes?", "Yes?")


# The data of the page.


def test_every_judgement_is_packed_and_shared_texts_are_stored_once(tmp_path):
    words = [" ".join(f"{i * j * 7919 % 99991:x}" for j in range(400)) for i in range(40)]
    rows = [judgement(i, question=words[i % 40], response_a=f"{i} " + words[-i % 40]) for i in range(400)]
    first, second = (
        list(shown_judgements(write_lines(tmp_path / f"{name}.jsonl", rows), [])) for name in ("first", "second")
    )
    index, pieces = pack([first, second[:100]])
    assert [len(rows) for rows in index["rows"]] == [400, 100] and len(pieces) > 2
    unpacked = [json.loads(zlib.decompress(base64.b64decode(piece))) for piece in pieces]
    assert max(sum(map(len, piece["texts"])) for piece in unpacked) < 1 << 19
    for judge, number in itertools.chain(((0, i) for i in range(400)), ((1, i) for i in range(100))):
        name, brief, piece, place, length, contest, *facets = index["rows"][judge][number]
        row = unpacked[piece]["rows"][place]
        assert row["at"] == [judge, number] and name == f"q{number}" and words[number % 40].startswith(brief)
        assert unpacked[piece]["texts"][row["question"]] == words[number % 40]
        assert index["filters"]["outcome"][facets[0]] == "right" and (length, contest) == (60, 0)
    # Both judges have the same texts, which are stored once in a piece.
    assert all(len(set(piece["texts"])) == len(piece["texts"]) for piece in unpacked)
    assert pack([first, second[:100]]) == (index, pieces)  # the same bytes


def test_styles_and_difficulty_have_names(tmp_path):
    meta = {"benchmark": "rm-bench", "item": "i", "section": "chat", "domain": "chat"}
    meta |= {"chosen_style": 0, "rejected_style": 2}
    (row,) = shown_judgements(write_lines(tmp_path / "judgements.jsonl", [judgement(0, meta=meta)]), [])
    named = {"difficulty": "hard", "better_style": "concise", "worse_style": "markdown", "section": "chat"}
    assert named.items() <= row["facets"].items() and "domain" not in row["facets"]


def test_a_pair_is_contested_where_texts_of_all_judges_disagree():
    rows = [{"id": "q", "winner": "A", "verdicts": verdicts} for verdicts in ([["A", "B", None, "A"]], [["B"]], [])]
    rows.append({"id": "agreed", "winner": "B", "verdicts": [["B", None]]})
    # A, B, none, A; B; and A, the winner of a judge without texts: two of six for the minority.
    assert contests([rows[:1], rows[1:2], rows[2:]]) == {"q": round(200 * 2 / 6), "agreed": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "no_verdict"),
        ({"reason": "refused"}, "refused"),
        ({"finish_reasons": [["length"]]}, "cut_off"),
        ({"tokens": [[200]]}, "cut_off"),  # as many as the limit in the settings
        ({"tokens": []}, None),  # not the form that a row has
        ({"finish_reasons": []}, "no_verdict"),
        ({"status": "tie"}, None),
    ],
)
def test_rows_of_earlier_versions_say_why_there_is_no_verdict(tmp_path, change, reason):
    file = write_lines(tmp_path / "judgements.jsonl", [judgement(0, None, texts=[["no idea"]]) | change])
    (tmp_path / "judgements.jsonl.run.json").write_text('{"max_new_tokens": 200, "rule": "strict"}')
    (row,) = shown_judgements(file, [])
    assert row["reason"] == reason and row["facets"]["reason"] == reason
