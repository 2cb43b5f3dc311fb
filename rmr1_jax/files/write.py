"""Writing files: neither a kill nor a full disk leaves half of one, and a refusal says what and where."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rmr1_jax.errors import RunError


@contextmanager
def writing(path: Path, size: int | None = None, then: str = "make room or mend it") -> Iterator[None]:
    """For the time of a write to `path`: what the file system refuses becomes a `RunError` that says what and where.

    Args:
        size: bytes that are wanted, where known. then: what to do about it, and what stands.
    """
    try:
        yield
    except OSError as e:
        raise RunError(refusal(Path(e.filename or path), e.strerror or str(e), size, then)) from e


def refusal(path: Path, why: str, size: int | None, then: str) -> str:
    """The message for a write that was refused, with the bytes that were wanted and those that are free."""
    wanted = "" if size is None else f"{size:,} bytes wanted, "
    return f"{path} cannot be written: {why} ({wanted}{free_bytes(path)}); {then}"


def free_bytes(path: Path) -> str:
    """What is free where `path` lies or would lie, in words."""
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    try:
        return f"{shutil.disk_usage(there).free:,} bytes free"
    except OSError as e:
        return f"free space unknown: {e.strerror}"


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file, given whole or in pieces: after a kill the old one is there, or the new one, on the disk and
    whole. Raises RunError."""
    partial = path.with_name(path.name + ".partial")
    with writing(path, len(text.encode()) if isinstance(text, str) else None):
        with partial.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def to_disk(path: Path) -> None:
    """A file's bytes, or the names in a directory after a rename in it: on the disk on return."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_written(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file that was just written; on the disk, and out of the memory that would hide its loss
    from who reads it again."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": size, "sha256": digest}
