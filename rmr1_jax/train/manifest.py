"""The manifest of a checkpoint: facts about it, and the size and SHA-256 of every file in it, in `manifest.json`.

Orbax restores a flipped bit without an error. The manifest is written last, so a directory without one is not complete.
It contains the SHA-256 of its own text, so that damage to it is found as well. Next: `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rmr1_jax.files.write import hash_written, write_whole

NAME = "manifest.json"
THREADS = 4  # hashing releases the GIL; more threads would slow the training step down


class Damage(ValueError):
    """A checkpoint is not what its manifest says. The message names the file, and what was expected and found."""


def write_manifest(directory: Path, about: Mapping[str, Any]) -> None:
    """Hash every file under `directory`, and write the manifest there. about: facts to keep, as JSON."""
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and p.name != NAME)
    files = dict(zip(names, _each(hash_written, [directory / name for name in names]), strict=True))
    write_whole(directory / NAME, _sealed({"about": dict(about), "files": files}))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest, {"about", "files"}. Raises Damage if it is missing or not as it was written."""
    try:
        text = (directory / NAME).read_text(encoding="utf-8")
        manifest = json.loads(text)
        seal = manifest.pop("sha256")
        whole = _sealed(manifest) == text
    except FileNotFoundError:
        raise Damage(f"{NAME}: expected, not there") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
        raise Damage(f"{NAME}: cannot be read ({e})") from e
    if not whole:
        raise Damage(f"{NAME}: expected the text of sha256 {seal}, found another")
    return manifest


def check_files(directory: Path, files: Mapping[str, Any]) -> list[str]:
    """Compare files with their entries in the manifest. Returns one line for each that differs."""
    return [line for line in _each(lambda entry: _difference(directory, *entry), list(files.items())) if line]


def verify(directory: Path) -> None:
    """Compare every file with the manifest. Raises Damage, which names all that are not as they were written."""
    if wrong := check_files(directory, read_manifest(directory)["files"]):
        raise Damage("; ".join(wrong))


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest, with its own SHA-256: any change to it is found."""
    text = json.dumps({**manifest, "sha256": ""}, indent=1)
    return json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"


def _each(function: Callable[..., Any], items: list) -> list:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def _difference(directory: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """How a file differs from its entry in the manifest."""
    try:
        with (directory / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                return f"{name}: expected {expected['bytes']} bytes, found {size}"
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        return f"{name}: expected {expected['bytes']} bytes, found none ({e.strerror})"
    if digest != expected["sha256"]:
        return f"{name}: expected sha256 {expected['sha256']}, found {digest}"
    return None
