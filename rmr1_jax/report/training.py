"""Reads training runs for their page: results, curves, traces and settings.

A run directory holds any of `FILES`; its sub-directories (`sft`, `grpo`, ...) are parts of the run in the same form. A
run may still be in progress, so an incomplete last line of a JSONL file is a warning, not an error.

Read next: `curves.py` and `trace.py`, which prepare what is drawn; `templates/training.html.j2`, which shows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import whole_rows
from rmr1_jax.files.append import settings_file
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.pairs.rows import describe
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.report.curves import PLOT, make_panel, order_of
from rmr1_jax.report.reading import DEPTH, as_number, find_holders, text_of
from rmr1_jax.report.trace import blocks_of

FILES = ("results.json", "metrics.jsonl", "samples.jsonl", "verdicts.jsonl", "config.yaml")
STAGES = ("before", "sft", "grpo", "control")
BASELINE = {"sft": "before", "grpo": "sft", "control": "sft"}  # the stage that a stage started from, for its gain
SHARES = ("accuracy", "reasoning", "chat", "tempted", "valid")  # columns of results.json that are from 0 to 1
COLUMNS = (*SHARES, "mean_tokens", "seconds")
SAMPLE_TEXTS = ("stage", "kind", "task", "question", "response_a", "response_b", "better", "winner", "status", "text")
FILTERS = ("run", "stage", "kind", "task", "temptation", "outcome")
FILTER_OPTIONS = 24  # a field with more values than this gets no filter


def holds_run(root: Path) -> bool:
    """Returns whether the directory, or one below it, holds a training run; an output of `rmr1 judge`, which has its
    settings beside it, is none."""
    found = [directory / name for directory in find_holders(root, FILES) for name in FILES]
    return any(file.is_file() and not settings_file(file).is_file() for file in found)


def training_page(
    roots: Sequence[tuple[str, Path]], evaluated: Mapping[str, Sequence[Path]], *, max_traces: int
) -> dict[str, Any]:
    """Returns the variables of `training.html.j2` for named run directories.

    Args:
        evaluated: by name of a run, the evaluations in it; a warning says that they have a page of their own.
        max_traces: the number of traces shown of each samples file.

    Raises:
        InputError: a directory holds no run, or a file is malformed (the message names file, line and field).
    """
    page = _Page(max_traces=max_traces)
    for name, root in roots:
        parts = find_holders(root, FILES)
        if not parts:
            raise InputError(
                f"{root}: no run here. Expected one of {', '.join(FILES)} in it or up to {DEPTH} directories below; "
                "give the directory that `rmr1 quickstart`, `rmr1 sft`, `rmr1 grpo` or `rmr1 judge` wrote to; an "
                "evaluation's (`rmr1 eval`, `rmr1 score`) holds judgements.jsonl"
            )
        for part in parts:
            page.add(name, part.relative_to(root).parts, part)
        for path in evaluated.get(name, ()):
            page.warnings.append(f"{path}: an evaluation, which has a page of its own: rmr1 report {path}")
    return {"names": [name for name, _ in roots]} | page.variables()


@dataclass(frozen=True, kw_only=True)
class _Page:
    """The contents of the page, gathered part by part. `curves`: (section, metric, run) -> finite values by step."""

    max_traces: int
    results: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[tuple[str, str, str], dict[int, float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tallies: list[dict[str, Any]] = field(default_factory=list)
    configs: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, root_name: str, below: tuple[str, ...], path: Path) -> None:
        """Reads one directory: the run itself (`below` is empty), or a part of it, which becomes a section."""
        title, run, section = "/".join((root_name, *below)), "/".join((root_name, *below[:-1])), "".join(below[-1:])
        if (file := path / "results.json").is_file():
            self.results.append({"title": title, **read_results(file)})
        if (file := path / "metrics.jsonl").is_file():
            stages = read_metrics(file, self.warnings)
            for stage, metrics in stages.items():
                # The directory names the section, because the `control` directory logs the stage `sft` too.
                alone = section and len(stages) == 1
                name = section if alone else "/".join(filter(None, (section, stage))) or "steps"
                self.curves.update({(name, metric, run): line for metric, line in metrics.items() if line})
        for file in (path / "samples.jsonl", path / "verdicts.jsonl"):
            if file.is_file():
                self._add_samples(file, title, run, section)
                break
        if (file := path / "config.yaml").is_file():
            self.configs.append((title, file.read_text(encoding="utf-8", errors="replace")))

    def _add_samples(self, file: Path, title: str, run: str, section: str) -> None:
        buckets: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
        outcomes: Counter[str] = Counter()
        for number, sample in enumerate(read_samples(file, self.warnings)):
            trace = parse_trace(sample["text"])
            sample |= {"run": run, "stage": sample["stage"] or section, "flaws": trace.flaws}
            sample["kind"] = (sample["kind"] or trace.kind or "").lower()
            outcomes[sample["outcome"]] += 1
            bucket = buckets.setdefault((sample["stage"], sample["kind"], sample["outcome"]), [])
            if len(bucket) < self.max_traces:  # memory does not grow with the file
                bucket.append((number, sample))
        # The first of every bucket is chosen, then the second of every bucket, and so on; shown in the file's order.
        turns = sorted((turn, number) for bucket in buckets.values() for turn, (number, _) in enumerate(bucket))
        chosen = {number for _, number in turns[: self.max_traces]}
        kept = {number: sample for bucket in buckets.values() for number, sample in bucket if number in chosen}
        self.samples.extend(sample | {"blocks": blocks_of(sample["text"])} for _, sample in sorted(kept.items()))
        self.tallies.append({"title": title, "shown": len(kept), "total": outcomes.total(), "outcomes": outcomes})

    def variables(self) -> dict[str, Any]:
        """Returns the variables of the template, without the names of the runs."""
        options = {name: sorted({s[name] for s in self.samples} - {""}, key=_stage_order) for name in FILTERS}
        legend = list(dict.fromkeys(run for _, _, run in self.curves))
        names = sorted({section for section, _, _ in self.curves}, key=_stage_order)
        sections = [{"name": name, "panels": self._panels(name, legend)} for name in names]
        return vars(self) | {
            "sections": sections,
            "curves_data": [panel["data"] for section in sections for panel in section["panels"]],
            "plot_data": PLOT | {"legend": legend},
            "runs": legend,
            "filters": {name: values for name, values in options.items() if 1 < len(values) <= FILTER_OPTIONS},
        }

    def _panels(self, section: str, legend: list[str]) -> list[dict[str, Any]]:
        metrics: dict[str, dict[int, dict[int, float]]] = {}
        for (name, metric, run), line in self.curves.items():
            if name == section:
                metrics.setdefault(metric, {})[legend.index(run)] = line
        return [make_panel(metric, metrics[metric]) for metric in sorted(metrics, key=order_of)]


def _stage_order(name: str) -> tuple[int, str]:
    """Returns the sort key of a stage: the known ones in the order of training, then the others by name."""
    last = name.rsplit("/", 1)[-1]
    return (STAGES.index(last) if last in STAGES else len(STAGES), name)


def read_metrics(file: Path, warnings: list[str]) -> dict[str, dict[str, dict[int, float]]]:
    """Reads metrics.jsonl: stage -> metric -> finite values by ascending step. A later row replaces one of its step."""
    stages: dict[str, dict[str, dict[int, float]]] = {}
    for row in whole_rows(file, warnings):
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
    """Reads samples.jsonl or verdicts.jsonl: rows with texts ("" if absent), `better` ("A", "B", "") and `outcome`.

    `outcome` is "right", "wrong", "no verdict", or "not known" if the row does not say which answer is better.
    """
    for row in whole_rows(file, warnings):
        sample: dict[str, Any] = {name: text_of(row, name) for name in SAMPLE_TEXTS}
        sample["id"] = row.identifier("id") if row.value.get("id") is not None else ""
        for name in ("winner", "better"):
            if sample[name] not in ("A", "B", ""):
                raise row.bad(name, f"is {sample[name]!r}, expected A or B")
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
    rows = [_result_row(stage, stages, columns) for stage in sorted(stages, key=_stage_order)]
    return {"columns": columns, "rows": rows, "notes": notes, "facts": facts, "n": found.get("n")}


def _result_row(stage: str, stages: dict[str, dict], columns: list[str]) -> dict[str, Any]:
    """Returns a stage's cells, with the gain over the stage that it started from in the columns that are shares."""
    earlier = [name for name in sorted(stages, key=_stage_order) if _stage_order(name) < _stage_order(stage)]
    baseline = BASELINE.get(stage, earlier[-1] if earlier else "")
    cells = []
    for column in columns:
        value, base = (as_number(stages.get(name, {}).get(column)) for name in (stage, baseline))
        gain = value - base if column in SHARES and value is not None and base is not None else None
        cells.append({"column": column, "value": value, "share": column in SHARES, "gain": gain})
    return {"stage": stage, "baseline": baseline if baseline in stages else "", "cells": cells}
