"""Puts the result of evaluations into a sentence, and lists what they say about themselves and about attacks.

Read next: `evaluation.py`, whose page shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.report.about import day

AT_MOST = 3  # judges of a benchmark that are named in the sentence
NOTHING = "no verdicts: nothing measured"
ATTACK_FIELDS = ("name", "cases", "counted", "succeeded", "silenced", "rate", "interval")


def headline(groups: Sequence[Mapping[str, Any]]) -> str:
    """Returns the result of a page in a sentence: the score of each judge by benchmark, the best one first."""
    return " ".join(f"{words[0].upper()}{words[1:]}." for group in groups if (words := _words(group)))


def _words(group: Mapping[str, Any]) -> str:
    judges = [judge for judge in group["judges"] if judge["n"]]
    scored = [judge for judge in judges if judge["headline"] is not None and not is_silent(judge)]
    scored.sort(key=lambda judge: -judge["headline"])
    several = len(judges) > 1
    if group["silent"]:
        return NOTHING if judges else ""
    if scored:
        if several:
            parts = [f"{each['name']} {each['headline']:.1f}% (n = {_counted(each):,})" for each in scored[:AT_MOST]]
            more = f" and {len(scored) - AT_MOST} more" if len(scored) > AT_MOST else ""
            return f"{group['title']}: {', '.join(parts)}{more}"
        what = "a score of" if group["size"] else "right answers:"
        return f"{group['title']}: {what} {scored[0]['headline']:.1f}%{_between(scored[0])}"
    return "; ".join(f"{judge['name']}: {_named(judge)}" if several else _named(judge) for judge in judges[:AT_MOST])


def _between(judge: Mapping[str, Any]) -> str:
    """Returns the interval of a score and what it counts, in brackets, as far as they are known."""
    low, high = judge["interval"] or (None, None)
    interval = "" if low is None or high is None else f"95% interval {low:.1f} to {high:.1f}, "
    return f" ({interval}n = {_counted(judge):,})"


def _counted(judge: Mapping[str, Any]) -> int:
    """Returns how many items, or else pairs, a score is of."""
    return judge.get("items") or judge["n"]


def _named(judge: Mapping[str, Any]) -> str:
    a, b = (judge["named"].get(side, 0) for side in "AB")
    none = judge["n"] - a - b
    return f"of {judge['n']:,} pairs the judge names A in {a:,} and B in {b:,}" + (
        f", none in {none:,}" if none else ""
    )


def is_silent(judge: Mapping[str, Any]) -> bool:
    """Returns whether no judgement of a judge has a winner, so that its numbers measure nothing."""
    return judge["n"] - judge["invalid"] - judge["too_long"] - judge["ties"] <= 0


def judge_facts(judge: Mapping[str, Any]) -> dict[str, str]:
    """Returns what an evaluation says about itself, by title."""
    settings = judge["settings"]
    found = {
        "Judge": str(judge["judge"]),
        "Model": str(settings.get("model", "")),
        "Judgements": f"{judge['n']:,}",
        "Prompt": str(settings.get("prompt", "")).split(" (")[0],
        "Rule": str(settings.get("rule", "")),
        "Finished": day(str(judge["about"].get("written", ""))),
        "Version": f"rmr1_jax {judge['about']['version']}" if judge["about"].get("version") else "",
    }
    if found["Model"].startswith(found["Judge"]):
        del found["Judge"]
    return {name: text for name, text in found.items() if text}


def attack_rows(judges: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each kind and family of attacks, with a cell for each judge, or None where it was not attacked
    so; empty where no judge was attacked.

    Raises:
        InputError: an injection.json is not what `rmr1 eval injection` writes.
    """
    rows: dict[tuple[str, bool], list[Any]] = {}
    for column, judge in enumerate(judges):
        found = judge["attacks"] or {}
        for key in ("kinds", "families"):
            for cell in found.get(key, ()):
                if not isinstance(cell, dict) or any(field not in cell for field in ATTACK_FIELDS):
                    raise InputError(
                        f"{judge['path']}/injection.json: {key!r} is not what `rmr1 eval injection` writes"
                    )
                if cell["cases"]:
                    rows.setdefault((str(cell["name"]), key == "kinds"), [None] * len(judges))[column] = cell
    return [{"name": f"all {name}" if all_ else name, "cells": cells} for (name, all_), cells in rows.items()]
