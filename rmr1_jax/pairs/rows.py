"""Defines `Row`, which checks the fields of one row of a file, and sets bad rows aside.

A row that cannot be used is a `BadRow`, an error with file, line and field. It stops the reading, or is written to a
rejects file with its reason; in both cases the counts of `ReadReport` add up: read = kept + rejected.

Next: `pairs/containers.py`, which reads rows from files; `pairs/read.py`, which makes preference pairs of rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import ROLES

Item = TypeVar("Item")  # has an `id`


@dataclass(kw_only=True)
class ReadReport:
    """Counts of one pass over a source, final at its end: read = kept + rejected; made: the items of the kept rows."""

    read: int = 0
    kept: int = 0
    rejected: int = 0
    made: int = 0

    def __str__(self) -> str:
        return f"{self.read} rows read, {self.kept} kept, {self.rejected} rejected"


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a row: its number `index` from 0 in the source, and its `line` from 1 in JSONL and CSV."""

    file: str
    index: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row {self.index}" if self.line is None else f"{self.file}:{self.line}"

    def within(self) -> str:
        """Returns the place within its file, counted as the whole place is."""
        return f"row {self.index}" if self.line is None else f"line {self.line}"


class BadRow(InputError):
    """A row that cannot be used: its place, the field (None: the whole row), the reason, and the row's text."""

    def __init__(self, place: Place, field: str | None, reason: str, raw: str):
        super().__init__(f"{place}: {f'field {field!r} ' if field else ''}{reason}")
        self.place, self.field, self.reason, self.raw = place, field, reason, raw


@dataclass(frozen=True, kw_only=True)
class Row:
    """One JSON object and its place. The methods return checked fields, and raise BadRow where a check fails."""

    value: Mapping[str, object]
    place: Place
    raw: str = ""

    def bad(self, name: str | None, reason: str) -> BadRow:
        """Make the error for this row and field."""
        return BadRow(self.place, name, reason, self.raw or json.dumps(self.value, default=str))

    def get(self, name: str) -> object:
        """Return the value of a field that must be present."""
        if name not in self.value:
            raise self.bad(name, f"is missing; the row has {', '.join(map(repr, self.value)) or 'no fields'}")
        return self.value[name]

    def text(self, name: str) -> str:
        """Return a field that must be a text."""
        return self.checked_text(self.get(name), name)

    def checked_text(self, value: object, name: str) -> str:
        """Return `value`, which must be a text. `name` stands for it in errors."""
        if not isinstance(value, str):
            raise self.bad(name, f"is {describe(value)}, expected a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            reason = f"holds half a surrogate pair at character {error.start + 1}: no valid text"
            raise self.bad(name, reason) from error
        return value

    def identifier(self, name: str) -> str:
        """Return a field that identifies the row: an integer, or a text that is not empty."""
        value = self.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not (text := self.checked_text(value, name)):
            raise self.bad(name, "is empty, expected an id")
        return text

    def name(self) -> str:
        """Return the row's `id`, or its number in the source where it has none."""
        return str(self.place.index) if self.value.get("id") is None else self.identifier("id")

    def side(self, name: str) -> str | None:
        """Return a field that names a side, "A" or "B"; None where it is null or absent."""
        value = self.value.get(name)
        if value not in ("A", "B", None):
            raise self.bad(name, f"is {value!r}, expected 'A', 'B' or null")
        return value

    def sequence(self, name: str) -> list:
        """Return a field that must be a list."""
        value = self.get(name)
        if not isinstance(value, list):
            raise self.bad(name, f"is {describe(value)}, expected a list")
        return value

    def mapping(self, value: object, name: str, keys: Sequence[str]) -> Mapping:
        """Return `value`, which must be an object with these keys. `name` stands for it in errors."""
        if not isinstance(value, dict):
            raise self.bad(name, f"is {describe(value)}, expected an object with {', '.join(keys)}")
        for key in keys:
            if key not in value:
                raise self.bad(f"{name}.{key}", "is missing")
        return value

    def messages(self, name: str, roles: Sequence[str], last: str, parts: bool = False) -> list[tuple[str, str]]:
        """Return a field of messages as (role, content). Roles must be in `roles`, and the last one must be `last`.

        Args:
            parts: accept a content that is a list of {type: "text", text}, and join them as chat templates do.
        """
        found = []
        for number, value in enumerate(self.sequence(name)):
            place = f"{name}[{number}]"
            message = self.mapping(value, place, ("role", "content"))
            if message["role"] not in roles:
                expected = " or ".join(map(repr, roles))
                raise self.bad(f"{place}.role", f"is {describe(message['role'])}, expected {expected}")
            if parts and message.get("tool_calls"):
                raise self.bad(f"{place}.tool_calls", "calls a tool; only text can be judged")
            read = self._joined if parts and isinstance(message["content"], list) else self.checked_text
            found.append((message["role"], read(message["content"], f"{place}.content")))
        if not found or found[-1][0] != last:
            raise self.bad(name, f"is {describe(self.value[name])} and must end with a message whose role is {last!r}")
        return found

    def conversation(self, name: str, last: str = "assistant") -> list[tuple[str, str]]:
        """Return a field of messages of a client and a chatbot, perhaps after a system message, as (role, content)."""
        found = self.messages(name, ROLES, last, parts=True)
        for number, (role, _) in enumerate(found):
            if role == "system" and (number or found[1][0] != "user"):
                raise self.bad(f"{name}[{number}].role", "is 'system', expected it only once, first, before a 'user'")
        return found

    def _joined(self, value: list, name: str) -> str:
        texts = []
        for number, part in enumerate(value):
            place = f"{name}[{number}]"
            kind = self.mapping(part, place, ("type",))["type"]
            if kind not in ("text", "input_text", "output_text"):
                raise self.bad(f"{place}.type", f"is {describe(kind)}, expected 'text'; only text can be judged")
            texts.append(self.checked_text(self.mapping(part, place, ("text",))["text"], f"{place}.text"))
        return "".join(texts)


def describe(value: object) -> str:
    """Describe a value in a few words of an error message."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    shown = json.dumps(value, default=str)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"


def parse_rows(
    rows: Iterable[Row | BadRow],
    parse: Callable[[Row], Sequence[Item]],
    *,
    rejects: str | Path | None = None,
    report: ReadReport | None = None,
) -> Iterator[Item]:
    """Yield the items that `parse` makes of each row.

    A row is bad if it could not be read, if `parse` raises BadRow, or if an item has the id of an earlier one.

    Args:
        rejects: a JSONL file, written anew, for the bad rows: file, line, row, field, reason, raw. None: the first bad
            row is raised.
        report: is kept up to date while the items are consumed.
    """
    report = ReadReport() if report is None else report
    seen: dict[str, Place] = {}  # id -> where its row is
    with nullcontext() if rejects is None else open_file(Path(rejects), "w") as rejected:
        for row in rows:
            report.read += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                items = parse(row)
                for item in items:
                    if item.id in seen:
                        raise row.bad("id", f"is {item.id!r} a second time; {seen[item.id].within()} has it too")
            except BadRow as bad:
                report.rejected += 1
                if rejected is None:
                    raise
                place = {"file": bad.place.file, "line": bad.place.line, "row": bad.place.index}
                rejected.write(json.dumps({**place, "field": bad.field, "reason": bad.reason, "raw": bad.raw}) + "\n")
                rejected.flush()  # the rejects must not lag behind the counts when the run is killed
                continue
            seen.update((item.id, row.place) for item in items)
            report.kept += 1
            report.made += len(items)
            yield from items


def check_rejects(rejects: str | Path | None, path: str | Path | Sequence[str | Path]) -> None:
    """Raise InputError where the file `rejects` would overwrite a source, or become part of it."""
    for source in as_paths(path) if rejects is not None else ():
        resolved, written = source.resolve(), Path(rejects).resolve()
        if written == resolved or (resolved.is_dir() and resolved in written.parents):
            raise InputError(f"rejects={str(rejects)!r} lies in the source {source}; choose a file outside it")


def as_paths(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return one path or several as a list."""
    return [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]


def open_file(file: Path, mode: str) -> IO:
    """Open a file. Raises InputError where that fails."""
    try:
        return open(file, mode, encoding=None if "b" in mode else "utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be opened ({error.strerror})") from error
