"""Prints a judge's text and its verdict to a terminal, in colours where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from rmr1_jax.prompts.escape import without_control
from rmr1_jax.report.trace import Span, split_trace

_SIDES = {"A": "34", "B": "35"}  # blue and magenta, as ANSI codes
_VERDICT = {"A": "1;34", "B": "1;35"}


def wants_colour() -> bool:
    """Whether the standard output is a terminal and NO_COLOR (https://no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def trace_text(text: str, *, colour: bool) -> str:
    """The text for a terminal: tags and thoughts dim, what is about answer A blue and about B magenta, the verdict
    bold. Control characters are replaced."""
    return "".join(_painted(without_control(span.text), _code(span), colour) for span in split_trace(text))


def verdict_text(row: Mapping[str, Any], *, colour: bool) -> str:
    """The verdict of a row of `rmr1 judge` in a line, with the counts of the votes if there are several."""
    winner = row["winner"]
    named = f"verdict: {_painted(winner, _VERDICT[winner], colour)}" if winner else row["status"].replace("_", " ")
    named = {"invalid": "no verdict"}.get(named, named)
    if sum(row["votes"].values()) > 1:
        named += f" ({', '.join(f'{name} {count}' for name, count in row['votes'].items())})"
    return named + (f"; {row['note']}" if row.get("note") else "")


def _code(span: Span) -> str:
    if span.kind == "tag" or span.block == "think":
        return "2"
    return "1" if span.block == "answer" else _SIDES.get(span.side, "")


def _painted(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text
