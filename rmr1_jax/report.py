"""One self-contained HTML file about training runs: the result table, curves, readable traces, resolved configuration.

What runs hold is read by `report_runs.py`, what curves look like is worked out by `report_curves.py`, and how all of it
is shown is in `report.html.j2`. Traces come from a model and are not trusted: the template escapes everything, and the
page's own policy forbids it any network access and any script but the one it came with.

Read next: `report.html.j2`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jinja2

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.trace import PARTS, after_thinking, find_sections, parse_trace
from rmr1_jax.report_curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Panel, make_panel, order_of
from rmr1_jax.report_runs import (
    find_parts,
    named_roots,
    read_metrics,
    read_results,
    read_samples,
    read_text,
    stage_order,
)

BLOCKS = (*PARTS, "justify")  # parts that stand on lines of their own; a quotation stands in a line
FILTERS = ("run", "stage", "kind", "task", "temptation", "outcome")
FILTER_OPTIONS = 24  # a field with more values than this is no filter


def write_report(run_dirs: Sequence[Path], out: Path, *, max_traces: int = 48) -> Path:
    """Writes the report of one or several runs to the file `out` (replaced whole, never half-written); returns `out`.

    Of a samples file with more than `max_traces` rows, that many are shown, spread evenly over stage, kind and outcome.

    Raises:
      InputError: a directory that is absent or holds no run, or a file in it that is malformed (file, line, field).
    """
    out, page = Path(out), _Page(max_traces=max_traces)
    if out.is_dir():
        raise InputError(f"{out}: is a directory; give the file to write, for example {out / 'report.html'}")
    for name, root in named_roots(run_dirs):
        page.runs.append(name)
        for part in find_parts(root):
            page.add(name, part.relative_to(root).parts, part)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    html = environment.get_template("report.html.j2").render(page.view())
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(html.encode("utf-8", "backslashreplace"))  # JSON may hold half a surrogate pair, UTF-8 may not
    os.replace(partial, out)
    return out


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of a trace: its `text`, whether that is a `tag`, and what it is in.

    `block` is "think", a part such as "eval", or "text" (outside of all); `part` is the block or a quotation in it.
    """

    block: str
    part: str
    text: str
    tag: bool


def split_trace(text: str) -> list[Span]:
    """Cuts a trace at its tags. Any text is accepted, and the spans' texts joined are that text again.

    What counts as a part is `find_sections`' decision, so the colours are those of the parsed trace; what stands before
    the end of the last thought is one `think` block.
    """
    begin = after_thinking(text)
    spans = [
        Span(block="think", part="think", text=piece, tag=piece in ("<think>", "</think>"))
        for piece in re.split("(</?think>)", text[:begin])
    ]
    sections = find_sections(text, begin)  # in order; the tags around one are not part of it
    opens = [section.start - len(f"<{section.name}>") for section in sections]
    ends = [section.end + section.closed * len(f"</{section.name}>") for section in sections]
    tags = {*opens, *(section.end for section in sections if section.closed)}
    places = {begin, len(text), *opens, *ends, *(place for section in sections for place in section[1:3])}
    waiting, around = deque(zip(opens, ends, sections, strict=True)), []
    for place, following in pairwise(sorted(places)):
        while waiting and waiting[0][0] <= place:
            around.append(waiting.popleft())
        around = [entry for entry in around if entry[1] > place]
        names = [section.name for _, _, section in around]
        block = next((name for name in reversed(names) if name in BLOCKS), "text")
        part = names[-1] if names else "text"
        spans.append(Span(block=block, part=part, text=text[place:following], tag=place in tags))
    return [span for span in spans if span.text]


def _blocks(spans: list[Span]) -> list[dict[str, Any]]:
    """The spans by block, without the white space around its words; a `bare` block holds nothing but tags."""
    blocks = []
    for name, group in groupby(spans, key=lambda span: span.block):
        left = _stripped(list(group), str.lstrip)
        kept = _stripped(left[::-1], str.rstrip)[::-1]
        if kept:
            blocks.append({"name": name, "spans": kept, "bare": all(span.tag for span in kept)})
    return blocks


def _stripped(spans: list[Span], strip: Callable[[str], str]) -> list[Span]:
    """The spans without the white space that `strip` takes off before the first word; tags are left alone."""
    kept, begun = [], False
    for span in spans:
        text = span.text if span.tag or begun else strip(span.text)
        begun = begun or (bool(text) and not span.tag)
        kept += [replace(span, text=text)] if text else []
    return kept


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
            self.samples.append(sample | {"blocks": _blocks(split_trace(sample["text"]))})
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
