"""Reads rows from JSONL, JSON and Parquet files, checks their fields, and sets bad rows aside.

A row that cannot be used is a `BadRow`, an error with file, line and field. It stops the reading, or is written to a
rejects file with its reason; in both cases the counts of `ReadReport` add up: read = kept + rejected.

Next: `pairs/read.py`, which makes preference pairs of rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import SUFFIXES
from rmr1_jax.files.untrusted import own_file, parse_json, wrong_download

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
    """The place of a row: its number `index` from 0 in the source, and its `line` from 1 in JSONL."""

    file: str
    index: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row {self.index}" if self.line is None else f"{self.file}:{self.line}"


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

    def messages(self, name: str, roles: Sequence[str], last: str) -> list[tuple[str, str]]:
        """Return a field of messages as (role, content). Roles must be in `roles`, and the last one must be `last`."""
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
    seen: dict[str, int] = {}  # id -> the number of its row
    with nullcontext() if rejects is None else _open(Path(rejects), "w") as rejected:
        for row in rows:
            report.read += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                items = parse(row)
                for item in items:
                    if item.id in seen:
                        raise row.bad("id", f"is {item.id!r} a second time; row {seen[item.id]} has it too")
            except BadRow as bad:
                report.rejected += 1
                if rejected is None:
                    raise
                place = {"file": bad.place.file, "line": bad.place.line, "row": bad.place.index}
                rejected.write(json.dumps({**place, "field": bad.field, "reason": bad.reason, "raw": bad.raw}) + "\n")
                rejected.flush()  # the rejects must not lag behind the counts when the run is killed
                continue
            seen.update((item.id, row.place.index) for item in items)
            report.kept += 1
            report.made += len(items)
            yield from items


def check_rejects(rejects: str | Path | None, path: str | Path | Sequence[str | Path]) -> None:
    """Raise InputError where the file `rejects` would overwrite a source, or become part of it."""
    for source in _paths(path) if rejects is not None else ():
        resolved, written = source.resolve(), Path(rejects).resolve()
        if written == resolved or (resolved.is_dir() and resolved in written.parents):
            raise InputError(f"rejects={str(rejects)!r} lies in the source {source}; choose a file outside it")


# ---- files ----

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: str | Path | Sequence[str | Path]) -> Iterator[Row | BadRow]:
    """Yield the rows of a JSONL, JSON-array or Parquet file, or of all such files in a folder; or of several paths.

    A line that is no JSON object is yielded as a BadRow. Raises InputError for a whole file that cannot be read: it is
    absent, cut off, a Git LFS pointer or an invalid JSON array.
    """
    count = itertools.count()
    for file in itertools.chain.from_iterable(map(source_files, _paths(path))):
        with _open(file, "rb") as opened:
            head = opened.read(1024).removeprefix(_BYTE_ORDER_MARK).lstrip(b" \t\r\n")
        if what := wrong_download(file):
            raise InputError(f"{file}: {what}")
        if file.suffix == ".parquet":
            yield from _parquet(file, count)
        elif head.startswith(b"["):
            yield from _json_array(file, count)
        else:
            yield from _jsonl(file, count)


def source_files(path: str | Path) -> list[Path]:
    """Return the file itself, or the data files anywhere in the folder, sorted; InputError where there are none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    for file in files:
        own_file(file, path, most=2**50)  # of any size, but no link out of a folder from elsewhere
    if not files:
        raise InputError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
    return files


def _paths(path: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]


def _open(file: Path, mode: str) -> IO:
    try:
        return open(file, mode, encoding=None if "b" in mode else "utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be opened ({error.strerror})") from error


def _jsonl(file: Path, count: Iterator[int]) -> Iterator[Row | BadRow]:
    with _open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not line.strip():
                continue
            place = Place(file=str(file), index=next(count), line=number)
            raw = line.decode(errors="backslashreplace").rstrip("\r\n")
            try:
                yield _object(parse_json(line), place, raw)
            except ValueError as error:
                yield BadRow(place, None, str(error), raw)


def _json_array(file: Path, count: Iterator[int]) -> Iterator[Row | BadRow]:
    try:
        values = parse_json(file.read_bytes().removeprefix(_BYTE_ORDER_MARK))
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
    for value in values:
        yield _object(value, Place(file=str(file), index=next(count)), json.dumps(value))


def _object(value: object, place: Place, raw: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value=value, place=place, raw=raw)
    return BadRow(place, None, f"is {describe(value)}, expected a JSON object", raw)


def _parquet(file: Path, count: Iterator[int]) -> Iterator[Row]:
    import pyarrow as pa  # here: it takes a third of a second, and most sources are JSON
    import pyarrow.parquet as pq

    try:
        table, found = pq.ParquetFile(file), 0
        for batch in table.iter_batches(batch_size=256):
            for value in batch.to_pylist():
                yield Row(value=value, place=Place(file=str(file), index=next(count)))
            found += batch.num_rows
        if found != table.metadata.num_rows:  # a damaged footer can lose row groups without any other error
            raise InputError(f"{file}: says that it has {table.metadata.num_rows} rows, but {found} could be read")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable Parquet file: {error}") from error
