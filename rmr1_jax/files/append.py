"""JSONL files that grow row by row, so that a run that was killed loses no row and makes none twice.

Rows are on the disk (fsync) when `append_rows` returns. A second file beside the rows, with the suffix .run.json, holds
the settings that they were made with, so that a run with other settings is refused.

Next: `distributed/rows.py`, such a file that several processes write.
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
from rmr1_jax.files.write import to_json, write_whole, writing

Item = TypeVar("Item")


def settings_file(path: Path) -> Path:
    """Return the file beside `path` that holds the settings which its rows were made with."""
    return path.with_name(f"{path.name}.run.json")


def resume_rows(
    path: Path, settings: Mapping[str, Any], parse: Callable[[dict[str, Any]], Item], *, command: str
) -> list[Item]:
    """Parse the rows that `path` holds, and prepare it for `append_rows`.

    An incomplete last line, left by a killed run, is cut off. The files are changed only if `path` is new or empty, or
    was made with these settings, according to `settings_file(path)`.

    Args:
        parse: converts a row; raises ValueError, KeyError or TypeError for a row that this file cannot hold.
        command: the command that writes the file, for messages.

    Raises:
        InputError: `path` was made with other settings, is not such a file, or cannot be read and written.
    """
    side = settings_file(path)
    settings = json.loads(json.dumps(settings))  # as the file will give them back
    rows: list[Item] = []
    with _readable_and_writable(path), path.open("a+b") as file:
        if file.tell() and not side.is_file():
            raise InputError(
                f"{path} exists, but not {side.name} beside it, which holds its settings; give another output"
            )
        file.seek(0)
        whole = 0  # bytes of the complete lines
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            if number == 1:  # other settings may not parse the rows
                _refuse_changes(path, side, settings, command)
            try:
                rows.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise InputError(
                    f"{path}:{number}: not a row of `{command}` ({e}); remove the line, or give another output"
                ) from e
            whole += len(line)
        if not whole:
            write_whole(side, json.dumps(settings, indent=2) + "\n")
        file.truncate(whole)
    return rows


@contextmanager
def lock_for_writing(path: Path) -> Iterator[None]:
    """Lock `path` against a second run that would write it. The lock ends with the process, however that ends. A file
    system without locks refuses nothing. Raises InputError if another run holds the lock, or `path` cannot be written.
    """
    import fcntl  # not on every operating system

    with _readable_and_writable(path):
        file = path.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"{path}: another run is writing it; wait for its end, or give another output") from e
        except OSError:  # a network file system without locks
            pass
        yield


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]], *, sync: bool = True) -> None:
    """Append rows, one a line. Raises RunError if they cannot be written.

    Args:
        sync: wait until these rows and all before them are on the disk, which takes milliseconds. Otherwise the rows
            survive the end of this process, but not a crash of the machine before the next call with `sync`.
    """
    lines = "".join(to_json(row) + "\n" for row in rows).encode()
    advice = "the rows written so far stand, run the same command again"
    with writing(path, len(lines), advice), path.open("ab") as file:
        file.write(lines)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def files_digest(files: Iterable[Path]) -> str:
    """Return a short hash of files, for settings: a retrained model or an edited input has another one.

    It covers names, sizes and up to 256 blocks of 4 KiB spread evenly over each file, so it is fast for weights too.
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
    """Return `files_digest` of a model directory: its weights, config and tokenizer."""
    return files_digest([*sorted(directory.glob("*.safetensors")), *sorted(directory.glob("*.json"))])


@contextmanager
def _readable_and_writable(path: Path) -> Iterator[None]:
    """Make the directory of `path`, and turn an OSError in the block into an InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise InputError(f"{e.filename or path}: {e.strerror}; give an output that can be read and written") from e


def _refuse_changes(path: Path, side: Path, settings: Mapping[str, Any], command: str) -> None:
    try:
        old = json.loads(side.read_bytes())
        changed = config_differences(current_names(old), settings)
    except (ValueError, AttributeError, RecursionError) as e:
        raise InputError(f"{side}: not the settings that `{command}` wrote ({e}); give another output") from e
    if changed:
        listed = "; ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise InputError(f"{path} was made with other settings ({listed}); give another output, or remove it")
