"""Reads results.json, the scores of a run's stages, and puts the result of a page into one sentence.

Read next: `training.py`, which shows both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.pairs.rows import describe
from rmr1_jax.report.curves import is_percent, short
from rmr1_jax.report.reading import STAGES, as_number, stage_order

BASELINE = {"sft": "before", "grpo": "sft", "control": "sft"}  # the stage that a stage started from, for its gain
SHARES = ("accuracy", "reasoning", "chat", "tempted", "valid")  # columns of results.json that are from 0 to 1
COLUMNS = (*SHARES, "mean_tokens", "seconds")
WHEN = MappingProxyType({"before": "before training", "sft": "after SFT", "grpo": "after GRPO"})
# The metric that says most about a run without results, the best one first, and its name in a sentence.
TOLD = MappingProxyType(
    {
        "eval_accuracy": "held-out accuracy",
        "eval_loss": "held-out loss",
        "reward": "mean reward of the sampled traces",
        "loss": "training loss",
    }
)
AT_MOST = 3  # runs named in the sentence


def headline(
    results: Sequence[Mapping[str, Any]],
    curves: Mapping[tuple[str, str, str], Mapping[int, float]],
    outcomes: Mapping[str, int],
) -> str:
    """Returns the result of a page of training runs in a sentence, or "" if the runs have none yet.

    Args:
        results: those of `read_results` with their "title". curves: by (section, metric, run), values by step.
        outcomes: the counts of the judgements by outcome.
    """
    scored = [(result, stages) for result in results if (stages := _scored(result))]
    if len(scored) == 1:
        return _sentence(*scored[0])
    if scored:
        scored.sort(key=lambda entry: -entry[1][-1][1])
        parts = [f"{result['title']} {_percent(stages[-1][1])}" for result, stages in scored[:AT_MOST]]
        return f"Right answers on held-out questions: {', '.join(parts)}{_more(scored)}."
    if told := _told(curves):
        return told
    if total := sum(outcomes.values()):
        parts = [f"{n:,} {name}" for name, n in sorted(outcomes.items())]
        return f"Of {total:,} judgement{'s' * (total != 1)}: {', '.join(parts)}."
    return ""


def _scored(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns (stage, accuracy) of the stages of training in their order; a control is none."""
    return [
        (row["stage"], cell["value"])
        for row in result["rows"]
        for cell in row["cells"]
        if cell["column"] == "accuracy" and cell["value"] is not None and row["stage"] in WHEN
    ]


def _sentence(result: Mapping[str, Any], stages: Sequence[tuple[str, float]]) -> str:
    n = f"{result['n']:,} held-out questions" if isinstance(result["n"], int) else "the held-out questions"
    (last, accuracy), earlier = stages[-1], stages[-2::-1]
    before = ", ".join(f"{_percent(value)} {WHEN[stage]}" for stage, value in earlier)
    return f"{WHEN[last].capitalize().replace('sft', 'SFT').replace('grpo', 'GRPO')} the judge is right on " + (
        f"{_percent(accuracy)} of {n}" + (f"; it was on {before}." if before else ".")
    )


def _told(curves: Mapping[tuple[str, str, str], Mapping[int, float]]) -> str:
    """Returns how the metric that says most moved in the last stage of each run: between single values if it is of a
    held-out set, otherwise between the means of a tenth of the steps."""
    parts = []
    for run in dict.fromkeys(run for _, _, run in curves):
        sections = sorted({section for section, _, name in curves if name == run}, key=stage_order)
        found = next(((s, m) for s in reversed(sections) for m in TOLD if (s, m, run) in curves), None)
        if found is None:
            continue
        section, metric = found
        line = curves[section, metric, run]
        n = 1 if metric.startswith("eval_") else math.ceil(len(line) / 10)
        values = list(line.values())
        first, last = (short(fmean(part), percent=is_percent(metric), digits=3) for part in (values[:n], values[-n:]))
        stage = section.rsplit("/", 1)[-1]
        where = f" of {stage.upper() if stage in STAGES else stage}" if stage != "steps" else ""
        went = f"went from {first} to {last} in {max(line) + 1:,} step{'s' * (max(line) > 0)}{where}"
        went += " (means of the first and the last tenth)" if n > 1 else ""
        parts.append((run, f"{TOLD[metric]} {went}"))
    if len(parts) == 1:
        return f"The {parts[0][1]}."
    told = "; ".join(f"{run}: {words}" for run, words in parts[:AT_MOST])
    return f"{told}{_more(parts)}." if parts else ""


def _more(entries: Sequence[Any]) -> str:
    return f" and {len(entries) - AT_MOST} more" if len(entries) > AT_MOST else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def read_results(file: Path) -> dict[str, Any]:
    """Reads results.json: a row for each stage, the columns, the notes, and every other key as a fact.

    Raises:
        InputError: the file is not a JSON object, or a share is not a number from 0 to 1.
    """
    found = read_object(file)
    notes, seconds = found.pop("notes", []), found.pop("seconds", {})
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise InputError(f"{file}: field 'notes' is {describe(notes)}, expected a list of texts")
    stages: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, dict) and "accuracy" in value:
            stages[name] = value | ({"seconds": seconds[name]} if name in seconds else {})
        elif name in STAGES:
            raise InputError(f"{file}: field {name!r} is {describe(value)}, expected an object with accuracy and so on")
        elif name != "n":
            facts[name] = value
    for stage, row in stages.items():
        for column, value in row.items():
            number = as_number(value)
            if column in SHARES and value is not None and not (number is not None and 0 <= number <= 1):
                raise InputError(f"{file}: field '{stage}.{column}' is {describe(value)}, expected a share from 0 to 1")
            if number is None and value is not None:
                facts[f"{stage}.{column}"] = value
    facts |= {f"seconds, {name}": value for name, value in seconds.items() if name not in stages}
    present = {column for row in stages.values() for column, value in row.items() if as_number(value) is not None}
    columns = [*(c for c in COLUMNS if c in present), *sorted(present - set(COLUMNS))]
    rows = [_result_row(stage, stages, columns) for stage in sorted(stages, key=stage_order)]
    return {"columns": columns, "rows": rows, "notes": notes, "facts": facts, "n": found.get("n")}


def _result_row(stage: str, stages: dict[str, dict], columns: list[str]) -> dict[str, Any]:
    """Returns a stage's cells, with the gain over the stage that it started from in the columns that are shares."""
    earlier = [name for name in sorted(stages, key=stage_order) if stage_order(name) < stage_order(stage)]
    baseline = BASELINE.get(stage, earlier[-1] if earlier else "")
    cells = []
    for column in columns:
        value, base = (as_number(stages.get(name, {}).get(column)) for name in (stage, baseline))
        gain = value - base if column in SHARES and value is not None and base is not None else None
        cells.append({"column": column, "value": value, "share": column in SHARES, "gain": gain})
    return {"stage": stage, "baseline": baseline if baseline in stages else "", "cells": cells}
