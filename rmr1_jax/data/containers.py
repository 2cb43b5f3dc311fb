"""Rows out of JSONL, JSON arrays and Parquet, each with its place.

JSONL is read line by line, an array element by element, Parquet batch by batch; a folder stands for its files in order.
What the rows mean is not looked at here.

Next: `data/preferences.py` and `data/published.py`, which do.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rmr1_jax.data.rows import BadRow, Place, Row, describe, open_file, skip_space
from rmr1_jax.data.strangers import own_file, unique
from rmr1_jax.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet")
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
