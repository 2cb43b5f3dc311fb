"""One self-contained HTML file about training runs or evaluations; here, the runs: results, curves, traces, settings.

What runs hold is read by `report_runs.py`, what curves look like is worked out by `report_curves.py`, and how all of it
is shown is in `report.html.j2`. Traces come from a model and are not trusted: the template escapes everything, and the
page's own policy forbids it any network access and any script but the one it came with.

Read next: `report.html.j2`; for evaluations, `report_eval.py`.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from rmr1_jax.data.store import is_prepared
from rmr1_jax.errors import InputError
from rmr1_jax.files import write_whole, writing
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.report_curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Panel, make_panel, order_of
from rmr1_jax.report_data import data_view
from rmr1_jax.report_eval import Compare, eval_view, find_evaluations
from rmr1_jax.report_runs import (
    find_parts,
    holds_run,
    named_roots,
    read_metrics,
    read_results,
    read_samples,
    read_text,
    stage_order,
)
from rmr1_jax.report_trace import blocks_of, split_trace

FILTERS = ("run", "stage", "kind", "task", "temptation", "outcome")
FILTER_OPTIONS = 24  # a field with more values than this is no filter


def write_report(run_dirs: Sequence[Path], out: Path, *, max_traces: int = 48, compare: Compare | None = None) -> Path:
    """Writes the report of one or several directories to the file `out` (replaced whole, never half-written).

    Evaluations get the page of `report_eval.py`, with every judgement in it; `compare(first, second)` adds what it says
    of two of them. Training runs get curves and traces: of a samples file with more than `max_traces` rows, that many
    are shown, spread evenly over stage, kind and outcome. Prepared sets get that of `report_data.py`. Returns `out`.

    Raises:
      InputError: a directory that is absent or holds neither, directories of both kinds, or a file in one that is
        malformed (file, line, field).
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: is a directory; give the file to write, for example {out / 'report.html'}")
    roots = named_roots(run_dirs)
    if any(is_prepared(root) for _, root in roots):
        return _render("report_data.html.j2", data_view(roots), out)
    evaluated = {name: found for name, root in roots if (found := find_evaluations(root))}
    trained = [name for name, root in roots if name not in evaluated or holds_run(root)]
    if not trained:
        return _render("report_eval.html.j2", eval_view(roots, evaluated, compare), out)
    alone = [name for name in evaluated if name not in trained]
    if alone:
        raise InputError(
            f"{alone[0]} is an evaluation and {trained[0]} a training run; a page shows one kind. Make two: "
            f"rmr1 report {' '.join(alone)}, and rmr1 report {' '.join(trained)}"
        )
    page = _Page(max_traces=max_traces)
    for name, root in roots:
        page.runs.append(name)
        for part in find_parts(root):
            page.add(name, part.relative_to(root).parts, part)
        for path in evaluated.get(name, ()):
            page.warnings.append(f"{path}: an evaluation, which has a page of its own: rmr1 report {path}")
    return _render("report.html.j2", page.view(), out)


def _render(template: str, view: dict[str, Any], out: Path) -> Path:
    """Writes the page piece by piece, for one of a whole benchmark may be large."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    pieces = environment.get_template(template).generate(view)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    # JSON may hold half a surrogate pair, UTF-8 may not.
    write_whole(out, (piece.encode("utf-8", "backslashreplace").decode() for piece in pieces))
    return out


@dataclass(frozen=True, kw_only=True)
class _Page:
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
