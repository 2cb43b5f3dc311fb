"""A row of a file: its fields, checked, with the place of each; and what happens to a row that is bad.

A row that cannot be used is a `BadRow` with file, line, column and field. It stops the reading, or goes into a rejects
file with its reason (`on_bad_row="quarantine"`); either way `ReadReport` reconciles: read = kept + rejected.

Next: `data/containers.py`, which reads rows out of files; `data/preferences.py`, which makes preference pairs of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import SUFFIXES
from rmr1_jax.files.untrusted import own_file, unique

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


MAX_SOURCE = 2**50  # bytes: any


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: str | Path) -> Iterator[Row | BadRow]:
    """The rows of a JSONL, JSON-array or Parquet file, or of all such files in a folder, sorted by path.

    A line that is no JSON object comes out as a BadRow. What spoils a whole file (not there, cut off, a Git LFS
    pointer, an array that is not valid JSON) raises InputError with the place.
    """
    count = itertools.count()
    for file in source_files(path):
        with open_file(file, "rb") as opened:
            head = opened.read(1024).removeprefix(_BYTE_ORDER_MARK).lstrip()
        if head.startswith(b"version https://git-lfs"):
            raise InputError(f"{file}: this is a Git LFS pointer, not the data; fetch the file itself (git lfs pull)")
        if head[:15].lower().startswith((b"<!doctype html", b"<html")):
            raise InputError(f"{file}: this is an HTML page, not the data; download the raw file")
        if file.suffix == ".parquet":
            yield from _parquet(file, count)
        elif head.startswith(b"["):
            yield from _json_array(file, count)
        else:
            yield from _jsonl(file, count)


def source_files(path: str | Path) -> list[Path]:
    """The file itself, or the data files anywhere in the folder, sorted; InputError where there are none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    for file in files:
        own_file(file, path, most=MAX_SOURCE)  # a folder from elsewhere: a link may lead out of it
    if not files:
        raise InputError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
    return files


def refuse_as_rejects(rejects: str | Path | None, path: str | Path) -> None:
    """Raises InputError where writing `rejects` would overwrite the source, or become part of it."""
    if rejects is None:
        return
    source, written = Path(path).resolve(), Path(rejects).resolve()
    if written == source or (source.is_dir() and source in written.parents):
        raise InputError(f"rejects={str(rejects)!r} lies in the source {path}; choose a file outside it")


def _jsonl(file: Path, count: Iterator[int]) -> Iterator[Row | BadRow]:
    with open_file(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield _json_line(line, Place(file=str(file), index=next(count), line=number, column=1))


def _json_line(line: bytes, place: Place) -> Row | BadRow:
    raw = line.decode(errors="backslashreplace").rstrip("\r\n")
    try:
        value = json.loads(line.decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        return BadRow(replace(place, column=column), None, f"not UTF-8 (byte 0x{line[error.start]:02x})", raw)
    except json.JSONDecodeError as error:
        return BadRow(replace(place, column=min(error.pos, len(raw)) + 1), None, f"not JSON: {error.msg}", raw)
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
        return BadRow(place, None, f"JSON that cannot be read: {error}", raw)
    return _object(value, place, raw)


def _object(value: object, place: Place, raw: str) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value=value, place=place, raw=raw)
    return BadRow(place, None, f"is {describe(value)}, expected a JSON object", raw)


def _json_array(file: Path, count: Iterator[int]) -> Iterator[Row | BadRow]:
    """The array's elements. They are decoded one by one so that each has its place."""
    text = _decoded(file)
    decoder, line, line_start, counted = json.JSONDecoder(object_pairs_hook=unique), 1, 0, 0
    position = skip_space(text, skip_space(text, 0) + 1)
    ended = text[position : position + 1] == "]"
    while not ended:
        line += text.count("\n", counted, position)
        line_start = max(line_start, text.rfind("\n", counted, position) + 1)
        counted = position
        place = Place(file=str(file), index=next(count), line=line, column=position - line_start + 1)
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            trailing = text[position : position + 1] == "]"
            reason = "there is a comma before the closing bracket" if trailing else error.msg
            raise InputError(f"{file}:{error.lineno}:{error.colno}: not JSON: {reason}") from error
        except (RecursionError, ValueError) as error:
            raise InputError(f"{place}: JSON that cannot be read: {error}") from error
        yield _object(value, place, text[position:end])
        position = skip_space(text, end)
        separator = text[position : position + 1]
        if separator not in ("]", ","):
            got = repr(separator) if separator else "the end of the file"
            raise InputError(f"{file}: not JSON: after the element at {place} expected ',' or ']', got {got}")
        ended = separator == "]"
        if not ended:
            position = skip_space(text, position + 1)
    if skip_space(text, position + 1) != len(text):
        raise InputError(f"{file}: not JSON: there is text after the closing bracket")


def _decoded(file: Path) -> str:
    with open_file(file, "rb") as opened:
        content = opened.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        place = f"{file}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise InputError(f"{place}: not UTF-8 (byte 0x{content[error.start]:02x})") from error


def _parquet(file: Path, count: Iterator[int]) -> Iterator[Row]:
    import pyarrow as pa  # here: it takes a third of a second, and most sources are JSON
    import pyarrow.parquet as pq

    try:
        table, found = pq.ParquetFile(file), 0
        for batch in table.iter_batches(batch_size=256):
            for value in batch.to_pylist():
                yield Row(value=value, place=Place(file=str(file), index=next(count)))
            found += batch.num_rows
        if found != table.metadata.num_rows:  # damaged where it lists its parts: they would be passed over in silence
            raise InputError(f"{file}: says that it has {table.metadata.num_rows} rows, but {found} could be read")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable Parquet file: {error}") from error
