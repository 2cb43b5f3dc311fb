"""The page about evaluations: scores beside the published ones, where a judge is right, and every judgement to read.

An evaluation is a directory with `summary.json`, `judgements.jsonl` or both, as `rmr1 eval` leaves it. Several stand in
one page, and two of one benchmark are compared judgement by judgement. This module reads the summaries and lays out the
tables; `report_judgements.py` reads the judgements, `report_curves.py` draws the charts.

Read next: `report_eval.html.j2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.rows import describe
from rmr1_jax.report.curves import make_chart
from rmr1_jax.report.judgements import FILTERS, STYLES, pack, read_judgements
from rmr1_jax.report.paper import COLUMNS, ROWS, SIZES, SOURCE
from rmr1_jax.report.reading import as_number, find_holders, json_object

JUDGEMENTS, SUMMARY = "judgements.jsonl", "summary.json"


TITLES = {"rewardbench": "RewardBench", "rm-bench": "RM-Bench", "rmb": "RMB"}


COUNTS = ("n", "invalid", "too_long", "ties")


# Table of summary.json -> title, what it counts, what its percentages are.
BREAKDOWNS = {
    "sections": ("By section", "Items", "Score"),
    "subsets": ("By subset", "Pairs", "Right"),
    "by_kind": ("By kind, as the judge classed it", "Pairs", "Right"),
    "by_position": ("By where the better answer stood", "Pairs", "Right"),
    "by_length": ("By length", "Pairs", "Right"),
}


# Table of summary.json -> what became of a text that the budget cut.
BUDGETS = {"budget": "a text that is cut has no verdict", "budget_forced": "a text that is cut is made to answer"}


BUDGET_FIELDS = ("tokens", "score", "accuracy", "invalid", "truncated")


ORDERS = ("consistency", "first_position_share", "accuracy_ab", "accuracy_ba")

Compare = Callable[[Path, Path], Mapping[str, Any]]


def find_evaluations(root: Path) -> list[Path]:
    """The directories that hold an evaluation: `root` or, where it holds none itself, those below it."""
    found = find_holders(root, (JUDGEMENTS, SUMMARY))
    return found[:1] if root in found else found


def eval_view(
    roots: Sequence[tuple[str, Path]], evaluated: Mapping[str, Sequence[Path]], compare: Compare | None = None
) -> dict[str, Any]:
    """The variables of `report_eval.html.j2`. `roots` are named directories, `evaluated` the evaluations in each.

    `compare(first, second)` is asked about every two evaluations of one benchmark.

    Raises:
      InputError: a malformed file (file, line or field).
    """
    warnings: list[str] = []
    judges, judged = [], []
    for name, root in roots:
        for path in evaluated[name]:
            below = path.relative_to(root).parts
            file = path / JUDGEMENTS
            rows = list(read_judgements(file, warnings)) if file.is_file() else []
            judged.append(sorted(rows, key=_place))
            quotes = [found for row in rows for found in row["quotes"]]
            judges.append(_judge("/".join((name, *below)), path, judged[-1], warnings))
            judges[-1]["quotes"] = 100 * quotes.count("found") / len(quotes) if quotes else None
    index, pieces = pack(judged)
    benchmarks = list(dict.fromkeys(judge["benchmark"] for judge in judges))
    groups = [_group(benchmark, judges) for benchmark in benchmarks]
    outcomes = [{row["id"]: row["winner"] == row["better"] for row in rows} for rows in judged]
    for group in groups:
        group["comparisons"] = [
            _comparison(judges[first], judges[second], outcomes[first], outcomes[second], compare, warnings)
            for first, second in combinations(group["numbers"], 2)
            if outcomes[first] and outcomes[second]
        ]
    return {
        "names": [judge["name"] for judge in judges],
        "groups": groups,
        "judges": judges,
        "warnings": warnings,
        "n": sum(map(len, judged)),
        "data": index | {
            "names": [judge["name"] for judge in judges],
            "benchmarks": [benchmarks.index(judge["benchmark"]) for judge in judges],
            "order": FILTERS,
        },
        "pieces": pieces,
        "source": SOURCE,
        "styles": STYLES,
        "budgets": BUDGETS,
    }  # fmt: skip


def _judge(name: str, path: Path, rows: Sequence[Mapping[str, Any]], warnings: list[str]) -> dict[str, Any]:
    """One evaluation: its checked summary, or what its judgements alone tell where it has none yet."""
    if (path / SUMMARY).is_file():
        return {"name": name, "path": path} | read_summary(path / SUMMARY)
    warnings.append(f"{path}: no {SUMMARY} yet, so no scores; `rmr1 score` makes them of its logs")
    status = [row["status"] for row in rows]
    right = sum(row["winner"] == row["better"] for row in rows)
    counts = {"n": len(rows), "invalid": status.count("invalid"), "too_long": status.count("too_long")}
    counts |= {"ties": status.count("tie"), "headline": 100 * right / len(rows) if rows else None}
    benchmark = next((str(row["meta"]["benchmark"]) for row in rows if "benchmark" in row["meta"]), "judgements")
    return {"name": name, "path": path} | _checked(path / SUMMARY, {"benchmark": benchmark} | counts)


def _place(row: Mapping[str, Any]) -> float:
    """Rows stand in the order in which they were judged; `meta.number` is the pair's place in the data set."""
    number = as_number(row["meta"].get("number"))
    return math.inf if number is None else number


def read_summary(file: Path) -> dict[str, Any]:
    """summary.json with every number checked; what it leaves out is None or empty."""
    return _checked(file, json_object(file))


def _checked(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    def need(value: object, kind: type, name: str, expected: str) -> Any:
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{file}: field {name!r} is {describe(value)}, expected {expected}")
        return kind() if value is None else value

    def number(value: object, name: str) -> float | None:
        if value is not None and as_number(value) is None:
            raise InputError(f"{file}: field {name!r} is {describe(value)}, expected a number")
        return as_number(value)

    def interval(value: object, name: str) -> list[float | None] | None:
        ends = need(value, list, name, "two numbers, [low, high]")
        if len(ends) not in (0, 2):
            raise InputError(f"{file}: field {name!r} is {describe(value)}, expected two numbers, [low, high]")
        return [number(end, name) for end in ends] or None

    def table(value: object, name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        rows = []
        for place, row in enumerate(need(value, list, name, "a list of objects")):
            called = f"{name}[{place}]"
            row = need(row, dict, called, "an object")
            rows.append({field: number(row.get(field), f"{called}.{field}") for field in fields})
            rows[-1] |= {"name": str(row.get("name", "")), "interval": interval(row.get("interval"), called)}
        return rows

    def numbers(value: object, name: str, fields: Sequence[str]) -> dict[str, Any] | None:
        inside = need(value, dict, name, "an object")
        return {field: number(inside.get(field), f"{name}.{field}") for field in fields} if inside else None

    votes, styles = need(found.get("votes"), dict, "votes", "an object"), found.get("styles")
    grids = {}
    for domain, grid in need(styles, dict, "styles", "an object").items():
        if not (isinstance(grid, list) and len(grid) == 3 and all(isinstance(r, list) and len(r) == 3 for r in grid)):
            raise InputError(f"{file}: field 'styles.{domain}' is {describe(grid)}, expected three rows of three")
        grids[domain] = [[number(cell, f"styles.{domain}") for cell in row] for row in grid]
    return {
        "benchmark": need(found.get("benchmark"), str, "benchmark", "a text"),
        "judge": need(found.get("judge"), str, "judge", "a text"),
        "settings": need(found.get("settings"), dict, "settings", "an object"),
        "scores": need(found.get("scores"), dict, "scores", "an object"),
        **{name: number(found.get(name), name) for name in (*COUNTS, "headline")},
        "interval": interval(found.get("interval"), "interval"),
        **{name: table(found.get(name), name, ("n", "accuracy")) for name in BREAKDOWNS},
        "tokens": numbers(found.get("tokens"), "tokens", ("mean", "p50", "p99", "max")),
        **{name: table(found.get(name), name, BUDGET_FIELDS) for name in BUDGETS},
        "orders": numbers(found.get("orders"), "orders", ORDERS),
        "votes": number(votes.get("k"), "votes.k"),
        "by_k": table(votes.get("by_k"), "votes.by_k", ("k", "accuracy")),
        "confidence": table(votes.get("confidence"), "votes.confidence", ("share", "n", "accuracy")),
        "styles": grids,
        "notes": [str(note) for note in need(found.get("notes"), list, "notes", "a list of texts")],
    }


def _group(benchmark: str, judges: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All evaluations of one benchmark: a table of scores, tables by name with a column a judge, and charts."""
    numbers = [number for number, judge in enumerate(judges) if judge["benchmark"] == benchmark]
    members = [judges[number] for number in numbers]
    columns, size = COLUMNS.get(benchmark, {"Score": ""}), SIZES.get(benchmark)
    paper = [
        {"name": name, "cells": [*row, *[None] * (len(columns) - len(row))]}
        for name, row in ROWS.get(benchmark, {}).items()
    ]
    breakdowns = []
    for key, (title, unit, measure) in BREAKDOWNS.items():
        rows: dict[str, list[Any]] = {}
        for place, judge in enumerate(members):
            for row in judge[key]:
                rows.setdefault(row["name"], [None] * len(members))[place] = row
        if rows:
            named = [{"name": name, "cells": cells} for name, cells in rows.items()]
            breakdowns.append({"title": title, "unit": unit, "measure": measure, "rows": named})
    return {
        "benchmark": benchmark,
        "title": TITLES.get(benchmark, benchmark),
        "numbers": numbers,
        "judges": members,
        "columns": list(columns),
        "scores": [{"judge": judge, "cells": _score_cells(judge, columns)} for judge in members],
        "paper": paper,
        "size": size,
        "partial": [judge["name"] for judge in members if size and judge["n"] and judge["n"] < size],
        "breakdowns": breakdowns,
        "charts": [
            {"title": f"score by {field}", "text": text, "chart": chart}
            for key, column, field, text in (
                *((key, "tokens", "token budget", text) for key, text in BUDGETS.items()),
                ("by_k", "k", "number of votes", ""),
            )
            if (chart := _chart(members, key, column))
        ],
    }


def _score_cells(judge: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The judge's percentages in the columns of the published table, with the intervals that are known."""
    named = {row["name"].casefold(): row for row in judge["sections"]}
    cells = [{"value": judge["headline"], "interval": judge["interval"]}]
    for title, key in list(columns.items())[1:]:
        section = named.get(key.casefold()) or named.get(title.casefold()) or {}
        share = as_number(judge["scores"].get(key))
        value = section.get("accuracy") if share is None else 100 * share
        cells.append({"value": value, "interval": section.get("interval")})
    return cells


def _chart(judges: Sequence[Mapping[str, Any]], table: str, field: str) -> dict[str, Any] | None:
    """A line a judge of accuracy over a field of a table, where any judge has two points of it."""
    lines = []
    for judge in judges:
        points = [(row[field], row["accuracy"] if row.get("score") is None else row["score"]) for row in judge[table]]
        lines.append([(x, y) for x, y in points if x is not None and y is not None])
    return make_chart(lines, log=field == "tokens") if any(len(line) > 1 for line in lines) else None


def _comparison(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    right: Mapping[str, bool],
    also: Mapping[str, bool],
    compare: Compare | None,
    warnings: list[str],
) -> dict[str, Any]:
    """How often both, one or none of two judges is right, on the pairs that both judged; and what `compare` says."""
    shared = right.keys() & also.keys()
    counts = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for name in shared:
        counts[right[name], also[name]] += 1
    facts = {}
    try:
        if compare and shared:
            facts = _tested(compare(first["path"], second["path"]))
    except InputError as error:  # no reason to have no page
        warnings.append(f"{first['name']} and {second['name']} are not compared by a test: {error}")
    return {"first": first["name"], "second": second["name"], "n": len(shared), "counts": counts, "facts": facts}


def _tested(said: Mapping[str, Any]) -> dict[str, str]:
    """What a comparison of two judges says, in words."""
    low, high = said["interval"] or (None, None)
    return {
        said["test"]: f"p = {_words(said['p'], '.3g')}",
        "difference of the scores": f"{_words(said['difference'], '+.1f')} points, 95% interval "
        f"{_words(low, '+.1f')} to {_words(high, '+.1f')}",
        "same verdict": f"{_words(said['agreement'], '.1f')}%",
        "Cohen's kappa": _words(said["kappa"], ".2f"),
    }


def _words(number: float | None, form: str) -> str:
    return "\N{EN DASH}" if number is None else format(number, form).replace("-", "\N{MINUS SIGN}")
