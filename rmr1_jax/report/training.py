"""Reads training runs for their page: result, facts, curves, traces and settings.

A run directory holds any of `FILES`; its sub-directories (`sft`, `grpo`, ...) are parts of the run in the same form. A
run may still be in progress, so an incomplete last line of a JSONL file is a warning, not an error.

Read next: `results.py`, `about.py`, `curves.py` and `samples.py`, which read its parts; `templates/training.html.j2`,
which shows them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import whole_rows
from rmr1_jax.files.append import settings_file
from rmr1_jax.pairs.rows import describe
from rmr1_jax.report.about import run_facts, shown_facts
from rmr1_jax.report.curves import PLOT, make_groups
from rmr1_jax.report.reading import DEPTH, as_number, find_holders, stage_order, text_of
from rmr1_jax.report.results import headline, read_results
from rmr1_jax.report.samples import cards_of, chosen_rollouts, chosen_samples, filters_of

ROLLOUTS = "rollouts.jsonl"
FILES = ("results.json", "metrics.jsonl", "samples.jsonl", "verdicts.jsonl", ROLLOUTS, "config.yaml")


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
                "give the directory that `rmr1 quickstart`, `rmr1 sft` or `rmr1 grpo` wrote to, or the file that "
                "`rmr1 judge` wrote; an evaluation's directory (`rmr1 eval`, `rmr1 score`) holds judgements.jsonl"
            )
        for part in parts:
            page.add(name, part.relative_to(root).parts, part)
        for path in evaluated.get(name, ()):
            page.warnings.append(f"{path}: an evaluation, which has a page of its own: rmr1 report {path}")
    return {"names": [name for name, _ in roots]} | page.variables()


@dataclass(frozen=True, kw_only=True)
class _Page:
    """The contents of the page, gathered part by part. `curves`: (section, metric, run) -> finite values by step.
    `parts`: the facts of the parts of each run."""

    max_traces: int
    results: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[tuple[str, str, str], dict[int, float]] = field(default_factory=dict)
    parts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    tallies: list[dict[str, Any]] = field(default_factory=list)
    configs: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, root_name: str, below: tuple[str, ...], path: Path) -> None:
        """Reads one directory: the run itself (`below` is empty), or a part of it, which becomes a section."""
        title, run, section = "/".join((root_name, *below)), "/".join((root_name, *below[:-1])), "".join(below[-1:])
        facts: dict[str, Any] = {}
        if (file := path / "results.json").is_file():
            self.results.append({"title": title, "run": root_name, **read_results(file)})
        if (file := path / "metrics.jsonl").is_file():
            stages = read_metrics(file, self.warnings)
            for stage, metrics in stages.items():
                # The directory names the section, because the `control` directory logs the stage `sft` too.
                alone = section and len(stages) == 1
                name = section if alone else "/".join(filter(None, (section, stage))) or "steps"
                self.curves.update({(name, metric, run): line for metric, line in metrics.items() if line})
            facts = _length_of(stages) | run_facts(path)
        for file in (path / "samples.jsonl", path / "verdicts.jsonl"):
            if file.is_file():
                found, outcomes = chosen_samples(file, run, section, self.max_traces, self.warnings)
                self.samples.extend(found)
                tally = {"title": title, "shown": len(found), "total": outcomes.total(), "outcomes": outcomes}
                self.tallies.append(tally)
                break
        if (file := path / ROLLOUTS).is_file():
            found, total = chosen_rollouts(file, run, section, self.max_traces // 2, self.warnings)
            self.rollouts.extend(found)
            self.tallies.append({"title": f"{title}/{ROLLOUTS}", "shown": len(found), "total": total, "outcomes": None})
        if (file := path / "config.yaml").is_file():
            self.configs.append((title, file.read_text(encoding="utf-8", errors="replace")))
        if facts:
            self.parts.setdefault(root_name, []).append({"stage": section.upper() or "run"} | facts)

    def variables(self) -> dict[str, Any]:
        """Returns the variables of the template, without the names of the runs."""
        cards, rollouts = cards_of(self.samples), cards_of(self.rollouts)
        legend = list(dict.fromkeys(run for _, _, run in self.curves))
        names = sorted({section for section, _, _ in self.curves}, key=stage_order)
        sections = [{"name": name, "groups": self._groups(name, legend)} for name in names]
        outcomes = sum((tally["outcomes"] or Counter() for tally in self.tallies), Counter[str]())
        panels = [panel for section in sections for group in section["groups"] for panel in group["panels"]]
        return vars(self) | {
            "headline": headline(self.results, self.curves, outcomes),
            "facts_of": {name: facts for name, parts in self.parts.items() if (facts := shown_facts(parts))},
            "sections": sections,
            "curves_data": [panel["data"] for panel in panels],
            "plot_data": PLOT | {"legend": legend},
            "runs": legend,
            "cards": sorted(cards, key=lambda card: card["order"]),
            "rollout_cards": rollouts,
            "filters": filters_of([*cards, *rollouts]),
        }

    def _groups(self, section: str, legend: list[str]) -> list[dict[str, Any]]:
        metrics: dict[str, dict[int, dict[int, float]]] = {}
        for (name, metric, run), line in self.curves.items():
            if name == section:
                metrics.setdefault(metric, {})[legend.index(run)] = line
        return make_groups(metrics)


def _length_of(stages: Mapping[str, Mapping[str, Mapping[int, float]]]) -> dict[str, Any]:
    """Returns the steps and the seconds of a part; the seconds of checkpoints are those before each step."""
    steps = max((max(line) + 1 for metrics in stages.values() for line in metrics.values() if line), default=0)
    spent = [metrics.get(name, {}) for metrics in stages.values() for name in ("seconds", "checkpoint_seconds")]
    seconds = sum(sum(line.values()) for line in spent)
    return {name: value for name, value in (("steps", steps), ("seconds", seconds)) if value}


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
