"""Writing files whole: neither a kill nor a full disk leaves half a file, and an error says which file and why.

Next: `append.py`, for files that grow row by row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rmr1_jax.errors import RunError


@contextmanager
def writing(path: Path, size: int | None = None, then: str = "make room or mend it") -> Iterator[None]:
    """Turn an OSError of a write to `path` into a `RunError` that names the file, the reason and the free space.

    size: the bytes to be written, if known. then: what the user should do, and what remains valid.
    """
    try:
        yield
    except OSError as e:
        raise RunError(refusal(Path(e.filename or path), e.strerror or str(e), size, then)) from e


def refusal(path: Path, why: str, size: int | None, then: str) -> str:
    """Return the message for a write that failed, with the bytes that were needed and those that are free."""
    wanted = "" if size is None else f"{size:,} bytes wanted, "
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    try:
        free = f"{shutil.disk_usage(existing).free:,} bytes free"
    except OSError as e:
        free = f"free space unknown: {e.strerror}"
    return f"{path} cannot be written: {why} ({wanted}{free}); {then}"


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Replace a text file, given whole or in pieces: after a kill either the old or the new file is complete on the
    disk. Raises RunError if it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    with writing(path, len(text.encode()) if isinstance(text, str) else None):
        with partial.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def provenance() -> dict[str, str]:
    """Return the version of this package and the present time (UTC, to the second), to be kept with a result."""
    return {"version": package_version(), "written": datetime.now(UTC).isoformat(timespec="seconds")}


def package_version() -> str:
    """Return the version of this package, or "0+unknown" for a checkout that is not installed."""
    try:
        return version("rmr1-jax")
    except PackageNotFoundError:
        return "0+unknown"


def to_json(value: Any, **options: Any) -> str:
    """Return `value` as JSON, with null for NaN and the infinities: JSON has no such numbers, and other readers refuse
    the tokens that Python writes for them. `options` are those of `json.dumps`."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_without_nan(key): _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def to_disk(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a directory after a rename, are on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_written(path: Path) -> dict[str, Any]:
    """Return {"bytes", "sha256"} of a file that was just written, and make sure that it is on the disk. The file leaves
    the page cache, which would hide damage on the disk from the next reader."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": size, "sha256": digest}
