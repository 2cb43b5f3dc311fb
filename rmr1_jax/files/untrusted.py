"""Files of a directory that someone else made: regular ones, in that directory, of a bounded size, JSON without tricks.

A directory from the hub is data, and nothing in it is trusted: a link may point at a private file, which an export
would then publish; a device never ends; a JSON text of a few bytes a level can nest a million levels deep. Whatever is
wrong is an InputError that names the file.

Next: `data/tokens.py`, `model/config.py` and `model/tensor_files.py`, which read model directories through this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError

MAX_BYTES = 64 * 2**20  # the largest published tokenizer.json has about half of it; one of Qwen has 7 MiB


def own_file(path: Path, root: Path | None = None, *, most: int = MAX_BYTES) -> Path:
    """`path`, if it is a regular file inside `root` (default: its directory) of at most `most` bytes.

    A link is followed where it stays inside, or leads into the blobs of the hub cache that `root` is a snapshot in.

    Raises:
        InputError: there is no such file, it is something else, lies elsewhere, or is too large.
    """
    try:
        real, home = path.resolve(), (root or path.parent).resolve()
        blobs = [folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots"]
        if not any(real.is_relative_to(allowed) for allowed in (home, *blobs)):
            raise InputError(f"{path}: is a link out of its directory (to {real}); put the file itself there")
        if not real.exists():
            raise InputError(f"{path}: no such file")
        if not real.is_file():
            raise InputError(f"{path}: is no regular file")
        size = real.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that no file can have
        raise InputError(f"{path}: cannot be looked up ({error})") from error
    if size > most:
        raise InputError(f"{path}: has {size} bytes, expected at most {most}")
    return path


def read_object(path: Path, *, most: int = 2**20) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes.

    Raises:
        InputError: the file cannot be had (`own_file`), or does not hold one JSON object whose keys differ.
    """
    try:
        value = parse_json(own_file(path, most=most).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_json(raw: bytes) -> Any:
    """What a JSON text says. Raises ValueError, and nothing else, where it is none or a key stands twice."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not a JSON file (not UTF-8 at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON file ({error})") from None
    except RecursionError:
        raise ValueError("not a JSON file that can be read (nested too deep)") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; a key that stands twice is a ValueError, for one of its values would go."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found
