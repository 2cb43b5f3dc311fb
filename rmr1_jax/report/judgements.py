"""Judgement rows made fit for a page: a small index of all of them, and their texts in compressed pieces.

A page of 3,000 judgements holds some 20 MB of text. Its script needs the index at once (what to list and to filter by)
and the texts of one judgement at a time, so texts lie in CHUNK-sized pieces that are taken apart when asked for. A text
that stands in several judgements of a piece stands there once; judgements of one question, whoever judged, share one.
The pieces are base64, so nothing in a text can end the element that holds it.

Read next: `report_eval.py`, which gathers the rows, and `report_eval_script.html.j2`, which shows them.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from rmr1_jax.pairs.rows import Row, describe
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.report.reading import jsonl_rows, text_of
from rmr1_jax.report.trace import Quoted, blocks_of, split_trace

CHUNK = 1 << 18  # characters of text in a piece


BRIEF = 140  # characters of a question in the list


STATUSES = ("ok", "tie", "invalid", "too_long")


SILENT = {"tie": "tie", "too_long": "too long"}  # outcomes of what is neither right nor wrong; else "no verdict"


SPEAKERS = {"user": "User", "assistant": "Chatbot", "system": "System"}


STYLES = ("concise", "detailed", "markdown")  # of RM-Bench's answers


META = ("section", "subset", "domain", "category")  # fields of `meta` that the page filters by


FILTERS = ("outcome", *META, "difficulty", "better_style", "worse_style", "kind", "better", "orders", "quotes")


def read_judgements(file: Path, warnings: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of judgements.jsonl, checked: what the index needs under "facets", and the texts.

    Raises:
      InputError: a malformed row (file, line, field); a last line that is cut short is a warning.
    """
    for row in jsonl_rows(file, warnings):
        meta = row.value.get("meta")
        if not isinstance(meta, dict | None):
            raise row.bad("meta", f"is {describe(meta)}, expected an object")
        found: dict[str, Any] = {"id": row.identifier("id"), "meta": meta or {}, "note": text_of(row, "note")}
        for name, choices in (("better", ("A", "B")), ("winner", ("A", "B", None)), ("status", STATUSES)):
            found[name] = row.get(name)
            if found[name] not in choices:
                named = ", ".join("null" if choice is None else choice for choice in choices)
                raise row.bad(name, f"is {describe(found[name])}, expected one of {named}")
        found |= _shown(row)
        for name in ("texts", "verdicts", "tokens"):
            found[name] = _by_order(row, name)
        scores = row.value.get("scores")
        if scores is not None and not (isinstance(scores, list) and len(scores) == 2):
            raise row.bad("scores", f"is {describe(scores)}, expected two numbers")
        found |= {"scores": scores, "votes": row.value.get("votes")}
        traces = [[_trace(text, found, order) for text in votes] for order, votes in enumerate(found.pop("texts"))]
        found["traces"] = json.dumps(traces, separators=(",", ":"))  # a tenth of what the objects take
        blocks = [block for votes in traces for trace in votes for block in trace["blocks"]]
        found["quotes"] = [span[3] for _, _, spans in blocks for span in spans if span[1] == "quote"]
        yield found | {"facets": _facets(found, text_of(row, "kind"))}


def pack(judges: Sequence[Sequence[dict[str, Any]]]) -> tuple[dict[str, Any], list[str]]:
    """Rows by judge -> (the index, the pieces).

    The index is {"filters": {name: values}, "rows": [[[id, brief, piece, place in it, value of each filter or -1]]]}; a
    piece is the base64 of zlib's compression of {"texts": [...], "rows": [...]}, where a row's texts are numbers.
    """
    numbers: dict[str, dict[str, int]] = {name: {} for name in FILTERS}
    where: dict[tuple[int, int], tuple[int, int]] = {}
    pieces = []
    for piece, members in enumerate(_pieces(judges)):
        pool: dict[str, int] = {}
        packed = []
        for place, (judge, number) in enumerate(members):
            where[judge, number] = (piece, place)
            packed.append(_packed(judges[judge][number], pool, [judge, number]))
        raw = f'{{"texts":{json.dumps(list(pool))},"rows":[{",".join(packed)}]}}'
        pieces.append(base64.b64encode(zlib.compress(raw.encode(), 6)).decode())
    rows = []
    for judge, judged in enumerate(judges):
        rows.append([])
        for number, row in enumerate(judged):
            facets = [
                numbers[name].setdefault(value, len(numbers[name])) if (value := row["facets"].get(name)) else -1
                for name in FILTERS
            ]
            rows[-1].append([row["id"], " ".join(row["question"][: 2 * BRIEF].split())[:BRIEF]])
            rows[-1][-1] += [*where[judge, number], *facets]
    return {"filters": {name: list(values) for name, values in numbers.items()}, "rows": rows}, pieces


def _pieces(judges: Sequence[Sequence[dict[str, Any]]]) -> Iterator[list[tuple[int, int]]]:
    """The rows, as (judge, number), cut into pieces; those of one question stand together."""
    asked: dict[str, list[tuple[int, int]]] = {}
    for judge, rows in enumerate(judges):
        for number, row in enumerate(rows):
            asked.setdefault(row["question"], []).append((judge, number))
    piece, size = [], 0
    for question, members in asked.items():
        size += len(question)
        for judge, number in members:
            row = judges[judge][number]
            size += len(row["a"]) + len(row["b"]) + len(row["traces"])
            piece.append((judge, number))
            if size >= CHUNK:
                yield piece
                piece, size = [], len(question)
    if piece:
        yield piece


def _packed(row: dict[str, Any], pool: dict[str, int], at: list[int]) -> str:
    """The row as JSON, with the numbers that its texts have in the pool; `at`: its judge and its number."""
    kept = {name: row[name] for name in ("better", "winner", "status", "verdicts")} | {"at": at}
    kept |= {name: row[name] for name in ("votes", "tokens", "scores", "note", "meta") if row[name]}
    kept |= {name: pool.setdefault(row[name], len(pool)) for name in ("question", "a", "b")}
    return f'{json.dumps(kept, separators=(",", ":"))[:-1]},"traces":{row["traces"]}}}'


def _shown(row: Row) -> dict[str, str]:
    """The question and the two answers as texts; of conversations, what both begin with is the question."""
    if row.value.get("conversation_a") is None:
        return {"question": row.text("question"), "a": row.text("response_a"), "b": row.text("response_b")}
    sides = [_messages(row, name) for name in ("conversation_a", "conversation_b")]
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))))
    common = min(common, *(len(side) - 1 for side in sides))  # two answers that are the same are answers still

    def text(messages: list[tuple[str, str]]) -> str:
        alone = len(messages) == 1
        return "\n\n".join(words if alone else f"{SPEAKERS.get(who, who)}: {words}" for who, words in messages)

    return {"question": text(sides[0][:common]), "a": text(sides[0][common:]), "b": text(sides[1][common:])}


def _messages(row: Row, name: str) -> list[tuple[str, str]]:
    messages = row.get(name)
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise row.bad(name, f"is {describe(messages)}, expected a list of messages")
    return [
        tuple(row.checked_text(message.get(part), f"{name}[{i}].{part}") for part in ("role", "content"))
        for i, message in enumerate(messages)
    ]


def _by_order(row: Row, name: str) -> list[list[Any]]:
    """A field that is a list of lists: by the order in which the answers were shown, then by vote."""
    value = row.value.get(name) or []
    if not isinstance(value, list) or not all(isinstance(votes, list) for votes in value) or len(value) > 2:
        raise row.bad(name, f"is {describe(value)}, expected one or two lists (one an order), an entry a vote")
    if name == "texts":
        for order, votes in enumerate(value):
            for vote, text in enumerate(votes):
                row.checked_text(text, f"texts[{order}][{vote}]")
    return value


def _trace(text: str, row: dict[str, Any], order: int) -> dict[str, Any]:
    """A text as its blocks: {"blocks": [[name, bare, [span]]], "flaws"}; a span is [text, what, side, found, places].

    `what` is "" for words, "tag", "quote" or "summary". A quote is looked for in the answer that this order showed as
    its side; `places` are offsets in UTF-16, as a script counts.
    """
    answers = {side: Quoted(row[name]) for side, name in zip("AB", "ba" if order else "ab", strict=True)}
    blocks = []
    for block in blocks_of(split_trace(text)):
        spans: list[list[Any]] = []
        for span in block["spans"]:
            if span.tag:
                spans.append([span.text, "tag"])
            elif span.part == block["name"]:
                spans.append([span.text, ""])
            elif words := span.text.strip():
                what, side = span.part.split("_")
                found, places = answers[side].find(words) if what == "quote" else ("", [])
                spans.append([words, what, side, found, [_utf16(answers[side].text, place) for place in places]])
        blocks.append([block["name"], block["bare"], spans])
    return {"blocks": blocks, "flaws": list(parse_trace(text).flaws)}


def _utf16(text: str, place: tuple[int, int]) -> list[int]:
    if text.isascii():
        return list(place)
    return [len(text[:offset].encode("utf-16-le")) // 2 for offset in place]


def _facets(row: dict[str, Any], kind: str) -> dict[str, str]:
    """What the row is filtered by: name -> value, absent where it has none."""
    meta, verdicts = row["meta"], row["verdicts"]
    facets = {name: meta[name] for name in META if isinstance(meta.get(name), str)}
    if facets.get("domain") == facets.get("section"):
        facets.pop("domain", None)
    styles = [meta.get(name) for name in ("chosen_style", "rejected_style")]
    if all(style in range(len(STYLES)) for style in styles):
        chosen, rejected = styles
        facets["difficulty"] = "normal" if chosen == rejected else "hard" if chosen < rejected else "easy"
        facets |= {"better_style": STYLES[chosen], "worse_style": STYLES[rejected]}
    right = "right" if row["winner"] == row["better"] else "wrong"
    facets["outcome"] = right if row["winner"] else SILENT.get(row["status"], "no verdict")
    facets |= {"better": f"shown as {row['better']}", "kind": kind}
    if len(verdicts) == 2:
        first, second = (max(votes, key=votes.count, default=None) for votes in verdicts)
        facets["orders"] = "agree" if first == second else "disagree"
    if verdicts:
        every = set(row["quotes"]) == {"found"}
        facets["quotes"] = ("all found" if every else "some not found") if row["quotes"] else "none"
    return facets
