"""Finds and reads the files of run directories, for every kind of page.

Read next: `training.py`, `evaluation.py` and `prepared.py`, a file for each kind of page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.rows import Row

STAGES = ("before", "sft", "grpo", "control")
DEPTH = 2  # levels of sub-directories that are searched for parts of a run


def named_roots(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """Returns each directory or file once, with the shortest end of its path that tells it from the others.

    Raises:
        InputError: none is given, or one does not exist.
    """
    roots = list(dict.fromkeys(Path(path).resolve() for path in paths))
    if not roots:
        raise InputError("no run directory given; expected at least one")
    for root in roots:
        if not root.exists():
            raise InputError(f"{root}: no such directory or file; give that of a run, or a file of judgements")
    length = 1
    while len({root.parts[-length:] for root in roots}) < len(roots):
        length += 1
    return [("/".join(root.parts[-length:]), root) for root in roots]


def find_holders(root: Path, names: Sequence[str]) -> list[Path]:
    """Returns the directories from `root` to DEPTH levels below it that hold a file with one of these names.

    Symbolic links and hidden directories are not followed.
    """

    def walk(directory: Path, depth: int) -> Iterator[Path]:
        if any((directory / name).is_file() for name in names):
            yield directory
        for child in sorted(directory.iterdir()) if depth else ():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from walk(child, depth - 1)

    return list(walk(root, DEPTH)) if root.is_dir() else []


def text_of(row: Row, name: str) -> str:
    """Returns a text field, or "" if it is absent or null."""
    value = row.value.get(name)
    return "" if value is None else row.checked_text(value, name)


def as_number(value: object) -> float | None:
    """Returns the value as a float, or None if it is not a number. A too large integer counts as infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def stage_order(name: str) -> tuple[int, str]:
    """Returns the sort key of a stage: the known ones in the order of training, then the others by name."""
    last = name.rsplit("/", 1)[-1]
    return (STAGES.index(last) if last in STAGES else len(STAGES), name)
