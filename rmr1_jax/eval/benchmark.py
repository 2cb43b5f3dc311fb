"""The interface of a benchmark: load its pairs, write and read its published logs, compute its published scores.

Next: `rewardbench.py`, `rm_bench.py`, `rmb.py` and `judgebench.py`, which implement it; `registry.py`, which lists
them; `logs.py`, the parts that their logs are made of.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import ArrayFiles, Judged, is_ours, read_judgements, whole_rows
from rmr1_jax.eval.scores import Items, Scoring
from rmr1_jax.pairs.order import LegacyFlags
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import Row


class Benchmark(Scoring, ABC):
    """A benchmark. Paths of files are relative to a run's directory.

    name: as the command line and `meta["benchmark"]` have it. main_scores: the published file with the main scores.
    log_names: the patterns of the names of its published logs.
    """

    name: ClassVar[str]
    main_scores: ClassVar[str]
    log_names: ClassVar[tuple[str, ...]]

    def load(self, path: Path) -> Iterator[PreferencePair]:
        """The pairs of a file or folder in the published A/B order, with `section` and `number` in their `meta`."""
        for number, pair in enumerate(self.read(path)):
            meta = {**pair.meta, "section": self.section(pair.meta), "number": number}
            yield dataclasses.replace(pair, meta=meta)

    def read(self, path: Path) -> Iterator[PreferencePair]:
        """The pairs of a file or folder, as `load` numbers them."""
        return read_pairs(path, self.name, flags=LegacyFlags(0))

    @abstractmethod
    def section(self, meta: Mapping[str, Any]) -> str:
        """The section that a pair is in, by its `meta`; raises InputError if it is in none."""

    @abstractmethod
    def write_logs(self, files: ArrayFiles, rows: Iterable[Judged], judge: str) -> None:
        """Write the published logs of judgement rows in data-set order. `judge` is the judge's name."""

    @abstractmethod
    def judgements_of(self, entries: Iterable[Row]) -> Iterator[Judged]:
        """Our judgement rows for the entries of a published log."""

    @abstractmethod
    def score_files(self, items: Items) -> dict[str, Any]:
        """The contents of the published score files by path, from items that are not empty."""

    def as_released(self) -> Benchmark:
        """The benchmark as its released scorer computes it, with its mistakes, if there are any."""
        return self

    def judgements(self, path: Path) -> Iterator[Judged]:
        """The judgements in a log file, ours or published; raises InputError for a row of another benchmark."""
        if not is_ours(path):
            yield from self.judgements_of(whole_rows(path))
            return
        for row in read_judgements(path):
            if row["meta"]["benchmark"] != self.name:
                raise InputError(f"{path}: holds judgements of {row['meta']['benchmark']}, not of {self.name}")
            yield row

    def scores(self, rows: Iterable[Judged]) -> dict[str, Any]:
        """The contents of the published score files by path, from judgement rows.

        Raises InputError for no rows, or for rows that do not belong to the benchmark or lack what it needs.
        """
        items = self.items()
        for row in rows:
            self.add(items, row)
        if not items.strata:
            raise InputError("no judgements to score")
        return self.score_files(items)


def section_of(value: str, sections: Sequence[str], field: str, benchmark: str) -> str:
    """The section whose name `value` begins with; raises InputError if there is none."""
    found = next((section for section in sections if value.startswith(section)), None)
    if found is None:
        raise InputError(f"{field} {value!r} is none of {benchmark}'s: {', '.join(sections)}")
    return found
