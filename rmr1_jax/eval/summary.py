"""The summary of a run's judgements: scores with intervals, and accuracy by length, token budget, order and votes.

`write_summary` reads judgements.jsonl once, row by row, and keeps numbers only, so that memory does not grow with the
texts. Shares are percentages. `by_*` and `subsets` count pairs; the headline and the sections are the benchmark's
score over its items. `n` counts what the number beside it is a mean of, except the summary's own `n`, which counts
the pairs (`items`: those of the headline).

Next: `scores.py` for items, `intervals.py`, `lenses.py` for budgets, orders and votes.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.eval.intervals import score_interval, share_interval
from rmr1_jax.eval.lenses import Budgets, Cut, Forced, Orders, Votes, read_forced
from rmr1_jax.eval.logs import JUDGEMENTS, read_judgements
from rmr1_jax.eval.registry import scoring_of
from rmr1_jax.eval.scores import Items, Scoring, Statistic, items_in, score
from rmr1_jax.files.append import settings_file
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.files.write import provenance, write_whole
from rmr1_jax.judge.judgement import RULES

SUMMARY = "summary.json"
ABOUT = "about.json"  # the package's version and the time, which differ between summaries of the same rows
ANSWER_EDGES = (500, 1000, 2000, 4000, 8000)  # characters, both answers together
TRACE_EDGES = (256, 512, 1024, 2048, 4096)  # tokens of a text


class Groups:
    """Counts of right and of all pairs by name, in the order in which the names are given or first appear."""

    def __init__(self, names: Iterable[str] = ()):
        self.counts: dict[str, list[int]] = {name: [0, 0] for name in names}

    def add(self, name: str, correct: bool) -> None:
        count = self.counts.setdefault(name, [0, 0])
        count[0] += correct
        count[1] += 1

    def listed(self) -> list[dict[str, Any]]:
        """{name, n, accuracy, interval} of each group that is not empty."""
        return [
            {"name": name, "n": n, "accuracy": percent(right / n), "interval": percents(share_interval(right, n))}
            for name, (right, n) in self.counts.items()
            if n
        ]


def percent(share: float | None) -> float | None:
    """A share as a percentage; None for NaN and None."""
    return None if share is None or math.isnan(share) else 100 * share


def percents(interval: tuple[float, float]) -> list[float | None]:
    """An interval of shares in percent."""
    return [percent(share) for share in interval]


def write_summary(
    out_dir: str | Path,
    scores: Mapping[str, Any],
    *,
    judge: str = "",
    scoring: Scoring | None = None,
    cut: Cut | None = None,
) -> Path:
    """Write the summary of OUT/judgements.jsonl and its settings to OUT/summary.json; returns that path. Also writes
    OUT/about.json: the package's version and the time. A summary that is the same as before leaves both as they are.

    Args:
        scores: the main published scores. judge: the judge's name. scoring: how rows count; default: as their benchmark
            says. cut: (text, n) -> the text's first n tokens, for exact token budgets; see `lenses.Budgets`.
    """
    out_dir = Path(out_dir)
    judgements = out_dir / JUDGEMENTS
    side = settings_file(judgements)
    settings = read_object(side) if side.is_file() else {}
    rows, forced = read_judgements(judgements), read_forced(out_dir)
    summary = summarize(rows, settings, scores, judge=judge, scoring=scoring, cut=cut, forced=forced)
    path = out_dir / SUMMARY
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    if not ((out_dir / ABOUT).is_file() and path.is_file() and path.read_text(encoding="utf-8") == text):
        write_whole(path, text)
        write_whole(out_dir / ABOUT, json.dumps(provenance(), indent=2) + "\n")
    return path


def scores_text(summary: Mapping[str, Any]) -> str:
    """The scores of a summary for a person to read: the headline, its sections and the accuracy of pairs, a line each,
    with their 95% intervals and what they count."""
    rows = [("score", summary["headline"], summary["interval"], summary["items"], "item")]
    rows += [(s["name"], s["accuracy"], s["interval"], s["n"], "item") for s in summary["sections"]]
    rows += [("all pairs", summary["accuracy"], summary["accuracy_interval"], summary["n"], "pair")]
    width = max(len(name) for name, *_ in rows)
    return "\n".join(
        f"{value:8.2f}%  {name:{width}}  95% interval {low:.1f} to {high:.1f}, n = {n:,} {unit}{'s' * (n != 1)}"
        for name, value, (low, high), n, unit in rows
    )


def summarize(
    rows: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
    scores: Mapping[str, Any],
    *,
    judge: str = "",
    scoring: Scoring | None = None,
    cut: Cut | None = None,
    forced: Forced | None = None,
) -> dict[str, Any]:
    """The summary of judgement rows, which are read once. See `write_summary` for the arguments; forced: see
    `lenses.Budgets`.

    Raises:
        InputError: no rows, rows of two benchmarks, or a row whose `meta` does not have what its benchmark needs.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise InputError("there is no judgement to summarize")
    if (rule := settings.get("rule", "eval")) not in RULES:
        raise InputError(f"the judgements' settings name the rule {rule!r}; known are {', '.join(RULES)}")
    scoring = scoring or scoring_of(first)
    limit = _token_limit(settings)
    after_forcing = None if forced is None else Budgets(rule, scoring, forced=forced, limit=limit)
    benchmark, budgets = (first.get("meta") or {}).get("benchmark"), Budgets(rule, scoring, cut, limit=limit)
    counts = _Counts(benchmark, scoring, budgets, after_forcing)
    for row in itertools.chain([first], rows):
        counts.add(row)
    found = scoring.statistics(counts.items)
    headline = counts.items.strata_of(found[0])
    return {
        "benchmark": counts.benchmark,
        "judge": judge,
        "settings": dict(settings),
        "n": counts.n,
        "scores": dict(scores),
        "items": items_in(headline),
        "headline": percent(score(headline)),
        "interval": percents(score_interval(headline)),
        "sections": [_section(counts.items, statistic) for statistic in found[1:]],
        "accuracy": percent(counts.right / counts.n),
        "accuracy_interval": percents(share_interval(counts.right, counts.n)),
        "subsets": counts.subsets.listed(),
        "invalid": counts.statuses["invalid"],
        "too_long": counts.statuses["too_long"],
        "ties": counts.statuses["tie"],
        "tokens": _token_numbers(counts.tokens),
        "by_kind": counts.kinds.listed(),
        "by_length": counts.lengths.listed(),
        "by_position": counts.shown.listed(),
        "budget": counts.budgets.listed(found[0]),
        "budget_forced": counts.budgets_forced.listed(found[0]) if counts.budgets_forced else None,
        "orders": counts.orders.numbers(),
        "votes": counts.votes.numbers(),
        "styles": scoring.styles(counts.items),
        "notes": counts.notes(),
    }


class _Counts:
    """Everything that one pass over the rows counts."""

    def __init__(self, benchmark: str | None, scoring: Scoring, budgets: Budgets, forced: Budgets | None):
        self.benchmark, self.scoring = benchmark, scoring
        self.n = self.right = 0
        self.items, self.statuses, self.tokens = scoring.items(), Counter[str](), array("I")
        self.subsets, self.kinds = Groups(), Groups()
        self.lengths = Groups((*ANSWER_BINS, LONGER, SHORTER, *TRACE_BINS))
        self.shown = Groups(f"the better answer is {letter}" for letter in "AB")
        self.orders, self.votes, self.budgets, self.budgets_forced = Orders(), Votes(), budgets, forced

    def notes(self) -> list[str]:
        """Remarks on the scores and on the budgets."""
        forced = self.budgets_forced.notes() if self.budgets_forced else []
        return [*self.scoring.notes(self.items), *self.budgets.notes(), *forced]

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        meta, correct = row.get("meta") or {}, bool(row["correct"])
        if meta.get("benchmark") != self.benchmark:
            raise InputError(f"judgement {row['id']!r} is of {meta.get('benchmark')}, those before of {self.benchmark}")
        self.n += 1
        self.right += correct
        self.statuses[row["status"]] += 1
        self.subsets.add(str(meta.get("subset") or meta.get("category") or meta.get("domain") or "all"), correct)
        self.kinds.add(row.get("kind") or "none", correct)
        self.shown.add(f"the better answer is {row['better']}", correct)
        for name in _length_names(row):
            self.lengths.add(name, correct)
        self.tokens.extend(count for order in row.get("tokens") or () for count in order)
        place = self.scoring.add(self.items, row)
        for lens in (self.budgets, self.budgets_forced, self.orders, self.votes):
            if lens is not None:
                lens.add(row, place)


def _token_limit(settings: Mapping[str, Any]) -> int | None:
    """The limit of a text in tokens: a policy's or an endpoint's. None if the settings do not say it."""
    limit = settings.get("max_new_tokens") or settings.get("max_tokens")
    return limit if isinstance(limit, int) else None


def _section(items: Items, statistic: Statistic) -> dict[str, Any]:
    strata = items.strata_of(statistic)
    return {
        "name": statistic.name,
        "n": items_in(strata),
        "accuracy": percent(score(strata)),
        "interval": percents(score_interval(strata)),
    }


def _bins(subject: str, edges: tuple[int, ...], unit: str) -> tuple[str, ...]:
    middle = [f"{subject}: {low:,} to {high:,} {unit}" for low, high in itertools.pairwise(edges)]
    return f"{subject}: under {edges[0]:,} {unit}", *middle, f"{subject}: {edges[-1]:,} {unit} or more"


ANSWER_BINS = _bins("answers", ANSWER_EDGES, "characters")
TRACE_BINS = _bins("trace", TRACE_EDGES, "tokens")
LONGER, SHORTER = "better answer is the longer one", "better answer is the shorter one"


def _length_names(row: Mapping[str, Any]) -> Iterator[str]:
    """The length groups that a row belongs to. The trace's length is the mean of the row's texts."""
    a, b = (len(_answer(row, side)) for side in ("a", "b"))
    yield ANSWER_BINS[int(np.searchsorted(ANSWER_EDGES, a + b, side="right"))]
    if row.get("better") in ("A", "B") and a != b:
        yield LONGER if (a > b) == (row["better"] == "A") else SHORTER
    counts = [count for order in row.get("tokens") or () for count in order]
    if counts:
        yield TRACE_BINS[int(np.searchsorted(TRACE_EDGES, sum(counts) / len(counts), side="right"))]


def _answer(row: Mapping[str, Any], side: str) -> str:
    """The answer that is judged: the response, or the last message of the conversation."""
    if f"response_{side}" in row:
        return row[f"response_{side}"]
    return row[f"conversation_{side}"][-1]["content"]


def _token_numbers(tokens: array) -> dict[str, float] | None:
    if not tokens:
        return None
    counts = np.frombuffer(tokens, np.uint32)
    p50, p99 = np.percentile(counts, [50, 99])
    return {"mean": float(counts.mean()), "p50": float(p50), "p99": float(p99), "max": int(counts.max())}
