"""Reads evaluations for their page: scores beside the published ones, tables and charts, and every judgement.

An evaluation is a directory with `summary.json`, `judgements.jsonl` or both, as `rmr1 eval` and `rmr1 score` write
them, or a file of `rmr1 judge`. A page may show several; every two of the same benchmark are compared judgement by
judgement. This module reads the summaries and lays out the tables; the published scores are in `paper.yaml`.

Read next: `judgements.py`, which reads the judgements; `templates/evaluation.html.j2`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rmr1_jax.config import read_yaml
from rmr1_jax.errors import InputError
from rmr1_jax.eval.attacks.injection import RESULT
from rmr1_jax.eval.compare import compare
from rmr1_jax.eval.logs import JUDGEMENTS, settings_of
from rmr1_jax.eval.summary import ABOUT, SUMMARY
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.report.curves import make_chart
from rmr1_jax.report.evaluation_facts import attack_rows, headline, is_silent, judge_facts
from rmr1_jax.report.judgements import FILTERS, STYLES, pack, shown_judgements
from rmr1_jax.report.reading import find_holders

MOST_FACTS = 3  # judges whose facts are at the top of the page; those of all are below
PAPER = Path(__file__).parent / "paper.yaml"  # the published results
TITLES = {"rewardbench": "RewardBench", "rm-bench": "RM-Bench", "rmb": "RMB", "judgebench": "JudgeBench"}
# Table of summary.json -> title, what it counts, what its percentages are.
BREAKDOWNS = {
    "sections": ("By section", "Items", "Score"),
    "subsets": ("By subset", "Pairs", "Accuracy"),
    "by_kind": ("By kind, as classified by the judge", "Pairs", "Accuracy"),
    "by_position": ("By position of the better answer", "Pairs", "Accuracy"),
    "by_length": ("By length", "Pairs", "Accuracy"),
}
# Table of summary.json -> how a text that exceeds the token budget counts.
BUDGETS = {
    "budget": "A text that exceeds the budget counts as one without a verdict.",
    "budget_forced": "A text that exceeds the budget is cut there and made to name an answer.",
}
# What a page needs of summary.json, for an evaluation that has none yet.
EMPTY = {"judge": "", "settings": {}, "scores": {}, "headline": None, "interval": None, "tokens": None, "orders": None}
EMPTY |= {"votes": None, "styles": None, "notes": []} | {name: [] for name in (*BREAKDOWNS, *BUDGETS)}


def find_evaluations(root: Path) -> list[Path]:
    """Returns the directories that hold an evaluation: `root` or, if it holds none itself, those below it. A file is
    one itself; where there is no directory, the files of `rmr1 judge` in `root` are those."""
    if root.is_file():
        return [root]
    if found := find_holders(root, (JUDGEMENTS, SUMMARY)):
        return found[:1] if root in found else found
    # The settings of `rmr1 judge` name its input; those of other files of rows do not.
    return [file for file in sorted(root.glob("*.jsonl")) if "input" in settings_of(file)]


def evaluation_page(roots: Sequence[tuple[str, Path]], evaluated: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Returns the variables of `evaluation.html.j2` for named directories.

    Args:
        evaluated: the evaluations in each directory, by its name.

    Raises:
        InputError: a file is malformed (the message names file, line and field).
    """
    warnings: list[str] = []
    judges, judged = [], []
    for name, root in roots:
        for path in evaluated[name]:
            file = path if path.is_file() else path / JUDGEMENTS
            rows = list(shown_judgements(file, warnings)) if file.is_file() else []
            judged.append(sorted(rows, key=lambda row: row["meta"].get("number", 0)))  # in the data set's order
            quotes = [found for row in rows for found in row["quotes"]]
            judge = {"name": "/".join((name, *path.relative_to(root).parts)), "path": path}
            judge["quotes"] = 100 * quotes.count("found") / len(quotes) if quotes else None
            judge["reasons"] = dict(Counter(row["reason"] for row in rows if row["reason"]).most_common())
            judge["named"] = Counter(row["winner"] for row in rows)
            judge["attacks"] = read_object(path / RESULT) if (path / RESULT).is_file() else None
            judge["about"] = read_object(path / ABOUT) if (path / ABOUT).is_file() else {}
            judges.append(judge | _summary(path, rows, warnings))
    index, pieces = pack(judged)
    names, paper = [judge["name"] for judge in judges], read_yaml(PAPER)
    benchmarks = list(dict.fromkeys(judge["benchmark"] for judge in judges))
    groups = [
        _group(benchmark, [j for j in judges if j["benchmark"] == benchmark], paper["benchmarks"].get(benchmark, {}))
        for benchmark in benchmarks
    ]
    for first, second in combinations(range(len(judges)), 2):
        if judged[first] and judged[second] and judges[first]["benchmark"] == judges[second]["benchmark"]:
            right = [
                {row["id"]: row["winner"] == row["better"] for row in judged[i] if row["better"]}
                for i in (first, second)
            ]
            group = groups[benchmarks.index(judges[first]["benchmark"])]
            group["comparisons"].append(_comparison(judges[first], judges[second], right, warnings))
    return {
        "names": names,
        "headline": headline(groups),
        "facts_of": {judge["name"]: judge_facts(judge) for judge in judges} if len(judges) <= MOST_FACTS else {},
        "groups": groups,
        "judges": judges,
        "warnings": warnings,
        "n": sum(map(len, judged)),
        "data": index
        | {"names": names, "benchmarks": [benchmarks.index(j["benchmark"]) for j in judges], "order": FILTERS},
        "pieces": pieces,
        "source": paper["source"],
        "styles": STYLES,
        "budgets": BUDGETS,
    }


def _summary(path: Path, rows: Sequence[Mapping[str, Any]], warnings: list[str]) -> dict[str, Any]:
    """Returns summary.json or, if there is none yet, what the judgements alone say."""
    file = path / SUMMARY
    if file.is_file():
        found = read_object(file)
        missing = [name for name in ("benchmark", "n", *EMPTY) if name not in found]
        if missing:
            raise InputError(
                f"{file}: field {missing[0]!r} is missing; not what `rmr1 eval` and `rmr1 score` write. Make it again "
                "with `rmr1 score`"
            )
        return found
    settings = settings_of(path if path.is_file() else path / JUDGEMENTS)
    if path.is_dir() and not (path / RESULT).is_file():
        warnings.append(f"{path}: no {SUMMARY} yet, so no scores; `rmr1 score` makes them of its logs")
    status = [row["status"] for row in rows]
    known = [row["winner"] == row["better"] for row in rows if row["better"]]
    return EMPTY | {
        "benchmark": rows[0]["meta"].get("benchmark", "judgements") if rows else "judgements",
        "judge": str(settings.get("judge") or settings.get("model", "")),
        "settings": settings,
        "n": len(rows),
        "headline": 100 * sum(known) / len(known) if known else None,
        "invalid": status.count("invalid"),
        "too_long": status.count("too_long"),
        "ties": status.count("tie"),
    }


def _group(benchmark: str, judges: Sequence[dict[str, Any]], published: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the evaluations of one benchmark: scores, breakdowns with a column for each judge, and charts."""
    columns, size = published.get("columns", {"Score": ""}), published.get("pairs")
    paper = [
        {"name": name, "cells": [*row, *[None] * (len(columns) - len(row))]}
        for name, row in published.get("models", {}).items()
    ]
    breakdowns = []
    for key, (title, unit, measure) in BREAKDOWNS.items():
        rows: dict[str, list[Any]] = {}
        for column, judge in enumerate(judges):
            for row in judge[key]:
                rows.setdefault(row["name"], [None] * len(judges))[column] = row
        if rows:
            named = [{"name": name, "cells": cells} for name, cells in rows.items()]
            breakdowns.append({"title": title, "unit": unit, "measure": measure, "rows": named})
    by_tokens = {
        key: [[(row["tokens"], row["score"]) for row in judge[key] or ()] for judge in judges] for key in BUDGETS
    }
    by_votes = [[(row["k"], row["accuracy"]) for row in (judge["votes"] or {}).get("by_k", ())] for judge in judges]
    charts = [("Score by token budget", text, by_tokens[key]) for key, text in BUDGETS.items()]
    charts += [("Accuracy by number of votes", "", by_votes)]
    return {
        "title": TITLES.get(benchmark, benchmark),
        "judges": judges,
        "columns": list(columns),
        "scores": [{"judge": judge, "cells": _score_cells(judge, columns)} for judge in judges],
        "paper": paper,
        "size": size,
        "partial": [judge["name"] for judge in judges if size and 0 < judge["n"] < size],
        "silent": all(is_silent(judge) for judge in judges),
        "attacks": attack_rows(judges),
        "breakdowns": breakdowns,
        "charts": [
            {"title": title, "text": text, "chart": make_chart(lines, log=title.endswith("budget"))}
            for title, text, lines in charts
            if any(len(line) > 1 for line in lines)
        ],
        "comparisons": [],
    }


def _score_cells(judge: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the judge's percentages in the columns of the published table, with the known intervals and counts."""
    sections = {row["name"].casefold(): row for row in judge["sections"]}
    cells = [{"value": judge["headline"], "interval": judge["interval"], "n": judge.get("items")}]
    for title, key in list(columns.items())[1:]:
        section = sections.get(key.casefold()) or sections.get(title.casefold()) or {}
        share = judge["scores"].get(key)
        value = section.get("accuracy") if share is None else 100 * share
        cells.append({"value": value, "interval": section.get("interval"), "n": section.get("n")})
    return cells


def _comparison(
    first: Mapping[str, Any], second: Mapping[str, Any], right: Sequence[Mapping[str, bool]], warnings: list[str]
) -> dict[str, Any]:
    """Compares two judges on the pairs that both judged. `right`: for each judge, whether it was right, by id."""
    shared = right[0].keys() & right[1].keys()
    counts = Counter((right[0][name], right[1][name]) for name in shared)
    facts = {}
    try:
        if shared:
            facts = _facts(compare(first["path"], second["path"]))
    except InputError as error:  # the page is useful without the test
        warnings.append(f"{first['name']} and {second['name']} are not compared by a test: {error}")
    return {"first": first["name"], "second": second["name"], "n": len(shared), "counts": counts, "facts": facts}


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns the result of a comparison of two judges in words."""

    def words(number: float | None, form: str) -> str:
        return "\N{EN DASH}" if number is None else format(number, form).replace("-", "\N{MINUS SIGN}")

    low, high = (words(end, "+.1f") for end in found["interval"])
    interval = f"95% interval {low} to {high}, n = {found['items']}"
    return {
        found["test"]: f"p = {words(found['p'], '.3g')}",
        "score difference": f"{words(found['difference'], '+.1f')} points, {interval}",
        "same verdict": f"{words(found['agreement'], '.1f')}%",
        "Cohen's kappa": words(found["kappa"], ".2f"),
    }
