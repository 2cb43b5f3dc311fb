"""Logs of judgements: our judgements.jsonl and the published formats, each converted to the other row by row.

Our rows are made by `judge/rows.judgement_row`. A published entry has the answers as `chosen` and `rejected`, one text,
1 or 0, and whether the chosen answer was shown in B. Our entries have the other fields of a row under the key `rmr1`:
other tools can read the logs, and nothing is lost when we read them back.

Next: `benchmark.py`, the interface of a benchmark; `rewardbench.py`, whose log consists of these parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from rmr1_jax.errors import InputError
from rmr1_jax.files.append import settings_file
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.files.write import to_json, writing
from rmr1_jax.judge.judgement import Judgement, Reason, Status, outcome
from rmr1_jax.judge.rows import judgement_row
from rmr1_jax.pairs.containers import read_rows, source_files
from rmr1_jax.pairs.pair import ROLES, PreferencePair
from rmr1_jax.pairs.rows import BadRow, Row, describe
from rmr1_jax.prompts.trace import Trace, parse_trace
from rmr1_jax.prompts.verdict import Side, Verdict, eval_verdict, other_side

Form = TypeVar("Form", bound=pydantic.BaseModel)
JUDGEMENTS = "judgements.jsonl"
FLAG = "Is_Chosen_Answer_Shuffled_toPositionB"
OURS = "rmr1"  # the key of the fields that our entries have beyond the published format


class _Outcome(pydantic.BaseModel, strict=True):
    """The fields of a row that a published entry does not have, as `judgement_row` writes them."""

    winner: Verdict = None
    status: Status = "ok"
    votes: dict[str, int] = {}
    kind: Literal["reasoning", "chat", None] = None
    texts: list[list[str]] = []  # by order, then by vote; so are verdicts and tokens
    verdicts: list[list[Verdict]] = []
    tokens: list[list[Annotated[int, pydantic.Field(ge=0, lt=2**31)]]] = []
    finish_reasons: list[list[str]] = []
    reasons: list[list[Reason | None]] = []
    reason: Reason | None = None
    prompt_tokens: int = 0
    scores: Annotated[list[float], pydantic.Field(min_length=2, max_length=2)] | None = None
    note: str = ""


class _VerdictRow(_Outcome):
    """A row of `rmr1 judge`, as far as a comparison of two runs needs it."""

    winner: Verdict
    correct: bool
    better: Verdict = None
    meta: dict[str, Any] = {}


class _AnyRow(_VerdictRow):
    """A row of `rmr1 judge`, whose better answer need not be known."""

    correct: bool | None = None
    text: str = ""


class _Meta(pydantic.BaseModel, strict=True):
    """The fields that every row's `meta` has."""

    benchmark: str
    number: int = 0  # the pair's place in the data set


class _JudgementRow(_VerdictRow):
    """A row of judgements.jsonl, without the pair's texts."""

    better: Side
    status: Status
    meta: _Meta


EXTRAS = tuple(_Outcome.model_fields)
Conversation = list[tuple[str, str]]  # (role, content)
Judged = dict[str, Any]  # a row of judgements.jsonl


# ---- our rows ----


def read_judgements(path: Path, warnings: list[str] | None = None, *, verdicts: bool = False) -> Iterator[Judged]:
    """The rows of a file of judgements, as they stand in it, every field checked; see `judgement_row` for the fields.

    Args:
        warnings: a last line that is cut short, as in a file that is still being written, is left out with a warning
            in this list. By default it is an error.
        verdicts: take the rows of `rmr1 judge` too: only id, winner and correct must be there.

    Raises:
        BadRow: an InputError with file, line and field.
    """
    for row in whole_rows(path, warnings):
        row.identifier("id")
        _check(row, _VerdictRow if verdicts else _JudgementRow, row.value)
        if not verdicts and "question" in row.value:
            for name in ("question", "response_a", "response_b"):
                row.text(name)
        elif not verdicts:
            for name in ("conversation_a", "conversation_b"):
                row.messages(name, ROLES, last="assistant")
        yield dict(row.value)


def read_any_rows(path: Path, warnings: list[str] | None = None) -> Iterator[Judged]:
    """The rows of a file of `rmr1 judge` or `rmr1 eval` with the fields of `judgement_row`: those that a row does not
    have are None or empty. See `read_judgements` for the warnings and the errors."""
    for row in whole_rows(path, warnings):
        found = checked_row(row)
        pair = {"question": "", "response_a": "", "response_b": ""}
        if "conversation_a" in row.value:
            for name in ("conversation_a", "conversation_b"):
                row.messages(name, ROLES, last="assistant")
            pair = {}
        elif "question" in row.value:
            pair = {name: row.text(name) for name in pair}
        texts, verdicts = found.texts, found.verdicts
        if found.text and not texts and sum(found.votes.values()) < 2:
            texts, verdicts = [[found.text]], [[found.winner]]
        yield {**pair, "better": None, "meta": {}, **row.value, "texts": texts, "verdicts": verdicts}


def checked_row(row: Row) -> _AnyRow:
    """Check a row of `rmr1 judge` or `rmr1 eval`, but for the pair's texts; raises BadRow for a malformed one."""
    row.identifier("id")
    return _check(row, _AnyRow, row.value)


def whole_rows(path: Path, warnings: list[str] | None = None) -> Iterator[Row]:
    """The rows of a JSONL file; raises the first BadRow. With `warnings`, a last line that is cut short is left out and
    noted there."""
    rows = read_rows(path)
    for row in rows:
        if isinstance(row, BadRow):
            if warnings is None or next(rows, None) is not None or path.read_bytes().endswith(b"\n"):
                raise row
            warnings.append(f"{path}:{row.place.line}: the last line is cut short (still written?); it is left out.")
            return
        yield row


def _check(row: Row, form: type[Form], fields: Mapping[str, Any], prefix: str = "") -> Form:
    """Return `fields` as a `form`; raises BadRow where they have another form."""
    try:
        return form.model_validate(fields)
    except pydantic.ValidationError as e:
        error = e.errors()[0]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
        if error["type"] == "missing":
            raise row.bad(prefix + name, "is missing") from None
        expected = error["msg"].replace("Input should be", "expected")
        raise row.bad(prefix + name, f"is {describe(error['input'])}, {expected}") from None


def conversations(row: Judged) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation."""
    if "question" in row:
        a, b = ([("user", row["question"]), ("assistant", row[f"response_{side}"])] for side in "ab")
    else:
        a, b = ([(m["role"], m["content"]) for m in row[f"conversation_{side}"]] for side in "ab")
    return (a, b) if row["better"] == "A" else (b, a)


# ---- published entries ----


def shown_text(row: Judged) -> str:
    """The one text that a published log has for the judgement: from the first order, naming the winner if one does."""
    if not row["texts"]:
        return ""
    verdicts = row["verdicts"][0]
    return row["texts"][0][verdicts.index(row["winner"]) if row["winner"] in verdicts else 0]


def extras(row: Judged) -> dict[str, Any]:
    """The fields that our entries have beyond the published format; the texts only if there are others than the one
    that is shown."""
    shown = sum(map(len, row["texts"])) == 1
    return {key: row[key] for key in EXTRAS if key in row and not (key == "texts" and shown)}


def published(row: Judged) -> dict[str, Any]:
    """The fields that an entry of RewardBench or RMB has for a judgement row."""
    chosen, rejected = (
        [{"content": content, "role": role} for role, content in conversation] for conversation in conversations(row)
    )
    entry = {"text_chosen": chosen, "text_rejected": rejected, "results": int(row["correct"])}
    return {**entry, "answers": shown_text(row), FLAG: row["better"] == "B", OURS: extras(row)}


def judged(entry: Row, id: str, meta: Mapping[str, Any]) -> Judged:
    """Our row for an entry of a published log, with the fields that `published` gives.

    The log's own result counts; a tie (0.5) is not right. If the text says otherwise by the published rule, the row's
    `note` says so.

    Raises:
        BadRow: a result or a flag that is none.
    """
    chosen, rejected = (entry.conversation(name) for name in ("text_chosen", "text_rejected"))
    text, result, in_b, ours = entry.text("answers"), entry.get("results"), entry.get(FLAG), entry.value.get(OURS)
    if isinstance(result, bool) or result not in (0, 1, 0.5):
        raise entry.bad("results", f"is {describe(result)}, expected 1 or 0")
    if not isinstance(in_b, bool):
        raise entry.bad(FLAG, f"is {describe(in_b)}, expected true or false")
    pair = PreferencePair.from_preference(id, chosen, rejected, chosen_in_b=in_b, meta=meta)
    verdict = eval_verdict(text)
    winner = pair.better if result == 1 else verdict if verdict == other_side(pair.better) else None
    contradiction = text and (verdict == pair.better) != (result == 1) and not isinstance(ours, dict)
    judgement = Judgement(
        **outcome([[winner]]),
        trace=parse_trace(text) if text else Trace(),
        texts=((text,),),
        verdicts=((verdict,),),
        note=f"the log says {result}, its text says {verdict or 'nothing'}" if contradiction else None,
    )
    return with_ours(entry, judgement_row(pair, judgement), ours)


def with_ours(entry: Row, row: Judged, ours: object) -> Judged:
    """The row with the fields that one of our own entries has beyond the published format, if it is ours."""
    if not isinstance(ours, dict):
        return row
    _check(entry, _Outcome, ours, f"{OURS}.")
    return {**row, **{key: ours[key] for key in EXTRAS if key in ours}}


def log_files(path: Path, patterns: Sequence[str]) -> list[Path]:
    """The log files that `path` stands for: a file itself; of a folder our judgements.jsonl in it, otherwise all files
    below it whose names match one of the patterns."""
    if not path.is_dir():
        return source_files(path)
    if (path / JUDGEMENTS).is_file():
        return [path / JUDGEMENTS]
    found = sorted(file for pattern in patterns for file in path.rglob(pattern))
    if not found:
        raise InputError(f"{path}: holds no {JUDGEMENTS} and no {' or '.join(patterns)}")
    return found


def settings_of(judgements: Path) -> dict[str, Any]:
    """The settings beside a file of judgements or verdicts; empty if there are none that can be read."""
    try:
        return read_object(settings_file(judgements))
    except InputError:
        return {}


def is_ours(path: Path) -> bool:
    """Whether a log file holds our rows. Published logs are JSON arrays, except for JudgeBench's."""
    if path.suffix != ".jsonl":
        return False
    first = next(read_rows(path), None)
    return not isinstance(first, Row) or "judgments" not in first.value


# ---- writing ----


class ArrayFiles:
    """JSON arrays (or JSONL, by the name) that are written element by element, in the layout of the published logs.

    They replace the files of an earlier run when the `with` block ends without an error, and only then.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._open: dict[str, Any] = {}

    def __enter__(self) -> ArrayFiles:
        self._stack = ExitStack()
        return self

    def add(self, name: str, element: Mapping[str, Any]) -> None:
        """Append an element to the file `name`, a path below the directory."""
        first, later, indent = ("", "", None) if name.endswith(".jsonl") else ("[\n ", ",\n ", 1)
        text = to_json(element, indent=indent, ensure_ascii=False).replace("\n", "\n ")
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
