"""Reads preference pairs from files: our own pairs, public preference sets and benchmarks, recognised by their fields.

    pairs = read_pairs("pairs.jsonl")                                               # a generator
    report = ReadReport()
    pairs = read_pairs("pairs.jsonl", rejects="rejects.jsonl", report=report)       # bad rows are set aside

Files of each format are JSONL, JSON arrays (held in memory whole) or Parquet. Our own rows have `id` and one of

    question, response_a, response_b [, better]             shown in this order; better is "A", "B" or null
    question, chosen, rejected                              shown in an order drawn from (seed, id)
    conversation_a, conversation_b [, better]               lists of {role, content}, for several turns
    chosen, rejected                                        lists of {role, content}, without `question`

and every other field goes into the pair's `meta`.

Next: `pairs/rows.py`, which reads rows and reports bad ones; `pairs/training_sets.py` and `pairs/benchmarks.py` for the
rows of the sets that RM-R1 is trained and evaluated on.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.benchmarks import parse_rewardbench, parse_rm_bench, parse_rmb
from rmr1_jax.pairs.order import Order, OrderFlags
from rmr1_jax.pairs.pair import ROLES, PreferencePair
from rmr1_jax.pairs.rows import ReadReport, Row, check_rejects, parse_rows, read_rows
from rmr1_jax.pairs.training_sets import parse_code_preference, parse_math_step, parse_skywork


def read_pairs(
    path: str | Path,
    format: str = "auto",
    *,
    seed: int = 0,
    flags: OrderFlags | None = None,
    select: Callable[[Row], bool] | None = None,
    rejects: str | Path | None = None,
    report: ReadReport | None = None,
) -> Iterator[PreferencePair]:
    """Read the preference pairs of a file, or of all data files in a folder, one after the other.

    Args:
        format: one of `FORMATS`, or "auto": recognised by the fields of the first row that can be read.
        seed: of the A/B order, where the source does not fix it. The benchmarks' order is `LegacyFlags(seed)`; 0 is the
            published one. Rows with chosen and rejected answers are ordered by (seed, id) alone.
        flags: the benchmarks' order given explicitly, `flags[k]` for judgement k; see `pairs/order.py`.
        select: rows for which it is False are skipped before they are checked; they count as kept and make no pair.
        rejects, report: as in `parse_rows`.

    Raises:
        InputError: a row cannot be used and `rejects` is None, a file cannot be read, or the format is unknown.
    """
    if format != "auto" and format not in FORMATS:
        nearest = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0.0)[0]
        raise InputError(f"format={format!r} is unknown; the nearest is {nearest!r} (auto, {', '.join(FORMATS)})")
    check_rejects(rejects, path)
    format = source_format(path) if format == "auto" else format
    items = sum(1 for _ in read_rows(path)) if format == "rm-bench" else 0
    parse, order = _PARSERS[format], Order(seed, flags, items)
    return parse_rows(
        read_rows(path),
        lambda row: parse(row, order) if select is None or select(row) else [],
        rejects=rejects,
        report=report,
    )


def source_format(path: str | Path) -> str:
    """Return the format of a source, recognised by its first row that can be read. Raises as `read_pairs`."""
    row = None
    for row in read_rows(path):
        if isinstance(row, Row):
            return _recognise(row)
    if row is None:
        raise InputError(f"{path}: holds no rows")
    return "pairs"  # all rows are bad, whatever the format


def parse_pair(row: Row, order: Order) -> list[PreferencePair]:
    """Row of our own -> one pair."""
    name, sides = row.identifier("id"), _sides(row)
    if "question" in row.value:
        question = ("user", row.text("question"))
        first, second = ([question, ("assistant", row.text(side))] for side in sides)
    else:
        first, second = (row.messages(side, ROLES, last="assistant") for side in sides)
    meta = {key: value for key, value in row.value.items() if key not in ("id", "question", *sides)}
    if sides == ("chosen", "rejected"):
        return [PreferencePair.from_preference(name, first, second, chosen_in_b=order.by_id(name), meta=meta)]
    better = row.side("better")
    meta.pop("better", None)
    return [PreferencePair(id=name, conversation_a=first, conversation_b=second, better=better, meta=meta)]


def _sides(row: Row) -> tuple[str, str]:
    """Return the names of the two fields that hold the answers. The row must not hold another two."""
    kinds = [("response_a", "response_b"), ("chosen", "rejected"), ("conversation_a", "conversation_b")]
    present = [kind for kind in kinds if kind[0] in row.value or kind[1] in row.value]
    if len(present) != 1:
        got = " and ".join(f"{a}/{b}" for a, b in present) or "none of them"
        raise row.bad(None, f"expected one of response_a/response_b, chosen/rejected, conversation_a/_b; got {got}")
    if present[0] == ("response_a", "response_b"):
        row.get("question")
    return present[0]


def _recognise(row: Row) -> str:
    fields = row.value.keys()
    if {"context_messages", "winner"} <= fields:
        raise InputError(
            f"{row.place}: these are rendered training rows; training and `rmr1 data prepare` take them unchanged "
            "(`read_published`)"
        )
    if "Is_Chosen_Answer_Shuffled_toPositionB" in fields:
        raise InputError(f"{row.place}: this is a log of judgements, not a data set; `rmr1 score` reads logs")
    if "conversation_input" in fields:
        return "rmb"
    if {"input", "accepted", "rejected"} <= fields:
        return "code-preference"
    if {"prompt", "initial_reason_steps", "full_chosen", "full_rejected"} <= fields:
        return "math-step"
    if {"prompt", "chosen", "rejected"} <= fields:
        return "rm-bench" if isinstance(row.value["chosen"], list) else "rewardbench"
    if {"chosen", "rejected", "source"} <= fields and not {"id", "question"} & fields:
        return "skywork"
    return "pairs"


_PARSERS: Mapping[str, Callable[[Row, Order], list[PreferencePair]]] = MappingProxyType(
    {
        "pairs": parse_pair,
        "skywork": parse_skywork,
        "code-preference": parse_code_preference,
        "math-step": parse_math_step,
        "rewardbench": parse_rewardbench,
        "rm-bench": parse_rm_bench,
        "rmb": parse_rmb,
    }
)
FORMATS = tuple(_PARSERS)
BENCHMARKS = ("rewardbench", "rm-bench", "rmb")
