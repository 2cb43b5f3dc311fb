"""A row of a file: its fields, checked, with the place of each; and what happens to a row that is bad.

A row that cannot be used is a `BadRow` with file, line, column and field. It stops the reading, or goes into a rejects
file with its reason (`on_bad_row="quarantine"`); either way `ReadReport` reconciles: read = kept + rejected.

Next: `data/containers.py`, which reads rows out of files; `data/preferences.py`, which makes preference pairs of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from rmr1_jax.errors import InputError

Item = TypeVar("Item")


@dataclass(kw_only=True)
class ReadReport:
    """Counts of one pass over a source, final when it is exhausted: read = kept + rejected; `made`: items out of it."""

    read: int = 0
    kept: int = 0
    rejected: int = 0
    made: int = 0

    def __str__(self) -> str:
        return f"{self.read} rows read, {self.kept} kept, {self.rejected} rejected"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a row stands: `line` and `column` from 1, None in Parquet; `index` is its number from 0 in the source."""

    file: str
    index: int
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row {self.index}" if self.line is None else f"{self.file}:{self.line}:{self.column}"


class BadRow(InputError):
    """A row that cannot be used: its place, the field (None: the whole row), the reason, and the row as it stands."""

    def __init__(self, place: Place, field_name: str | None, reason: str, raw: str):
        named = f"field {field_name!r} " if field_name else ""
        super().__init__(f"{place}: {named}{reason}")
        self.place, self.field, self.reason, self.raw = place, field_name, reason, raw


@dataclass(frozen=True, kw_only=True)
class Row:
    """One JSON object and where it came from; its methods give checked fields or raise BadRow."""

    value: Mapping[str, object]
    place: Place
    raw: str = ""

    def bad(self, name: str | None, reason: str) -> BadRow:
        """The error for this row, placed at the field's value where that can be told."""
        place = self.place
        offset = _value_offset(self.raw, name.split("[")[0].split(".")[0]) if name and place.line is not None else 0
        if offset:
            newlines = self.raw.count("\n", 0, offset)
            column = offset - self.raw.rfind("\n", 0, offset) if newlines else place.column + offset
            place = Place(file=place.file, index=place.index, line=place.line + newlines, column=column)
        return BadRow(place, name, reason, self.raw or json.dumps(self.value, default=str))

    def get(self, name: str) -> object:
        """The field as it is; it must be there."""
        if name not in self.value:
            raise self.bad(name, f"is missing; the row has {', '.join(map(repr, self.value)) or 'no fields'}")
        return self.value[name]

    def text(self, name: str) -> str:
        """A field that holds a text."""
        return self.checked_text(self.get(name), name)

    def checked_text(self, value: object, name: str) -> str:
        """`value`, if it is a text; `name` is what the error calls it."""
        if not isinstance(value, str):
            raise self.bad(name, f"is {describe(value)}, expected a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.bad(
                name, f"holds half a surrogate pair at character {error.start + 1}: no valid text"
            ) from error
        return value

    def identifier(self, name: str) -> str:
        """A field that identifies the row: a text that is not empty, or an integer."""
        value = self.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        text = self.checked_text(value, name)
        if not text:
            raise self.bad(name, "is empty, expected an id")
        return text

    def sequence(self, name: str) -> list:
        """A field that holds a list."""
        value = self.get(name)
        if not isinstance(value, list):
            raise self.bad(name, f"is {describe(value)}, expected a list")
        return value

    def mapping(self, value: object, name: str, keys: Sequence[str]) -> Mapping:
        """`value`, if it is an object that has these keys; `name` is what the error calls it."""
        if not isinstance(value, dict):
            raise self.bad(name, f"is {describe(value)}, expected an object with {', '.join(keys)}")
        for key in keys:
            if key not in value:
                raise self.bad(f"{name}.{key}", "is missing")
        return value

    def messages(self, name: str, roles: Sequence[str], last: str) -> list[tuple[str, str]]:
        """A field that holds messages, as (role, content): the roles that may stand in it, and the last one's."""
        found = []
        for number, value in enumerate(self.sequence(name)):
            message = self.mapping(value, f"{name}[{number}]", ("role", "content"))
            if message["role"] not in roles:
                expected = " or ".join(map(repr, roles))
                raise self.bad(f"{name}[{number}].role", f"is {describe(message['role'])}, expected {expected}")
            found.append((message["role"], self.checked_text(message["content"], f"{name}[{number}].content")))
        if not found or found[-1][0] != last:
            raise self.bad(name, f"is {describe(self.value[name])} and must end with a message whose role is {last!r}")
        return found


def open_file(file: Path, mode: str) -> IO:
    """`open`, with an InputError that names the file where it cannot be opened."""
    try:
        return open(file, mode, encoding=None if "b" in mode else "utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be opened ({error.strerror})") from error


def describe(value: object) -> str:
    """A value in a few words of an error message."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    shown = json.dumps(value, default=str)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"


def keep_good(
    rows: Iterable[Row | BadRow],
    parse: Callable[[Row], Sequence[Item]],
    *,
    on_bad_row: str = "error",
    rejects: str | Path | None = None,
    report: ReadReport | None = None,
) -> Iterator[Item]:
    """What `parse` makes of each row; a row for which it raises BadRow stops the reading or goes into `rejects`.

    Args:
        on_bad_row: "error" raises the BadRow; "quarantine" writes it to the file `rejects` and goes on.
        rejects: JSONL, written anew, one object a row: file, line, column, row, field, reason, raw.
        report: is kept up to date while the rows are consumed.
    """
    if on_bad_row not in ("error", "quarantine"):
        raise InputError(f"on_bad_row={on_bad_row!r}: expected 'error' or 'quarantine'")
    if (on_bad_row == "quarantine") != (rejects is not None):
        raise InputError(
            f"on_bad_row={on_bad_row!r} with rejects={rejects!r}: 'quarantine' and a rejects file go together"
        )
    return _keep_good(rows, parse, rejects, ReadReport() if report is None else report)


def _keep_good(
    rows: Iterable[Row | BadRow], parse: Callable[[Row], Sequence[Item]], rejects: str | Path | None, report: ReadReport
) -> Iterator[Item]:
    with ExitStack() as stack:
        written = None if rejects is None else stack.enter_context(open_file(Path(rejects), "w"))
        for row in rows:
            report.read += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                items = parse(row)
            except BadRow as bad:
                report.rejected += 1
                if written is None:
                    raise
                place = {"file": bad.place.file, "line": bad.place.line, "column": bad.place.column}
                reject = {**place, "row": bad.place.index, "field": bad.field, "reason": bad.reason, "raw": bad.raw}
                written.write(json.dumps(reject) + "\n")
                written.flush()  # the rejects must not lag behind the counts when the run is killed
                continue
            report.kept += 1
            report.made += len(items)
            yield from items


def _value_offset(raw: str, name: str) -> int:
    """Where the value of a top-level key begins in the JSON object `raw`; 0 where it has no such key."""
    decoder = json.JSONDecoder()
    position = skip_space(raw, skip_space(raw, 0) + 1)
    while raw[position : position + 1] == '"':
        key, position = decoder.raw_decode(raw, position)
        value_start = skip_space(raw, skip_space(raw, position) + 1)  # past the colon
        if key == name:
            return value_start
        _, position = decoder.raw_decode(raw, value_start)
        position = skip_space(raw, skip_space(raw, position) + 1)  # past the comma
    return 0


def skip_space(text: str, position: int) -> int:
    """The first position from `position` on that is no JSON white space."""
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position
