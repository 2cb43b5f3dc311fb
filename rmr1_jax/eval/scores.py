"""Scores: judgements grouped into the items that a benchmark counts and weighs.

RewardBench counts pairs, RM-Bench items of nine pairs, RMB pairs and best-of-N items, which are right only if all their
pairs are. An item is kept as two integers with a bit for each pair, so that memory does not hold texts. A published
score is a weighted mean of item values over strata. Here it is data (`Statistic`), so that a score, its interval
and the interval of a difference come from the same place.

Next: `intervals.py`; `benchmark.py`, the interface of a benchmark; `summary.py` and `compare.py`, which use both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmr1_jax.errors import InputError


class Stratum(NamedTuple):
    """Items that are averaged among themselves: the count of each value, and the stratum's weight in the score."""

    weight: float
    counts: Mapping[float, int]


def score(strata: Sequence[Stratum]) -> float:
    """The weighted mean of the means of the strata that hold an item. NaN if none does."""
    strata = [s for s in strata if s.weight and s.counts]
    if not strata:
        return math.nan
    means = [sum(v * n for v, n in s.counts.items()) / sum(s.counts.values()) for s in strata]
    return sum(s.weight * mean for s, mean in zip(strata, means, strict=True)) / sum(s.weight for s in strata)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test, from the numbers of pairs that only A and only B got right.

    Binomial with probability 1/2 over the pairs on which the two differ; 1 if they differ on none.
    """
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def cohen_kappa(table: Sequence[Sequence[int]]) -> float:
    """Cohen's kappa of two raters; table[i][j]: cases that the first put in class i and the second in class j.

    1: equal on all; 0: equal no more often than by chance. NaN if chance alone agrees on all, or without a case.
    """
    counts = np.asarray(table, float)
    n = counts.sum()
    if not n:
        return math.nan
    by_chance = float(counts.sum(axis=1) @ counts.sum(axis=0)) / n**2
    return math.nan if by_chance == 1 else float((np.trace(counts) / n - by_chance) / (1 - by_chance))


ALL_CELLS = -1  # every bit


class Statistic(NamedTuple):
    """A score: its strata with their weights, and which of an item's pairs it counts."""

    name: str
    weights: Mapping[str, float]
    cells: int = ALL_CELLS


class Place(NamedTuple):
    """Where a judgement counts. cell: its bit in the item; None: the next free one. group: a part of the stratum that a
    score file lists by itself."""

    stratum: str
    item: str
    cell: int | None = 0
    group: str = ""


class Items:
    """Outcomes of judgements, by stratum and item.

    all_or_nothing: an item is right only if all its pairs are; otherwise its value is the share of right pairs. read:
    applied to an item's bits before they are counted.
    """

    def __init__(self, *, all_or_nothing: bool = False, read: Callable[[int], int] = lambda bits: bits):
        self.all_or_nothing, self.read = all_or_nothing, read
        self.strata: dict[str, dict[tuple[str, str], tuple[int, int]]] = {}  # (group, item) -> (asked, right)

    def add(self, place: Place, correct: bool) -> None:
        """Count one judgement."""
        items = self.strata.setdefault(place.stratum, {})
        key = place.group, place.item
        asked, right = items.get(key, (0, 0))
        bit = 1 << (asked.bit_length() if place.cell is None else place.cell)
        items[key] = asked | bit, right | (bit if correct else 0)

    def bits(self, stratum: str) -> Iterator[tuple[tuple[str, str], int, int]]:
        """Yield ((group, item), bits of the judged pairs, bits of the right ones)."""
        for key, (asked, right) in self.strata.get(stratum, {}).items():
            yield key, self.read(asked), self.read(right)

    def values(self, stratum: str, cells: int = ALL_CELLS) -> Iterator[tuple[tuple[str, str], float]]:
        """Yield ((group, item), its value in [0, 1]) for the items that have a judgement among `cells`."""
        for key, asked, right in self.bits(stratum):
            if asked & cells:
                share = (right & cells).bit_count() / (asked & cells).bit_count()
                yield key, float(share == 1) if self.all_or_nothing else share

    def pairs(self, *strata: str) -> tuple[int, int]:
        """(right pairs, all pairs) in these strata."""
        bits = [(asked, right) for stratum in strata for _, asked, right in self.bits(stratum)]
        return sum(right.bit_count() for _, right in bits), sum(asked.bit_count() for asked, _ in bits)

    def groups(self, stratum: str) -> dict[str, tuple[int, int]]:
        """(right items, all items) by group, sorted by group."""
        counts: dict[str, tuple[int, int]] = {}
        for (group, _), value in self.values(stratum):
            right, n = counts.get(group, (0, 0))
            counts[group] = right + (value == 1), n + 1
        return dict(sorted(counts.items()))

    def strata_of(self, statistic: Statistic, minus: Items | None = None) -> list[Stratum]:
        """The strata of a score, for `score` and `score_interval`; with `minus`, which must hold the same items,
        those of the difference item by item."""
        found = []
        for name, weight in statistic.weights.items():
            others = dict(minus.values(name, statistic.cells)) if minus else None
            values = self.values(name, statistic.cells)
            found.append(Stratum(weight, Counter(value - others[key] if others else value for key, value in values)))
        return found


def items_in(strata: Iterable[Stratum]) -> int:
    """The number of items in the strata of a score."""
    return sum(sum(stratum.counts.values()) for stratum in strata)


class Scoring:
    """How judgements count. This one counts each pair by itself; the benchmarks override what differs."""

    def items(self) -> Items:
        """An empty collection of items."""
        return Items()

    def place(self, row: Mapping[str, Any]) -> Place:
        """Where a judgement row counts, by its `meta`. Raises KeyError or InputError if the meta does not say it."""
        return Place("all", row["id"])

    def statistics(self, items: Items) -> list[Statistic]:
        """The scores over the strata that hold an item: the headline first, then its sections."""
        return equal_sections(items.strata)

    def styles(self, items: Items) -> dict[str, Any] | None:
        """The accuracy by the styles of the two answers, where a benchmark has styles."""
        return None

    def notes(self, items: Items) -> list[str]:
        """Remarks on the scores, for the summary."""
        return []

    def add(self, items: Items, row: Mapping[str, Any]) -> Place:
        """Count a row in `items`; returns its place.

        Raises:
            InputError: the row's `meta` does not have what the benchmark needs.
        """
        try:
            place = self.place(row)
        except (KeyError, TypeError) as e:
            raise InputError(f"judgement {row['id']!r}: its meta {row.get('meta')!r:.200} has no usable {e}") from e
        except InputError as e:
            raise InputError(f"judgement {row['id']!r}: {e}") from e
        items.add(place, bool(row["correct"]))
        return place


def equal_sections(strata: Iterable[str]) -> list[Statistic]:
    """A headline over the strata with equal weights, and each stratum by itself."""
    names = list(strata)
    return [Statistic("headline", dict.fromkeys(names, 1.0)), *(Statistic(name, {name: 1.0}) for name in names)]
