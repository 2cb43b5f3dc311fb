"""What a report reads: the files of a run directory, checked, as plain values. Every error names file, line and field.

A run directory holds any of FILES; its sub-directories (`sft`, `grpo`, ...) are parts of the run, of the same form. A
run may be going on: the last line of a JSONL file may be cut short, and that is a warning, not an error.

Read next: `report.py`, which makes the page of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmr1_jax.data.containers import read_rows
from rmr1_jax.data.rows import BadRow, Row, describe
from rmr1_jax.errors import InputError

FILES = ("results.json", "metrics.jsonl", "samples.jsonl", "verdicts.jsonl", "config.yaml")
DEPTH = 2  # how far below a run directory its parts may lie
STAGES = ("before", "sft", "grpo", "control")
BASELINE = {"sft": "before", "grpo": "sft", "control": "sft"}  # where a stage started from, for its gain
SHARES = ("accuracy", "reasoning", "chat", "tempted", "valid")  # columns of results.json, from 0 to 1 each
COLUMNS = (*SHARES, "mean_tokens", "seconds")
SAMPLE_TEXTS = ("stage", "kind", "task", "question", "response_a", "response_b", "winner", "status", "text")


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


def find_parts(root: Path) -> list[Path]:
    """The directories that hold a run, `root` first; InputError where there is none."""
    parts = find_holders(root, FILES)
    if not parts:
        raise InputError(
            f"{root}: no run here. Expected one of {', '.join(FILES)} in it or up to {DEPTH} directories below; give "
            "the directory that `rmr1 quickstart`, `rmr1 sft`, `rmr1 grpo` or `rmr1 judge` wrote to; an evaluation's "
            "(`rmr1 eval`, `rmr1 score`) holds judgements.jsonl"
        )
    return parts


def holds_run(root: Path) -> bool:
    """Whether the directory, or one below it, holds a run."""
    return bool(find_holders(root, FILES))


def find_holders(root: Path, names: Sequence[str]) -> list[Path]:
    """The directories from `root` to DEPTH below it that hold a file of one of these names; links are not followed."""

    def walk(directory: Path, depth: int) -> Iterator[Path]:
        if any((directory / name).is_file() for name in names):
            yield directory
        for child in sorted(directory.iterdir()) if depth else ():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from walk(child, depth - 1)

    return list(walk(root, DEPTH))


def stage_order(name: str) -> tuple[int, str]:
    """Sorts stages in the order of training, whatever else there is after them by name."""
    last = name.rsplit("/", 1)[-1]
    return (STAGES.index(last) if last in STAGES else len(STAGES), name)


def read_metrics(file: Path, warnings: list[str]) -> dict[str, dict[str, dict[int, float]]]:
    """metrics.jsonl -> stage -> metric -> finite value by ascending step. A step written again: the later counts."""
    stages: dict[str, dict[str, dict[int, float]]] = {}
    for row in jsonl_rows(file, warnings):
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise row.bad("step", f"is {describe(step)}, expected an integer")
        metrics = stages.setdefault(text_of(row, "stage"), {})
        for name, value in row.value.items():
            number = math.nan if value is None else as_number(value)  # a number that is not finite is logged as null
            if name != "step" and number is not None:
                metrics.setdefault(name, {})[step] = number
    if not stages:
        warnings.append(f"{file}: no steps yet.")
    for metrics in stages.values():
        for name, values in metrics.items():
            metrics[name] = {step: values[step] for step in sorted(values) if math.isfinite(values[step])}
            if missing := len(values) - len(metrics[name]):
                warnings.append(f"{file}: {name} is null or not finite in {missing} of {len(values)} steps.")
    return stages


def read_samples(file: Path, warnings: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of samples.jsonl or verdicts.jsonl: texts ("" where absent), `better` ("A", "B", "") and `outcome`.

    `outcome` is "right", "wrong", "no verdict" (none was given), or "not known" (nobody says which answer is better).
    """
    for row in jsonl_rows(file, warnings):
        sample: dict[str, Any] = {name: text_of(row, name) for name in SAMPLE_TEXTS}
        sample["id"] = row.identifier("id") if row.value.get("id") is not None else ""
        sample["better"] = text_of(row, "better") or text_of(row, "correct_winner")
        for name in ("winner", "better"):
            if sample[name] not in ("A", "B", ""):
                raise row.bad(name if name in row.value else "correct_winner", f"is {sample[name]!r}, expected A or B")
        correct, tempted = (row.value.get(name) for name in ("correct", "tempted"))
        if not isinstance(correct, bool | None):
            raise row.bad("correct", f"is {describe(correct)}, expected true, false or null")
        if correct is None and sample["better"]:
            correct = sample["better"] == sample["winner"]
        known = {True: "right", False: "wrong", None: "not known"}[correct]
        sample["outcome"] = known if sample["winner"] else "no verdict"
        sample["temptation"] = {True: "tempted", False: "not tempted"}[tempted] if isinstance(tempted, bool) else ""
        yield sample


def read_results(file: Path) -> dict[str, Any]:
    """results.json -> rows (one a stage), columns, notes, and every other key as a fact. Shares are checked, 0 to 1."""
    found = json_object(file)
    notes, seconds = found.pop("notes", []), found.pop("seconds", {})
    notes = [notes] if isinstance(notes, str) else notes
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise InputError(f"{file}: field 'notes' is {describe(notes)}, expected a list of texts")
    seconds = dict(seconds) if isinstance(seconds, dict) else {"total": seconds}
    stages: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, dict) and "accuracy" in value:
            stages[name] = value | ({"seconds": seconds.pop(name)} if name in seconds else {})
        elif name in STAGES:
            raise InputError(f"{file}: field {name!r} is {describe(value)}, expected an object with accuracy and so on")
        else:
            facts[name] = value
    for stage, row in stages.items():
        for column, value in row.items():
            number = as_number(value)
            if column in SHARES and value is not None and not (number is not None and 0 <= number <= 1):
                raise InputError(f"{file}: field '{stage}.{column}' is {describe(value)}, expected a share from 0 to 1")
            if number is None and value is not None:
                facts[f"{stage}.{column}"] = value
    facts |= {f"seconds, {name}": value for name, value in seconds.items()}
    present = {c for row in stages.values() for c, value in row.items() if as_number(value) is not None}
    columns = [*(c for c in COLUMNS if c in present), *sorted(present - set(COLUMNS))]
    return {
        "columns": columns,
        "rows": [_result_row(stage, stages, columns) for stage in sorted(stages, key=stage_order)],
        "notes": notes,
        "facts": {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in facts.items()},
        "n": found.get("n"),
    }


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


def _result_row(stage: str, stages: dict[str, dict], columns: list[str]) -> dict[str, Any]:
    earlier = [name for name in sorted(stages, key=stage_order) if stage_order(name) < stage_order(stage)]
    baseline = BASELINE.get(stage, earlier[-1] if earlier else "")
    cells = []
    for column in columns:
        value, base = (as_number(stages.get(name, {}).get(column)) for name in (stage, baseline))
        gain = value - base if column in SHARES and value is not None and base is not None else None
        cells.append({"column": column, "value": value, "share": column in SHARES, "gain": gain})
    return {"stage": stage, "baseline": baseline if baseline in stages else "", "cells": cells}


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
