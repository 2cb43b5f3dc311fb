"""Safe reading of files from directories that somebody else made: regular files of a bounded size, and plain JSON.

Nothing in a directory from the hub is trusted: a link may point to a private file, which an export would then publish;
reading a device never ends; a JSON text of a few bytes a level can be nested a million levels deep. All such problems
are an InputError that names the file.

Next: `model/config.py`, `model/tensor_files.py` and `model/tokenizer.py`, which read model directories.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError

MAX_BYTES = 64 * 2**20  # the largest published tokenizer.json has about 32 MiB, that of Qwen 7 MiB


def own_file(path: Path, root: Path | None = None, *, most: int = MAX_BYTES) -> Path:
    """Return `path` if it is a regular file inside `root` (default: its directory) of at most `most` bytes.

    A link may lead to a file inside `root`, or into the blobs of the hub cache that `root` is a snapshot in. Raises
    InputError if there is no such file, or it is not a regular file, is outside of `root`, or is too large.
    """
    try:
        real, home = path.resolve(), (root or path.parent).resolve()
        blobs = [folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots"]
        if not any(real.is_relative_to(allowed) for allowed in (home, *blobs)):
            raise InputError(f"{path}: is a link out of its directory (to {real}); put a copy of the file there")
        if not real.exists():
            raise InputError(f"{path}: no such file")
        if not real.is_file():
            raise InputError(f"{path}: is not a regular file")
        size = real.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; an invalid name
        raise InputError(f"{path}: cannot be looked up ({error})") from error
    if size > most:
        raise InputError(f"{path}: has {size} bytes, expected at most {most}")
    return path


def wrong_download(path: Path) -> str | None:
    """Describe a file that a download left in place of the data: a Git LFS pointer or an HTML page; None for others."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if head.startswith(b"version https://git-lfs"):
        named = re.search(rb"^size (\d+)", head, re.MULTILINE)
        expected = f"the {int(named[1])} bytes" if named else "the file"
        return f"this is a Git LFS pointer of {size} bytes, not {expected} that it stands for (run git lfs pull)"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return f"this is an HTML page of {size} bytes (a failed download saved under this name)"
    return None


def read_object(path: Path, *, most: int = 2**20) -> dict[str, Any]:
    """Read the JSON object in a file of at most `most` bytes. Raises InputError as `own_file` does, and for a file that
    does not hold one JSON object with distinct keys."""
    own_file(path, most=most)
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_json(raw: bytes) -> Any:
    """Parse a JSON text. Raises ValueError, and nothing else, if it is not valid or repeats a key in one object."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deep to be read") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the object of these keys and values. Raises ValueError for a repeated key, which would lose a value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!r} is repeated in one object")
    return found
