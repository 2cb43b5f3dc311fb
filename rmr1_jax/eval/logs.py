"""Logs of judgements: the published per-sample formats and our own rows, each made of the other, one row at a time.

Our row is `judge_file.judgement_row`'s. A published entry has the answers as `chosen` and `rejected`, one text, 1 or 0,
and whether the chosen answer stood in B; what we know beside that stands in our own entries under the key `rmr1`, so
that other tools read them, and so that nothing is lost when we read them back.

Next: `rewardbench.py`, `rm_bench.py`, `rmb.py`, whose formats are built of these parts; `run.py`, which uses them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.files.write import writing
from rmr1_jax.judge.judgement import STATUSES, count_votes
from rmr1_jax.pairs.pair import ROLES, PreferencePair
from rmr1_jax.pairs.rows import BadRow, Row, describe, read_rows, source_files
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import eval_verdict

JUDGEMENTS = "judgements.jsonl"


FLAG = "Is_Chosen_Answer_Shuffled_toPositionB"


OURS = "rmr1"  # the key of what our entries say beyond the published format


EXTRAS = ("winner", "status", "votes", "kind", "texts", "verdicts", "tokens", "scores", "note")


_OTHER = {"A": "B", "B": "A"}


# The form of a judgement's fields, of which a file by someone else may have any other.
_META = {
    "rewardbench": {"subset": str},
    "judgebench": {"subset": str},
    "rm-bench": {"item": str, "domain": str, "chosen_style": int, "rejected_style": int},
    "rmb": {"category": str, "item": str},
}


_TYPE = {str: "a text", int: "a whole number"}


_BY_ORDER = {
    "texts": (str, "texts"),
    "verdicts": (str | None, "'A', 'B' or null"),
    "tokens": (int, "whole numbers"),
}


_KNOWN = {"winner": (None, "A", "B"), "status": STATUSES, "kind": (None, "reasoning", "chat")}

Conversation = list[tuple[str, str]]  # (role, content)


Judged = dict[str, Any]  # a row of judgements.jsonl


def with_meta(pair: PreferencePair, **more: Any) -> PreferencePair:
    """The pair with more in its `meta`."""
    return dataclasses.replace(pair, meta={**pair.meta, **more})


# ---- our rows ----


def read_judgements(path: Path) -> Iterator[Judged]:
    """The rows of a judgements.jsonl, as they stand. Raises BadRow with the place for a row that is none."""
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise row
        row.identifier("id")
        if row.get("better") not in ("A", "B"):
            raise row.bad("better", f"is {describe(row.value['better'])}, expected 'A' or 'B'")
        if not isinstance(row.get("correct"), bool):
            raise row.bad("correct", f"is {describe(row.value['correct'])}, expected true or false")
        for name in ("winner", "status"):
            row.get(name)
        meta = row.mapping(row.get("meta"), "meta", ("benchmark",))
        for name, kind in _META.get(str(meta["benchmark"]), {}).items():
            if type(meta.get(name)) is not kind:
                raise row.bad(f"meta.{name}", f"is {describe(meta.get(name))}, expected {_TYPE[kind]}")
        if type(meta.get("number", 0)) is not int:
            raise row.bad("meta.number", f"is {describe(meta['number'])}, expected {_TYPE[int]}")
        if "question" in row.value:
            for name in ("question", "response_a", "response_b"):
                row.text(name)
        else:
            for name in ("conversation_a", "conversation_b"):
                row.messages(name, ROLES, last="assistant")
        _check_form(row, row.value)
        yield dict(row.value)


def _check_form(row: Row, fields: Mapping[str, Any], prefix: str = "") -> None:
    """Raises BadRow where a field of a judgement, if it is there, has another form than `judgement_row` gives it."""
    for name, (kind, expected) in _BY_ORDER.items():
        value = fields.get(name, [])
        orders = value if isinstance(value, list) else [None]
        flat = [each for own in orders if isinstance(own, list) for each in own]
        if not all(isinstance(own, list) for own in orders) or not all(
            isinstance(each, kind) and (kind is not int or 0 <= each < 2**31) for each in flat
        ):
            raise row.bad(prefix + name, f"is {describe(value)}, expected a list of orders, each a list of {expected}")
    for name, known in _KNOWN.items():
        if fields.get(name, known[0]) not in known:
            raise row.bad(prefix + name, f"is {describe(fields[name])}, expected one of {known}")
    votes, scores = fields.get("votes", {}), fields.get("scores")
    if not isinstance(votes, dict) or not all(type(count) is int for count in votes.values()):
        raise row.bad(f"{prefix}votes", f"is {describe(votes)}, expected the counts of A, B and invalid")
    if scores is not None and not (
        isinstance(scores, list) and len(scores) == 2 and all(isinstance(score, int | float) for score in scores)
    ):
        raise row.bad(f"{prefix}scores", f"is {describe(scores)}, expected two numbers")


def conversations(row: Judged) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation."""
    if "question" in row:
        a, b = ([("user", row["question"]), ("assistant", row[f"response_{side}"])] for side in "ab")
    else:
        a, b = ([(m["role"], m["content"]) for m in row[f"conversation_{side}"]] for side in "ab")
    return (a, b) if row["better"] == "A" else (b, a)


# ---- published entries ----


def as_messages(conversation: Conversation) -> list[dict[str, str]]:
    """A conversation in the published logs' form."""
    return [{"content": content, "role": role} for role, content in conversation]


def shown_text(row: Judged) -> str:
    """The text that stands for the judgement in a published log: one that saw the answers in the order of the flag, and
    names the winner where there is one."""
    if not row["texts"]:
        return ""
    verdicts = row["verdicts"][0]
    return row["texts"][0][verdicts.index(row["winner"]) if row["winner"] in verdicts else 0]


def extras(row: Judged) -> dict[str, Any]:
    """What our entries say beyond the published format; the texts only where they are not just the one shown."""
    shown = sum(map(len, row["texts"])) == 1
    return {key: row[key] for key in EXTRAS if key in row and not (key == "texts" and shown)}


def judged(
    entry: Row,
    *,
    id: str,
    chosen: Conversation,
    rejected: Conversation,
    text: str | None,
    result: object,
    in_b: object,
    meta: Mapping[str, Any],
    ours: object = None,
) -> Judged:
    """Our row for an entry of a published log, `ours` being what one of our own entries says beyond the format.

    The log's own result counts, a tie (0.5) as not right; where its text says otherwise by the published rule, the
    row's `note` says so.
    """
    if isinstance(result, bool) or result not in (0, 1, 0.5):
        raise entry.bad("results", f"is {describe(result)}, expected 1 or 0")
    if not isinstance(in_b, bool):
        raise entry.bad(FLAG, f"is {describe(in_b)}, expected true or false")
    better, correct = "B" if in_b else "A", result == 1
    verdict = eval_verdict(text or "")
    winner = better if correct else _OTHER[better] if verdict == _OTHER[better] else None
    row: Judged = {"id": id, "better": better, "winner": winner}
    row |= {"status": "ok" if winner else "invalid", "correct": correct, "votes": count_votes([winner])}
    a, b = (rejected, chosen) if in_b else (chosen, rejected)
    if len(a) == len(b) == 2 and a[0] == b[0]:
        row |= {"question": a[0][1], "response_a": a[1][1], "response_b": b[1][1]}
    else:
        row |= {f"conversation_{s}": [{"role": r, "content": c} for r, c in own] for s, own in (("a", a), ("b", b))}
    row |= {"meta": dict(meta), "kind": parse_trace(text).kind if text else None}
    row |= {"texts": [[text]] if text is not None else [], "verdicts": [[verdict]] if text is not None else []}
    row["tokens"] = []
    if not isinstance(ours, dict) and text and (verdict == better) != correct:
        row["note"] = f"the log says {result}, its text says {verdict or 'nothing'}"
    return with_ours(entry, row, ours)


def with_ours(entry: Row, row: Judged, ours: object) -> Judged:
    """The row with what one of our own entries says beyond the published format; nothing where it is another's."""
    if not isinstance(ours, dict):
        return row
    _check_form(entry, ours, f"{OURS}.")
    return {**row, **{key: ours[key] for key in EXTRAS if key in ours}}


def messages_of(entry: Row, name: str) -> Conversation:
    """A field of a published entry that holds a conversation."""
    return entry.messages(name, ("user", "assistant"), last="assistant")


def log_files(path: Path, wanted: Callable[[Path], bool], expected: str, pattern: str = "*.json") -> list[Path]:
    """The log files that `path` stands for: itself, our judgements in it, or what is `wanted` anywhere below it."""
    if not path.is_dir():
        return source_files(path)
    if (path / JUDGEMENTS).is_file():
        return [path / JUDGEMENTS]
    found = [file for file in sorted(path.rglob(pattern)) if wanted(file)]
    if not found:
        raise InputError(f"{path}: holds no {JUDGEMENTS} and no {expected}")
    return found


def is_ours(path: Path) -> bool:
    """Whether a log file holds our rows. Published logs are JSON arrays, but for JudgeBench's."""
    if path.suffix != ".jsonl":
        return False
    first = next(read_rows(path), None)
    return not isinstance(first, Row) or "judgments" not in first.value


# ---- writing ----


class ArrayFiles:
    """JSON arrays (or JSONL, by the name) written element by element, in the published logs' layout. They are in their
    places, whole, when the `with` ends well; otherwise what stood there before still does."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._open: dict[str, Any] = {}

    def __enter__(self) -> ArrayFiles:
        self._stack = ExitStack()
        return self

    def add(self, name: str, element: Mapping[str, Any]) -> None:
        """One more element for the file `name`, a path below the directory."""
        first, later, indent = ("", "", None) if name.endswith(".jsonl") else ("[\n ", ",\n ", 1)
        text = json.dumps(element, indent=indent, ensure_ascii=False).replace("\n", "\n ")
        text += "\n" if name.endswith(".jsonl") else ""
        with writing(self.directory / name, then="run the same command again"):
            if name not in self._open:
                path = self._partial(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                # Half a surrogate pair is no UTF-8; escaped, it is JSON again.
                file = path.open("w", encoding="utf-8", errors="backslashreplace")
                self._open[name] = self._stack.enter_context(file)
                file.write(first + text)
            else:
                self._open[name].write(later + text)

    def __exit__(self, kind, value, trace) -> None:
        with self._stack, writing(self.directory, then="run the same command again"):
            for name, file in self._open.items() if kind is None else ():
                file.write("" if name.endswith(".jsonl") else "\n]")
                file.flush()
                os.fsync(file.fileno())
        for name in self._open:
            if kind is None:
                self._partial(name).replace(self.directory / name)
            else:
                self._partial(name).unlink()

    def _partial(self, name: str) -> Path:
        return self.directory / f"{name}.partial"


def share(outcomes: Sequence[bool]) -> float:
    """Of right ones."""
    return sum(outcomes) / len(outcomes)
