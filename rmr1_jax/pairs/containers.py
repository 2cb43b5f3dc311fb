"""Reads rows from JSONL, JSON, Parquet and CSV files, and from files compressed with gzip.

What a file holds decides how it is read: a JSON array or a row a line, compressed or not. Only Parquet and CSV files
are recognised by the ends of their names. All but arrays are read as they are consumed.

Next: `pairs/read.py`, which makes preference pairs of rows.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import SUFFIXES
from rmr1_jax.files.untrusted import own_file, parse_json, wrong_download
from rmr1_jax.pairs.rows import BadRow, Place, Row, as_paths, describe, open_file

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CONTAINERS = {  # the first bytes of files that are sometimes given the name of another kind
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"SQLite format 3": "an SQLite database",
}
_PLAIN = (".jsonl", ".json", ".parquet")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")  # in JSON or in Python


def read_rows(path: str | Path | Sequence[str | Path]) -> Iterator[Row | BadRow]:
    """Yield the rows of a file, of all data files in a folder, or of several paths.

    A row that is no object is yielded as a BadRow. Raises InputError for a whole file that cannot be read: it is
    absent, cut off, a Git LFS pointer, of an unknown kind, or an invalid JSON array.
    """
    count = itertools.count()
    for file in itertools.chain.from_iterable(map(source_files, as_paths(path))):
        with _open(file) as opened:
            head = opened.read(1024).removeprefix(_BYTE_ORDER_MARK).lstrip(b" \t\r\n")
        if what := wrong_download(file):
            raise InputError(f"{file}: {what}")
        ending = Path(file.name.lower().removesuffix(".gz")).suffix
        kind = next((kind for start, kind in _CONTAINERS.items() if head.startswith(start)), None)
        if kind and not (ending == ".parquet" and kind == "a Parquet file"):
            rename = "name it .parquet" if kind == "a Parquet file" else "unpack it, or write its rows as JSONL"
            raise InputError(f"{file}: is {kind}; {rename}; files that are read: {', '.join(SUFFIXES)}")
        if ending == ".parquet":
            yield from _parquet(file, count)
        elif ending == ".csv":
            yield from _csv(file, count)
        elif head.startswith(b"["):
            yield from _json_array(file, count)
        elif ending in (".jsonl", ".json") or head.startswith(b"{") or not head:
            yield from _jsonl(file, count)
        else:
            raise InputError(f"{file}: the ending {ending!r} is not known; files that are read: {', '.join(SUFFIXES)}")


def source_files(path: str | Path) -> list[Path]:
    """Return the file itself, or the data files anywhere in the folder, sorted; InputError where there are none.

    Compressed and CSV files of a folder are read where it has no others: they often hold the same rows again.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    files = [file for file in files if file.suffix in _PLAIN] or files
    for file in files:
        own_file(file, path, most=2**50)  # of any size, but no link out of a folder from elsewhere
    if not files:
        raise InputError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
    return files


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    """Open a file to read its bytes, unpacked where it is compressed. Raises InputError where that is damaged."""
    with open_file(file, "rb") as opened:
        packed = opened.read(2) == b"\x1f\x8b"
        opened.seek(0)
        try:
            yield gzip.GzipFile(fileobj=opened) if packed else opened
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{file}: not a whole gzip file: {error}") from error


def _jsonl(file: Path, count: Iterator[int]) -> Iterator[Row | BadRow]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not line.strip():
                continue
            place = Place(file=str(file), index=next(count), line=number)
            raw = line.decode(errors="backslashreplace").rstrip("\r\n")
            try:
                yield _object(parse_json(line), place, raw)
            except ValueError as error:
                if number == 1:
                    _check_no_object(file)
                yield BadRow(place, None, str(error), raw)


def _check_no_object(file: Path) -> None:
    """Raise InputError for a file that is one JSON object over several lines; its first line is no JSON then."""
    with _open(file) as opened:
        raw = opened.read(2**26).removeprefix(_BYTE_ORDER_MARK)
    try:
        value = parse_json(raw)
    except ValueError:
        return
    if isinstance(value, dict):
        lists = [name for name, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        rows = f"; the rows may be those in its field {lists[0]!r}: write them alone" if lists else ""
        names = ", ".join(map(repr, itertools.islice(value, 5)))
        raise InputError(f"{file}: is one JSON object ({names}), expected a row a line or an array of rows{rows}")


def _json_array(file: Path, count: Iterator[int]) -> Iterator[Row | BadRow]:
    with _open(file) as opened:
        raw = opened.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        values = parse_json(raw)
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


def _csv(file: Path, count: Iterator[int]) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; by default, texts over 128 KiB would be refused
    with _open(file) as opened:
        reader = csv.reader(_lines(file, opened), strict=True)
        try:
            header = _checked_header(file, next(reader, []))
            end = reader.line_num
            for cells in reader:
                line, end = end + 1, reader.line_num
                if cells:  # a blank line has none
                    yield _csv_row(Place(file=str(file), index=next(count), line=line), header, cells)
        except csv.Error as error:
            raise InputError(f"{file}:{reader.line_num}: not CSV ({error}); is a quotation mark missing?") from error


def _lines(file: Path, opened: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(opened, 1):
        try:
            yield (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{file}:{number}: not UTF-8 at byte {error.start} of the line") from error


def _checked_header(file: Path, header: Sequence[str]) -> list[str]:
    """Return the names of the columns. The index that pandas writes has the name ""."""
    names = [name.strip() for name in header]
    if len(names) == 1 and re.search("[;\t]", names[0]):
        raise InputError(f"{file}:1: the header is the one column {names[0]!r:.200}; separate columns by commas")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{file}:1: the header names the column {min(twice)!r} twice")
    return names


def _csv_row(place: Place, header: Sequence[str], cells: Sequence[str]) -> Row | BadRow:
    """Make the row. An empty cell is null: nothing tells an empty text from one that is missing."""
    raw = json.dumps(cells)
    if len(cells) != len(header):
        return BadRow(place, None, f"has {len(cells)} cells, and the header names {len(header)} columns", raw)
    value: dict[str, object] = {}
    for name, cell in zip(header, cells, strict=True):
        value[name] = cell or None
        if _MESSAGES.match(cell):
            try:
                value[name] = parse_json(cell.encode())
            except ValueError as error:
                reason = f"begins like a list of messages, and is {error}"
                return BadRow(place, name, reason, raw)
    value.pop("", None)
    return Row(value=value, place=place)
