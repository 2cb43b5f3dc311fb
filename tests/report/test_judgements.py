"""Judgements prepared for the page: their texts, the values they are filtered by, and the compressed pieces."""

import base64
import itertools
import json
import zlib

from evaluations import judgement, trace
from run_directories import write_lines

from rmr1_jax.report.judgements import pack, shown_judgements


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
        name, brief, piece, place, *facets = index["rows"][judge][number]
        row = unpacked[piece]["rows"][place]
        assert row["at"] == [judge, number] and name == f"q{number}" and words[number % 40].startswith(brief)
        assert unpacked[piece]["texts"][row["question"]] == words[number % 40]
        assert index["filters"]["outcome"][facets[0]] == "right"
    # Both judges have the same texts, which are stored once in a piece.
    assert all(len(set(piece["texts"])) == len(piece["texts"]) for piece in unpacked)
    assert pack([first, second[:100]]) == (index, pieces)  # the same bytes


def test_styles_and_difficulty_have_names(tmp_path):
    meta = {"benchmark": "rm-bench", "item": "i", "section": "chat", "domain": "chat"}
    meta |= {"chosen_style": 0, "rejected_style": 2}
    (row,) = shown_judgements(write_lines(tmp_path / "judgements.jsonl", [judgement(0, meta=meta)]), [])
    named = {"difficulty": "hard", "better_style": "concise", "worse_style": "markdown", "section": "chat"}
    assert named.items() <= row["facets"].items() and "domain" not in row["facets"]
