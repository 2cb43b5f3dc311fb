"""A JSONL file that is appended to as its rows are made, so that a killed run loses nothing and does nothing twice.

Rows are on the disk (fsync) when `append_rows` returns. A side file holds the settings they were made with, so that a
run with others cannot continue them unnoticed.

Next: `judge_file.py` and `data/teacher.py`, which write such files; `files.py` for files that are replaced whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rmr1_jax.config import config_differences, current_names
from rmr1_jax.errors import InputError
from rmr1_jax.files.write import write_whole, writing

Item = TypeVar("Item")


def take_up(
    path: Path, settings: Mapping[str, Any], parse: Callable[[dict[str, Any]], Item], *, command: str
) -> list[Item]:
    """What `parse` makes of each row that `path` holds. Half a row at its end, left by a killed run, is cut off.

    Nothing is touched unless `path` is new or empty, or was made with these settings, which `path` + ".run.json" holds.

    Args:
        parse: raises ValueError, KeyError or TypeError for what is no row of this file. command: that writes it.

    Raises:
        InputError: `path` was made with other settings, is not such a file, or cannot be read and written.
    """
    side = path.with_name(path.name + ".run.json")
    settings = json.loads(json.dumps(settings))  # as it will be read back
    try:
        size = path.stat().st_size if path.exists() else 0
        if size and not side.is_file():
            raise InputError(
                f"{path} is there, but not {side.name} beside it, which says how it was made; give another output"
            )
        rows, whole = [], 0
        if size and _has_a_line(path):
            _refuse_changes(path, side, settings, command)  # first: to other settings the rows may mean nothing
            rows, whole = _read_whole_lines(path, parse, command)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(side, json.dumps(settings, indent=2) + "\n")
        if whole < size:
            os.truncate(path, whole)
    except OSError as e:
        raise InputError(f"{e.filename or path}: {e.strerror}; give an output that can be read and written") from e
    return rows


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """For the time of a run that appends to `path`: a second one is refused. The lock ends with the process, however
    that ends; where the file system knows no locks, nobody is refused."""
    import fcntl  # not on every system

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as e:
        raise InputError(f"{e.filename or path}: {e.strerror}; give an output that can be read and written") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"{path}: another run is writing it; wait for its end, or give another output") from e
        except OSError:  # a network file system without locks
            pass
        yield


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]], *, sync: bool = True) -> None:
    """Append rows, each a line; they are on the disk on return, with all before them. RunError where it refuses them.

    sync: whether to wait for the disk, which takes milliseconds. Without, the system has the rows: they outlive this
    process for certain, the machine only from the next call on that waits.
    """
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with (
        writing(path, len(lines), "the rows written so far stand, run the same command again"),
        path.open("ab") as file,
    ):
        file.write(lines)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def files_digest(files: Iterable[Path]) -> str:
    """A short hash of files for the settings: it tells a retrained model or an edited input from the one before.

    It reads names, sizes and up to 256 blocks of 4 KiB spread evenly over each file, so it takes no time for weights.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(4096, size // 256)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def model_digest(directory: Path) -> str:
    """`files_digest` of a model directory: its weights, config and tokenizer."""
    return files_digest([*sorted(directory.glob("*.safetensors")), *sorted(directory.glob("*.json"))])


def _has_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline().endswith(b"\n")


def _read_whole_lines(path: Path, parse: Callable[[dict[str, Any]], Item], command: str) -> tuple[list[Item], int]:
    """The rows, and how many bytes their lines take: all but a last one without its end."""
    rows: list[Item] = []
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                rows.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise InputError(
                    f"{path}:{number}: not a row of `{command}` ({e}); remove the line, or give another output"
                ) from e
            whole += len(line)
    return rows, whole


def _refuse_changes(path: Path, side: Path, settings: Mapping[str, Any], command: str) -> None:
    try:
        old = json.loads(side.read_bytes())
        changed = config_differences(current_names(old), settings)
    except (ValueError, AttributeError, RecursionError) as e:
        raise InputError(f"{side}: not the settings that `{command}` wrote ({e}); give another output") from e
    if changed:
        listed = "; ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise InputError(f"{path} was made with other settings ({listed}); give another output, or remove it")
