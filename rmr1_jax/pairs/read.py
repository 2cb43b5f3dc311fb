"""Preference pairs from every source: our JSONL pairs, public preference sets and benchmarks, told by their fields.

    pairs = read_pairs("pairs.jsonl")                       # a generator; memory does not grow with the file
    report = ReadReport()
    pairs = read_pairs("pairs.jsonl", on_bad_row="quarantine", rejects="rejects.jsonl", report=report)

Files are JSONL, JSON arrays or Parquet, whatever the format. Our own rows have `id` and one of

    question, response_a, response_b [, better]             shown as they stand; better is "A", "B" or null
    question, chosen, rejected                              shown in an order drawn from (seed, id)
    conversation_a, conversation_b [, better]               lists of {role, content}, for several turns
    chosen, rejected                                        the same as conversations, no `question`

and every other field goes into the pair's `meta`.

Next: `data/pair.py` for what a pair is; `data/sources.py` and `data/benchmarks.py` for the rows of the sets RM-R1 is
trained and evaluated on; `data/published.py` for the published training rows, which are rendered already.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.benchmarks import LegacyFlags, OrderFlags, rewardbench_parser, rm_bench_parser, rmb_parser
from rmr1_jax.pairs.pair import ROLES, Message, PreferencePair, drawn_in_b, render_pair
from rmr1_jax.pairs.rows import BadRow, ReadReport, Row, keep_good, read_rows, refuse_as_rejects
from rmr1_jax.pairs.training_sets import CHOSEN_PARSERS, TOLD_BY, Parser, published_parser
from rmr1_jax.prompts.prompt import Prompt
from rmr1_jax.prompts.recover import recover_prompt

__all__ = ["FORMATS", "LegacyFlags", "Message", "PreferencePair", "ReadReport", "read_pairs", "render_pair"]

_FRAME_ROWS = 256  # of published rows, from which their prompt is recovered


BENCHMARKS = ("rewardbench", "rm-bench", "rmb")


FORMATS = ("pairs", *CHOSEN_PARSERS, "published", *BENCHMARKS)


def read_pairs(
    path: str | Path,
    format: str = "auto",
    *,
    seed: int = 0,
    flags: OrderFlags | None = None,
    select: Callable[[Row], bool] | None = None,
    on_bad_row: str = "error",
    rejects: str | Path | None = None,
    report: ReadReport | None = None,
) -> Iterator[PreferencePair]:
    """The preference pairs of a file, or of all data files in a folder, one after the other.

    Args:
        format: one of `FORMATS`, or "auto": told by the fields of the first row that can be read. "published", which
            takes pairs out of rendered rows again, must be asked for.
        seed: of the A/B order, where the source does not fix it. The benchmarks' order is `LegacyFlags(seed)`; 0 is the
            published one. Rows that say chosen and rejected are ordered by (seed, id), whatever else is in the file.
        flags: the benchmarks' order given outright, `flags[k]` for judgement k; see `data/benchmarks.py`.
        select: rows for which it is False are passed over before they are checked; they count as kept and make no pair.
        on_bad_row, rejects, report: "error" raises at the first bad row, "quarantine" writes it into `rejects` (JSONL)
            and goes on; `report` is kept up to date. A second row with the same id is a bad row.

    Raises InputError, with file, line, column and field, what stood there and what was expected.
    """
    if format != "auto" and format not in FORMATS:
        nearest = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0.0)[0]
        raise InputError(f"format={format!r} is unknown; the nearest is {nearest!r} (auto, {', '.join(FORMATS)})")
    refuse_as_rejects(rejects, path)
    flags = LegacyFlags(seed) if flags is None else flags
    rows: Iterable[Row | BadRow] = read_rows(path)
    if format == "auto":
        format, rows = _told_by_fields(rows, path)
    parse, rows = _parser(format, rows, seed, flags, path)
    return keep_good(rows, _selected(_once(parse), select), on_bad_row=on_bad_row, rejects=rejects, report=report)


def source_format(path: str | Path) -> str:
    """The format of a source, told by its first row that can be read; InputError as for `read_pairs`."""
    return _told_by_fields(read_rows(path), path)[0]


def _parser(
    format: str, rows: Iterable[Row | BadRow], seed: int, flags: OrderFlags, path: str | Path
) -> tuple[Parser, Iterable[Row | BadRow]]:
    """What parses a row of the format, and the rows, of which it may have needed some beforehand."""
    if format == "rm-bench":  # its order is drawn by the number of items
        rows = list(rows)
        return rm_bench_parser(flags, len(rows)), rows
    if format == "published":
        rows = iter(rows)
        first = list(itertools.islice(rows, _FRAME_ROWS))
        return published_parser(_prompt_of(first, path)), itertools.chain(first, rows)
    if format in BENCHMARKS:
        return {"rewardbench": rewardbench_parser, "rmb": rmb_parser}[format](flags), rows
    return (pairs_parser if format == "pairs" else CHOSEN_PARSERS[format])(seed), rows


def _prompt_of(rows: list[Row | BadRow], path: str | Path) -> Prompt:
    """The prompt that published rows were rendered with; those that are bad are reported when they are parsed."""
    shown = []
    for row in rows:
        with suppress(BadRow):
            if isinstance(row, Row):
                messages = row.messages("context_messages", ("system", "user"), last="user")
                shown.append([{"role": role, "content": content} for role, content in messages])
    try:
        return recover_prompt(shown)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _selected(parse: Parser, select: Callable[[Row], bool] | None) -> Parser:
    return parse if select is None else lambda row: parse(row) if select(row) else []


def pairs_parser(seed: int) -> Parser:
    """Our own row -> one pair."""

    def parse(row: Row) -> list[PreferencePair]:
        name = row.identifier("id")
        used = {"id"}

        def conversation(field: str) -> list[tuple[str, str]]:
            used.add(field)
            if "question" in row.value:
                used.add("question")
                return [("user", row.text("question")), ("assistant", row.text(field))]
            return row.messages(field, ROLES, last="assistant")

        sides = _sides(row)
        first, second = conversation(sides[0]), conversation(sides[1])
        if sides == ("chosen", "rejected"):
            chosen_in_b = drawn_in_b(seed, name)
            first, second = (second, first) if chosen_in_b else (first, second)
            better: object = "B" if chosen_in_b else "A"
        else:
            used.add("better")
            better = row.value.get("better")
            if better not in ("A", "B", None):
                raise row.bad("better", f"is {better!r}, expected 'A', 'B' or null")
        meta = {key: value for key, value in row.value.items() if key not in used}
        a, b = (tuple(Message(*message) for message in side) for side in (first, second))
        return [PreferencePair(id=name, conversation_a=a, conversation_b=b, better=better, meta=meta)]

    return parse


def _sides(row: Row) -> tuple[str, str]:
    """The two fields that hold the answers; the others of the row must not hold another two."""
    kinds = [("response_a", "response_b"), ("chosen", "rejected"), ("conversation_a", "conversation_b")]
    present = [kind for kind in kinds if kind[0] in row.value or kind[1] in row.value]
    if len(present) != 1:
        got = " and ".join(f"{a}/{b}" for a, b in present) or "none of them"
        raise row.bad(None, f"expected one of response_a/response_b, chosen/rejected, conversation_a/_b; got {got}")
    if present[0] == ("response_a", "response_b"):
        row.get("question")
    return present[0]


def _once(parse: Parser) -> Parser:
    """`parse`, which also refuses an id that an earlier row had."""
    seen: dict[str, str] = {}

    def parse_once(row: Row) -> list[PreferencePair]:
        pairs = parse(row)
        for pair in pairs:
            if pair.id in seen:
                raise row.bad("id", f"is {pair.id!r} a second time; {seen[pair.id]} has it too")
        seen.update({pair.id: str(row.place) for pair in pairs})
        return pairs

    return parse_once


def _told_by_fields(rows: Iterable[Row | BadRow], path: str | Path) -> tuple[str, Iterable[Row | BadRow]]:
    """The format of the first row that can be read, and all rows again."""
    rows = iter(rows)
    seen: list[Row | BadRow] = []
    for row in rows:
        seen.append(row)
        if isinstance(row, Row):
            return _format_of(row), itertools.chain(seen, rows)
    if not seen:
        raise InputError(f"{path}: holds no rows")
    return "pairs", seen  # nothing but bad rows: as good as any other


def _format_of(row: Row) -> str:
    fields = set(row.value)
    if {"context_messages", "winner"} <= fields:
        raise InputError(
            f"{row.place}: these are published training rows, rendered already; training and `rmr1 data prepare` take "
            "them as they are (`read_published`); to take their pairs out of the text again, say format: published"
        )
    if "Is_Chosen_Answer_Shuffled_toPositionB" in fields:
        raise InputError(f"{row.place}: this is a log of judgements, not a data set; `rmr1 score` reads logs")
    if "conversation_input" in fields:
        return "rmb"
    told = [name for name, needed in TOLD_BY.items() if needed <= fields]
    if told and (told[0] != "skywork" or not {"id", "question", "prompt"} & fields):
        return told[0]
    if {"prompt", "chosen", "rejected"} <= fields:
        return "rm-bench" if isinstance(row.value["chosen"], list) else "rewardbench"
    return "pairs"
