"""What a report reads: the files of a run directory, checked, as plain values. Every error names file, line and field.

A run directory holds any of FILES; its sub-directories (`sft`, `grpo`, ...) are parts of the run, of the same form. A
run may be going on: the last line of a JSONL file may be cut short, and that is a warning, not an error.

Read next: `report.py`, which makes the page of them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.rows import describe
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Panel, make_panel, order_of
from rmr1_jax.report.reading import DEPTH, as_number, find_holders, json_object, jsonl_rows, read_text, text_of
from rmr1_jax.report.trace import blocks_of, split_trace

FILTERS = ("run", "stage", "kind", "task", "temptation", "outcome")


FILTER_OPTIONS = 24  # a field with more values than this is no filter


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page's content, gathered part by part. `curves` maps (section, metric, run) to finite values by step."""

    max_traces: int
    runs: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[tuple[str, str, str], dict[int, float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tallies: list[dict[str, Any]] = field(default_factory=list)
    configs: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, root_name: str, below: tuple[str, ...], path: Path) -> None:
        """Reads one directory: the run itself (`below` is empty) or a part of it, which is a section of its own."""
        title, run, section = "/".join((root_name, *below)), "/".join((root_name, *below[:-1])), "".join(below[-1:])
        if (file := path / "results.json").is_file():
            self.results.append({"title": title, **read_results(file)})
        if (file := path / "metrics.jsonl").is_file():
            stages = read_metrics(file, self.warnings)
            for stage, metrics in stages.items():
                alone = section and len(stages) == 1  # so that `control`, which is more of SFT, is not taken for SFT
                name = section if alone else "/".join(filter(None, (section, stage))) or "steps"
                self.curves.update({(name, metric, run): line for metric, line in metrics.items() if line})
        for file in (path / "samples.jsonl", path / "verdicts.jsonl"):
            if file.is_file():
                self._add_samples(file, title, run, section)
                break
        if (file := path / "config.yaml").is_file():
            self.configs.append((title, read_text(file)))

    def _add_samples(self, file: Path, title: str, run: str, section: str) -> None:
        buckets: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
        outcomes: Counter[str] = Counter()
        for number, sample in enumerate(read_samples(file, self.warnings)):
            trace = parse_trace(sample["text"])
            sample |= {"run": run, "stage": sample["stage"] or section, "flaws": trace.flaws}
            sample["kind"] = (sample["kind"] or trace.kind or "").lower()
            outcomes[sample["outcome"]] += 1
            bucket = buckets.setdefault((sample["stage"], sample["kind"], sample["outcome"]), [])
            if len(bucket) < self.max_traces:  # so memory does not grow with the file
                bucket.append((number, sample))
        # The first of every bucket, then the second of every bucket, and so on; shown in the file's order.
        turns = sorted((turn, number) for bucket in buckets.values() for turn, (number, _) in enumerate(bucket))
        chosen = {number for _, number in turns[: self.max_traces]}
        kept = {number: sample for bucket in buckets.values() for number, sample in bucket if number in chosen}
        for _, sample in sorted(kept.items()):
            self.samples.append(sample | {"blocks": blocks_of(split_trace(sample["text"]))})
        self.tallies.append({"title": title, "shown": len(kept), "total": outcomes.total(), "outcomes": outcomes})

    def view(self) -> dict[str, Any]:
        """The template's variables."""
        options = {name: sorted({s[name] for s in self.samples} - {""}, key=stage_order) for name in FILTERS}
        sections = sorted({section for section, _, _ in self.curves}, key=stage_order)
        legend = list(dict.fromkeys(run for _, _, run in self.curves))
        drawn = [{"name": section, "panels": self._panels(section, legend)} for section in sections]
        plot = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
        return {
            "runs": self.runs,
            "results": self.results,
            "sections": drawn,
            "curves_data": [panel.data() for section in drawn for panel in section["panels"]],
            "legend": legend,
            "samples": self.samples,
            "tallies": self.tallies,
            "filters": {name: values for name, values in options.items() if 1 < len(values) <= FILTER_OPTIONS},
            "configs": self.configs,
            "warnings": self.warnings,
            "plot": plot | {"legend": legend},
        }

    def _panels(self, section: str, legend: list[str]) -> list[Panel]:
        metrics: dict[str, dict[int, dict[int, float]]] = {}
        for (name, metric, run), line in self.curves.items():
            if name == section:
                metrics.setdefault(metric, {})[legend.index(run)] = line
        return [make_panel(metric, metrics[metric]) for metric in sorted(metrics, key=order_of)]


FILES = ("results.json", "metrics.jsonl", "samples.jsonl", "verdicts.jsonl", "config.yaml")


STAGES = ("before", "sft", "grpo", "control")


BASELINE = {"sft": "before", "grpo": "sft", "control": "sft"}  # where a stage started from, for its gain


SHARES = ("accuracy", "reasoning", "chat", "tempted", "valid")  # columns of results.json, from 0 to 1 each


COLUMNS = (*SHARES, "mean_tokens", "seconds")


SAMPLE_TEXTS = ("stage", "kind", "task", "question", "response_a", "response_b", "winner", "status", "text")


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


def _result_row(stage: str, stages: dict[str, dict], columns: list[str]) -> dict[str, Any]:
    earlier = [name for name in sorted(stages, key=stage_order) if stage_order(name) < stage_order(stage)]
    baseline = BASELINE.get(stage, earlier[-1] if earlier else "")
    cells = []
    for column in columns:
        value, base = (as_number(stages.get(name, {}).get(column)) for name in (stage, baseline))
        gain = value - base if column in SHARES and value is not None and base is not None else None
        cells.append({"column": column, "value": value, "share": column in SHARES, "gain": gain})
    return {"stage": stage, "baseline": baseline if baseline in stages else "", "cells": cells}
