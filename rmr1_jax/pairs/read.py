"""Reads preference pairs from files: our own pairs, public preference sets and benchmarks, recognised by their rows.

    pairs = read_pairs("pairs.jsonl")                                               # a generator
    report = ReadReport()
    pairs = read_pairs("pairs.jsonl", rejects="rejects.jsonl", report=report)       # bad rows are set aside

A file is JSONL, a JSON array (held in memory whole), Parquet, or CSV with a header, perhaps compressed with gzip.

Next: `pairs/containers.py`, which reads rows; `pairs/preferences.py`, which makes pairs of our own rows and of those of
other tools; `pairs/training_sets.py` and `pairs/benchmarks.py` for the sets that RM-R1 is trained and evaluated on.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.benchmark_names import REWARDBENCH_SUBSETS, RM_BENCH_DOMAINS
from rmr1_jax.pairs.benchmarks import parse_rewardbench, parse_rewardbench_2, parse_rm_bench, parse_rmb
from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.order import Order, OrderFlags
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.preferences import QUESTIONS, parse_pair
from rmr1_jax.pairs.rows import ReadReport, Row, check_rejects, parse_rows
from rmr1_jax.pairs.training_sets import parse_code_preference, parse_math_step, parse_skywork

ROWS_TO_RECOGNISE = 32


def read_pairs(
    path: str | Path,
    format: str = "auto",
    *,
    seed: int = 0,
    flags: OrderFlags | None = None,
    select: Callable[[Row], bool] | None = None,
    labelled: bool = False,
    rejects: str | Path | None = None,
    report: ReadReport | None = None,
) -> Iterator[PreferencePair]:
    """Read the preference pairs of a file, or of all data files in a folder, one after the other.

    Args:
        format: one of `FORMATS`, or "auto": recognised by the fields and values of the first rows.
        seed: of the A/B order, where the source does not fix it. The benchmarks' order is `LegacyFlags(seed)`; 0 is the
            published one. Rows with chosen and rejected answers are ordered by (seed, id) alone.
        flags: the benchmarks' order given explicitly, `flags[k]` for judgement k; see `pairs/order.py`.
        select: rows for which it is False are skipped before they are checked; they count as kept and make no pair.
        labelled: a row that names no better answer is a bad row, unless it says that the answers are a tie.
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
    order = Order(seed, flags, items)

    def parse(row: Row) -> list[PreferencePair]:
        pairs = _PARSERS[format](row, order) if select is None or select(row) else []
        if labelled and any(pair.better is None and not pair.tie for pair in pairs):
            name = "better" if "better" in row.value else None
            raise row.bad(name, "names no better answer; a pair to train on needs better: 'A' or 'B'")
        return pairs

    return parse_rows(read_rows(path), parse, rejects=rejects, report=report)


def source_format(path: str | Path) -> str:
    """Return the format of a source: that of most of its first rows, so that a damaged one does not decide. Raises as
    `read_pairs`."""
    first: dict[str, Row] = {}  # the first row of each format
    counts: Counter[str] = Counter()
    row = None
    for row in itertools.islice(read_rows(path), ROWS_TO_RECOGNISE):
        if isinstance(row, Row):
            format = _recognise(row)
            first.setdefault(format, row)
            counts[format] += 1
    if row is None:
        raise InputError(f"{path}: holds no rows")
    format = max(counts, key=counts.__getitem__, default="pairs")  # pairs: all rows are bad, whatever the format
    if format == "rendered":
        raise InputError(
            f"{first[format].place}: these are rendered training rows; training and `rmr1 data prepare` take them "
            "unchanged (`read_published`)"
        )
    if format == "log":
        raise InputError(f"{first[format].place}: this is a log of judgements, not a data set; `rmr1 score` reads logs")
    return format


def _recognise(row: Row) -> str:
    """Return the format of a row: one of `FORMATS`, "rendered" or "log"."""
    fields = row.value.keys()
    if {"context_messages", "winner"} <= fields:
        return "rendered"
    if "Is_Chosen_Answer_Shuffled_toPositionB" in fields:
        return "log"
    if "conversation_input" in fields:
        return "rmb"
    if {"input", "accepted", "rejected"} <= fields:
        return "code-preference"
    if {"prompt", "initial_reason_steps", "full_chosen", "full_rejected"} <= fields:
        return "math-step"
    given = {name for name in fields if row.value[name] is not None}  # a table has all columns in all rows
    chosen = row.value.get("chosen")
    messages = isinstance(chosen, list) and any(isinstance(message, dict) for message in chosen)
    if {"prompt", "chosen", "rejected"} <= fields and not messages:
        if isinstance(chosen, list) and str(row.value.get("domain")).startswith(RM_BENCH_DOMAINS):
            return "rm-bench"
        if isinstance(chosen, list) or {"num_correct", "subset"} <= given:
            return "rewardbench-2"
        if "id" in given and row.value.get("subset") in [*REWARDBENCH_SUBSETS]:
            return "rewardbench"
    if {"chosen", "rejected", "source"} <= fields and not {"id", *QUESTIONS} & given and not isinstance(chosen, str):
        return "skywork"
    return "pairs"


_PARSERS: Mapping[str, Callable[[Row, Order], list[PreferencePair]]] = MappingProxyType(
    {
        "pairs": parse_pair,
        "skywork": parse_skywork,
        "code-preference": parse_code_preference,
        "math-step": parse_math_step,
        "rewardbench": parse_rewardbench,
        "rewardbench-2": parse_rewardbench_2,
        "rm-bench": parse_rm_bench,
        "rmb": parse_rmb,
    }
)
FORMATS = tuple(_PARSERS)
BENCHMARKS = ("rewardbench", "rewardbench-2", "rm-bench", "rmb")
