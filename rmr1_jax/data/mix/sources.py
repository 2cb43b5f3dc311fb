"""One source of a training mixture: its config, how its rows are read, filtered and drawn, and their counts.

Next: `mixture.py`, which combines sources.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import commit_of
from rmr1_jax.pairs.benchmark_names import benchmark_of
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.read import BENCHMARKS, FORMATS, read_pairs, source_format
from rmr1_jax.pairs.rows import BadRow, ReadReport, Row

# The counts of a SourceReport for rows that are not kept, in the order in which rows are tested.
DROPPED = ("rejected", "filtered", "not_drawn", "ties", "alike", "duplicates", "contradictory", "overlap")
Value = str | int | float | bool | None
Filters = dict[str, tuple[Value, ...]]


@config_dataclass
class SourceConfig:
    """A data set of a mixture. Benchmarks are refused, by the values in their rows."""

    path: str
    """A file, a folder or a hub id."""
    name: str = ""
    """Name in the counts. Defaults to the last part of the path."""
    format: str = "auto"
    """Format of the rows; auto finds it from the first rows."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. null: the newest."""
    count: PositiveInt | None = None
    """Number of rows to draw: the first ones, unless shuffle is given. null: all."""
    shuffle: NonNegativeInt | None = None
    """Seed that draws the rows, in the order of `datasets.Dataset.shuffle`. null: no shuffling."""
    where: Filters = field(default_factory=dict)
    """Fields, each with the values of which a row must have one."""
    exclude: Filters = field(default_factory=dict)
    """Fields, each with the values of which a row must have none."""

    def __post_init__(self):
        name = self.name or re.sub(r"\.(jsonl|json|parquet|csv)(\.gz)?$", "", Path(re.sub("@.*", "", self.path)).name)
        if re.fullmatch(r"[\w.-]+", name) is None:
            raise InputError(f"sources: name={name!r} of {self.path!r} must be letters, digits, '.', '-' and '_'")
        object.__setattr__(self, "name", name)
        known = ("auto", *(each for each in FORMATS if each not in BENCHMARKS))
        if self.format not in known:
            raise InputError(f"source {name}: format={self.format!r} must be one of {', '.join(known)}")
        if self.shuffle is not None and self.count is None:
            raise InputError(f"source {name}: shuffle={self.shuffle} is the seed that draws `count` rows; give count")


@dataclass(kw_only=True)
class SourceReport:
    """The counts of a source's rows: read = kept + held_out + those in `DROPPED`. A row that makes several pairs, as
    its answers are lists, counts once for each of them.

    a: kept pairs that show the better answer in A. both_empty: part of alike. overlaps: rows by benchmark and kind,
    and those with a held-out question, counted whether or not they are removed. notes: what looks like a mistake in
    the config.
    """

    name: str
    path: str
    format: str
    commit: str | None
    read: int = 0
    kept: int = 0
    held_out: int = 0
    rejected: int = 0
    filtered: int = 0
    not_drawn: int = 0
    ties: int = 0
    alike: int = 0
    both_empty: int = 0
    duplicates: int = 0
    contradictory: int = 0
    overlap: int = 0
    a: int = 0
    overlaps: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def reconciles(self) -> bool:
        """Whether every row that was read is counted exactly once."""
        return self.read == self.kept + self.held_out + sum(getattr(self, reason) for reason in DROPPED)


def read_source(
    source: SourceConfig, path: Path, *, rejects: Path | None, bar: tqdm
) -> tuple[list[PreferencePair], SourceReport]:
    """Read, filter and draw the pairs of a source, without ties and those whose answers are the same.

    Args:
        path: where the source is on this machine. rejects: the file for bad rows, removed if there were none; None: a
            bad row is an error. bar: is advanced by the rows read.
    """
    format = source_format(path) if source.format == "auto" else source.format
    report = SourceReport(name=source.name, path=source.path, format=format, commit=commit_of(path))
    row_filter, read = _RowFilter(source, report, bar), ReadReport()
    try:
        pairs = list(read_pairs(path, report.format, select=row_filter, labelled=True, rejects=rejects, report=read))
    except BadRow:
        row_filter.check_benchmarks()  # that a row lacks something matters less
        raise
    if rejects and not read.rejected:
        rejects.unlink()
    report.read, report.rejected = read.made + read.rejected + report.filtered, read.rejected
    row_filter.check_names()
    row_filter.check_benchmarks()
    if source.count is not None:
        n = len(pairs)
        if n < source.count:
            report.notes.append(f"count={source.count}, but there are only {n} rows to draw from")
        order = range(n) if source.shuffle is None else np.random.default_rng(source.shuffle).permutation(n)
        pairs = [pairs[k] for k in order[: source.count]]
        report.not_drawn = n - len(pairs)
    known = [pair for pair in pairs if not pair.tie]
    report.ties = len(pairs) - len(known)
    different = [pair for pair in known if pair.response_a.strip() != pair.response_b.strip()]
    report.alike = len(known) - len(different)
    report.both_empty = sum("both_empty" in pair.meta for pair in known)
    return different, report


class _RowFilter:
    """Selects rows by their own fields, counts the others, and remembers the fields and values that occurred."""

    def __init__(self, source: SourceConfig, report: SourceReport, bar: tqdm):
        self.source, self.report, self.bar = source, report, bar
        self.fields: set[str] = set()
        self.values: dict[str, set[Value]] = {name: set() for name in (*source.where, *source.exclude)}
        self.benchmarks: Counter[str | None] = Counter()  # the rows of each benchmark; None: of no benchmark

    def __call__(self, row: Row) -> bool:
        self.bar.update()
        self.benchmarks[benchmark_of(row)] += 1
        self.fields |= row.value.keys()
        for name, values in self.values.items():
            if isinstance(value := row.value.get(name), Hashable):
                values.add(value)
        where, exclude = self.source.where.items(), self.source.exclude.items()
        has_all = all(row.value.get(name) in values for name, values in where)
        if not has_all or any(row.value.get(name) in values for name, values in exclude):
            self.report.filtered += 1
            return False
        return True

    def check_names(self) -> None:
        """Refuse a filter on a field that no row has, and note a value that no row has: both are probably misspelt."""
        name, has = self.source.name, ", ".join(sorted(self.fields))
        if absent := has and [each for each in self.values if each not in self.fields]:
            raise InputError(f"source {name}: no row has the field {absent[0]!r} to filter by; they have {has}")
        for kind in ("where", "exclude"):
            for field_name, values in getattr(self.source, kind).items():
                missing = [value for value in values if value not in self.values[field_name]]
                self.report.notes += [f"{kind}: no row has {value!r} in {field_name!r}" for value in missing]

    def check_benchmarks(self) -> None:
        """Refuse a source most of whose rows are of a benchmark, by their values, and note a few such rows."""
        name, path, total = self.source.name, self.source.path, self.benchmarks.total()
        for benchmark, count in self.benchmarks.items():
            if benchmark and 2 * count > total:
                raise InputError(
                    f"source {name}: {path} is an evaluation set: {count} of {total} rows have values of "
                    f"{benchmark} (pairs/benchmark_names.py); a judge that trains on it cannot be measured by it: it "
                    "belongs in overlap.benchmarks"
                )
            if benchmark:
                self.report.notes.append(f"{count} rows have values of {benchmark}, an evaluation set")
