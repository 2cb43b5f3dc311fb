"""Reading the files of a run for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.rows import BadRow, Row, describe, read_rows

DEPTH = 2  # how far below a run directory its parts may lie


def named_roots(run_dirs: Sequence[Path]) -> list[tuple[str, Path]]:
    """Each directory with the shortest end of its path that tells it from the others; one given twice counts once."""
    roots = list(dict.fromkeys(Path(run).resolve() for run in run_dirs))
    if not roots:
        raise InputError("no run directory given; expected at least one")
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root}: {'not a directory' if root.exists() else 'no such directory'}; give a run's")
    length = 1
    while len({root.parts[-length:] for root in roots}) < len(roots):
        length += 1
    return [("/".join(root.parts[-length:]), root) for root in roots]


def find_holders(root: Path, names: Sequence[str]) -> list[Path]:
    """The directories from `root` to DEPTH below it that hold a file of one of these names; links are not followed."""

    def walk(directory: Path, depth: int) -> Iterator[Path]:
        if any((directory / name).is_file() for name in names):
            yield directory
        for child in sorted(directory.iterdir()) if depth else ():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from walk(child, depth - 1)

    return list(walk(root, DEPTH))


def read_text(file: Path) -> str:
    """The file as UTF-8."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8; expected a text file") from None


def as_number(value: object) -> float | None:
    """The value as a float; None for what is no number. An integer beyond a float's range counts as infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def jsonl_rows(file: Path, warnings: list[str]) -> Iterator[Row]:
    """The rows of a JSONL file; raises the first bad one, unless it is a last line without its end."""
    rows = read_rows(file)
    for row in rows:
        if isinstance(row, BadRow):
            if next(rows, None) is None and not file.read_bytes().endswith(b"\n"):
                warnings.append(
                    f"{file}:{row.place.line}: the last line is cut short (still written?); it is left out."
                )
                return
            raise row
        yield row


def text_of(row: Row, name: str) -> str:
    """A field that holds a text, "" where it is absent or null."""
    value = row.value.get(name)
    return "" if value is None else row.checked_text(value, name)


def json_object(file: Path) -> dict[str, Any]:
    """The file's one JSON object; InputError (file, line, column) where it holds something else."""
    try:
        found = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}:{error.colno}: not JSON ({error.msg}); expected one object") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: JSON that cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: is {describe(found)}, expected a JSON object")
    return found
