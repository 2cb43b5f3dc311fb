"""Prepares judgements for the page of an evaluation: a small index of them, and their texts in compressed pieces.

A page of 3,000 judgements holds about 20 MB of text. The page's script needs the index at once, to list and filter the
judgements, but only the texts of the judgements that are opened. The texts are therefore stored in pieces of about
CHUNK characters that the script decompresses on demand. Judgements of the same question, by any judge, share a piece,
and a text that occurs several times in a piece is stored once. The pieces are base64, so that no text can close the
HTML element that holds it.

Read next: `evaluation.py`, which reads the other parts of the page; `templates/evaluation_script.html.j2`, which lists
and filters the judgements.
"""

from __future__ import annotations

import base64
import itertools
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from rmr1_jax.eval.logs import JUDGEMENTS, Judged, read_any_rows, read_judgements, settings_of
from rmr1_jax.files.write import to_json
from rmr1_jax.judge.judgement import RULES, main_reason, why_no_verdict
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.report.trace import QuoteFinder, blocks_of

CHUNK = 1 << 18  # characters of text in a piece
BRIEF = 140  # characters of a question in the list
UNDECIDED = {"tie": "tie", "too_long": "too long"}  # status -> outcome without a winner; others: "no verdict"
ROLES = {"system": "System", "user": "User", "assistant": "Chatbot"}
STYLES = ("concise", "detailed", "markdown")  # of RM-Bench's answers
META = ("section", "subset", "domain", "category")  # fields of `meta` that the page filters by
FILTERS = (
    "outcome",
    "reason",
    *META,
    "difficulty",
    "better_style",
    "worse_style",
    "kind",
    "better",
    "orders",
    "quotes",
)


def shown_judgements(file: Path, warnings: list[str]) -> Iterator[dict[str, Any]]:
    """Reads judgements.jsonl, or a file of `rmr1 judge`, into rows with the texts to show and, as "facets", the values
    to filter by.

    An incomplete last line is left out with a warning.

    Raises:
        InputError: a row is malformed (the message names file, line and field).
    """
    settings = settings_of(file)
    for row in (read_judgements if file.name == JUDGEMENTS else read_any_rows)(file, warnings):
        found: dict[str, Any] = {name: row[name] for name in ("better", "winner", "status", "meta")}
        found |= {"id": str(row["id"]), **_texts(row)}
        found |= {name: row.get(name) for name in ("votes", "tokens", "scores", "note", "reasons")}
        found["reason"] = _reason(row, settings)
        found["verdicts"] = row.get("verdicts", [])
        traces = [[_trace(text, found, order) for text in votes] for order, votes in enumerate(row.get("texts", []))]
        found["traces"] = to_json(traces, separators=(",", ":"))  # takes a tenth of the objects' memory
        blocks = [block for votes in traces for trace in votes for block in trace["blocks"]]
        found["quotes"] = [span[3] for _, _, spans in blocks for span in spans if span[1] == "quote"]
        yield found | {"facets": _facets(found, row.get("kind"))}


def pack(judges: Sequence[Sequence[dict[str, Any]]]) -> tuple[dict[str, Any], list[str]]:
    """Packs the rows of each judge into (index, pieces).

    The index is {"filters": {name: values}, "rows": by judge, [id, brief, piece, position in it, length of its texts,
    contest in percent, *index of the value of each filter, or -1]}; see `contests`. A piece is the base64 of the
    zlib-compressed JSON {"texts": [...], "rows": [...]}, in which a row refers to its texts by their index.
    """
    numbers: dict[str, dict[str, int]] = {name: {} for name in FILTERS}
    where: dict[tuple[int, int], tuple[int, int]] = {}
    pieces = []
    for piece, members in enumerate(_pieces(judges)):
        pool: dict[str, int] = {}
        packed = []
        for position, (judge, number) in enumerate(members):
            where[judge, number] = (piece, position)
            packed.append(_packed(judges[judge][number], pool, [judge, number]))
        raw = f'{{"texts":{to_json(list(pool))},"rows":[{",".join(packed)}]}}'
        pieces.append(base64.b64encode(zlib.compress(raw.encode(), 6)).decode())
    index, contested = [], contests(judges)
    for judge, judged in enumerate(judges):
        index.append([])
        for number, row in enumerate(judged):
            facets = [
                numbers[name].setdefault(value, len(numbers[name])) if (value := row["facets"].get(name)) else -1
                for name in FILTERS
            ]
            brief = " ".join(row["question"][: 2 * BRIEF].split())[:BRIEF]
            at = [*where[judge, number], _length(row), contested[row["id"]]]
            index[-1].append([row["id"], brief, *at, *facets])
    return {"filters": {name: list(values) for name, values in numbers.items()}, "rows": index}, pieces


def _length(row: dict[str, Any]) -> int:
    """Returns the tokens of the row's texts or, where they are not known, a quarter of the characters of what is shown
    of them."""
    tokens = sum(map(sum, row["tokens"] or ()))
    return tokens or len(row["traces"]) // 4


def contests(judges: Sequence[Sequence[dict[str, Any]]]) -> dict[str, int]:
    """Returns how contested each pair is, by its id: 100 where all texts of all judges name A as often as B, and 0
    where all that have a verdict name the same answer."""
    votes: dict[str, Counter[str | None]] = {}
    for row in itertools.chain(*judges):
        verdicts = list(itertools.chain(*row["verdicts"])) or [row["winner"]]
        votes.setdefault(row["id"], Counter()).update(verdicts)
    return {name: round(200 * min(given["A"], given["B"]) / given.total()) for name, given in votes.items()}


def _pieces(judges: Sequence[Sequence[dict[str, Any]]]) -> Iterator[list[tuple[int, int]]]:
    """Yields the rows of each piece as (judge, number). Rows of the same question follow each other."""
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
    """Returns the row as JSON with its texts' indices in the pool. `at`: the judge and the row's number."""
    kept = {name: row[name] for name in ("better", "winner", "status", "verdicts")} | {"at": at}
    kept |= {
        name: row[name] for name in ("votes", "tokens", "scores", "note", "meta", "reasons", "reason") if row[name]
    }
    kept |= {name: pool.setdefault(row[name], len(pool)) for name in ("question", "a", "b")}
    return f'{to_json(kept, separators=(",", ":"))[:-1]},"traces":{row["traces"]}}}'


def _reason(row: Judged, settings: dict[str, Any]) -> str | None:
    """Returns why a row has no verdict. Rows of earlier versions do not say it: it is read from the texts again, and a
    text of as many tokens as the limit in the settings was cut off there."""
    if row["status"] != "invalid" or row.get("reason"):
        return row.get("reason")
    texts, verdicts, tokens = (row.get(name) or [] for name in ("texts", "verdicts", "tokens"))
    if not [*map(len, texts)] == [*map(len, verdicts)] == [*map(len, tokens)]:
        return None
    limit, rule = settings.get("max_new_tokens"), settings.get("rule")
    ends = row.get("finish_reasons") or [["length" if n == limit else "" for n in own] for own in tokens]
    if [*map(len, ends)] != [*map(len, texts)]:
        return None
    return main_reason("invalid", why_no_verdict(texts, verdicts, ends, rule if rule in RULES else "eval"))


def _texts(row: Judged) -> dict[str, str]:
    """Returns the question and the answers "a" and "b". The question of two conversations is their common beginning."""
    if "question" in row:
        return {"question": row["question"], "a": row["response_a"], "b": row["response_b"]}
    a, b = row["conversation_a"], row["conversation_b"]
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
    common = min(common, len(a) - 1, len(b) - 1)  # equal answers are still answers

    def text(messages: list[dict[str, str]]) -> str:
        if len(messages) == 1:
            return messages[0]["content"]
        return "\n\n".join(f"{ROLES[message['role']]}: {message['content']}" for message in messages)

    return {"question": text(a[:common]), "a": text(a[common:]), "b": text(b[common:])}


def _trace(text: str, row: dict[str, Any], order: int) -> dict[str, Any]:
    """Returns a judge's text as {"blocks": [[name, bare, spans]], "flaws"}.

    A span is [text, kind, side, found, places]; see `trace.Span` for kind and side. A quote is looked for in the answer
    that the judge saw as this side in this order. `places` are offsets in UTF-16 code units, as JavaScript counts.
    """
    answers = {side: QuoteFinder(row[name]) for side, name in zip("AB", "ba" if order else "ab", strict=True)}
    blocks = []
    for block in blocks_of(text):
        spans: list[list[Any]] = []
        for span in block["spans"]:
            spans.append([span.text, span.kind])
            if span.side:
                answer = answers[span.side]
                found, places = answer.find(span.text) if span.kind == "quote" else ("", [])
                spans[-1] += [span.side, found, [_utf16(answer.text, place) for place in places]]
        blocks.append([block["name"], block["bare"], spans])
    return {"blocks": blocks, "flaws": list(parse_trace(text).flaws)}


def _utf16(text: str, place: tuple[int, int]) -> list[int]:
    if text.isascii():
        return list(place)
    return [len(text[:offset].encode("utf-16-le")) // 2 for offset in place]


def _facets(row: dict[str, Any], kind: str | None) -> dict[str, str | None]:
    """Returns the values that the row is filtered by; a filter without a value is absent or None."""
    meta, verdicts = row["meta"], row["verdicts"]
    facets = {name: meta[name] for name in META if isinstance(meta.get(name), str)}
    if facets.get("domain") == facets.get("section"):
        facets.pop("domain", None)
    chosen, rejected = meta.get("chosen_style"), meta.get("rejected_style")
    if chosen in range(len(STYLES)) and rejected in range(len(STYLES)):
        facets["difficulty"] = "normal" if chosen == rejected else "hard" if chosen < rejected else "easy"
        facets |= {"better_style": STYLES[chosen], "worse_style": STYLES[rejected]}
    right = "right" if row["winner"] == row["better"] else "wrong" if row["better"] else "not known"
    facets["outcome"] = right if row["winner"] else UNDECIDED.get(row["status"], "no verdict")
    facets |= {"better": row["better"] and f"shown as {row['better']}", "kind": kind, "reason": row["reason"]}
    if len(verdicts) == 2:
        first, second = (max(votes, key=votes.count, default=None) for votes in verdicts)
        facets["orders"] = "agree" if first == second else "disagree"
    if verdicts:
        every = set(row["quotes"]) == {"found"}
        facets["quotes"] = ("all found" if every else "some not found") if row["quotes"] else "none"
    return facets
