"""Items: judgements brought together into what a benchmark counts, resamples and weighs.

RewardBench counts pairs, RM-Bench items of nine pairs, RMB pairs and best-of-N items, which are right only if all their
pairs are. An item is kept as two whole numbers, a bit a pair: memory knows nothing of texts. The published scores are
weighted means of an item's value over strata; here they are tables, so that a score, its bootstrap interval and the
interval of a difference all come from one place.

Next: `stats.py`, the numbers; `summary.py` and `compare.py`, which use both.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.eval.rewardbench import SECTIONS
from rmr1_jax.pairs.benchmarks import STYLES

Z95 = 1.959963984540054  # the normal distribution's 97.5% point


RESAMPLES = 10_000


class Stratum(NamedTuple):
    """Items that are resampled among themselves: how often each value stands, and the stratum's weight in the score."""

    weight: float
    counts: Mapping[float, int]


def score(strata: Sequence[Stratum]) -> float:
    """The weighted mean of the strata's means, over the weights of those that hold an item. NaN where none does."""
    strata = [s for s in strata if s.weight and s.counts]
    if not strata:
        return math.nan
    means = [sum(v * n for v, n in s.counts.items()) / sum(s.counts.values()) for s in strata]
    return sum(s.weight * mean for s, mean in zip(strata, means, strict=True)) / sum(s.weight for s in strata)


def bootstrap_interval(
    strata: Sequence[Stratum], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of `score`: items are drawn with replacement within each stratum.

    The same as `scipy.stats.bootstrap(samples, score, method="percentile")`, whose samples are the strata. (NaN, NaN)
    where no stratum holds an item. Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    strata = [s for s in strata if s.weight and s.counts]
    if not strata:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    scores = np.zeros(resamples)
    for stratum in strata:
        values, counts = (np.array(x, float) for x in zip(*sorted(stratum.counts.items()), strict=True))
        drawn = random.multinomial(int(counts.sum()), counts / counts.sum(), size=resamples)  # [resamples, values]
        scores += stratum.weight * (drawn @ values) / counts.sum()
    tail = (1 - level) / 2
    low, high = np.quantile(scores / sum(s.weight for s in strata), [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share, right / n; (NaN, NaN) for n = 0. z = 1.96: 95%."""
    if not n:
        return math.nan, math.nan
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test: are pairs that only A got right as many as those that only B did?

    Binomial with 1/2 over the pairs on which the two differ; 1 where they differ on none.
    """
    from scipy.stats import binomtest  # takes half a second to import

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def cohen_kappa(table: Sequence[Sequence[int]]) -> float:
    """Cohen's kappa of two raters; table[i][j]: cases that the first put in class i, the second in class j.

    1: the same on all; 0: no more often the same than by chance. NaN where chance alone agrees on all, or no case is.
    """
    counts = np.asarray(table, float)
    n = counts.sum()
    if not n:
        return math.nan
    by_chance = float(counts.sum(axis=1) @ counts.sum(axis=0)) / n**2
    return math.nan if by_chance == 1 else float((np.trace(counts) / n - by_chance) / (1 - by_chance))


DOMAINS = ("chat", "math", "code", "safety")


RMB_SETS = ("Pairwise Helpfulness", "Pairwise Harmlessness", "BoN Helpfulness", "BoN Harmlessness")


ALL_CELLS = -1  # every bit


# Of RM-Bench's cells (chosen style, rejected style): hard is where the rejected answer has the more elaborate style.
DIFFICULTIES = {
    name: sum(1 << (i * STYLES + j) for i in range(STYLES) for j in range(STYLES) if compare(i, j))
    for name, compare in (("hard", operator.lt), ("normal", operator.eq), ("easy", operator.gt))
}


class Statistic(NamedTuple):
    """A score: which strata it takes with which weights, and which of an item's pairs."""

    name: str
    weights: Mapping[str, float]
    cells: int = ALL_CELLS


class Place(NamedTuple):
    """Where a judgement counts. cell: its bit in the item; None: the next free one."""

    stratum: str
    item: str
    cell: int | None


def place_of(row: Mapping[str, Any]) -> Place:
    """The place of a judgement row by its `meta`; a row of no known benchmark is an item of the stratum "all".

    Raises:
        InputError: the meta lacks what its benchmark needs.
    """
    meta = row.get("meta") or {}
    try:
        match meta.get("benchmark"):
            case "rewardbench":
                return Place(str(meta["subset"]), row["id"], 0)
            case "rm-bench":
                return Place(_domain(meta["domain"]), str(meta["item"]), _cell(meta))
            case "rmb":
                kind = {"pairwise": "Pairwise", "best-of-n": "BoN"}[meta["kind"]]
                goal = next(goal for goal in ("Helpfulness", "Harmlessness") if goal in meta["category"])
                return Place(f"{kind} {goal}", str(meta["item"]), None)
    except (KeyError, TypeError, StopIteration) as e:
        lacks = e.args[0] if e.args else "category"
        raise InputError(f"judgement {row.get('id')!r}: its meta {meta!r:.200} has no usable {lacks}") from e
    return Place("all", row["id"], 0)


class Items:
    """Right and wrong by stratum and item. slip: as the released RM-Bench scorer reads them, file 3 twice, 2 never."""

    def __init__(self, slip: bool = False):
        self.slip = slip
        self.strata: dict[str, dict[str, tuple[int, int]]] = {}

    def add(self, place: Place, correct: bool) -> None:
        """Count one judgement."""
        items = self.strata.setdefault(place.stratum, {})
        asked, right = items.get(place.item, (0, 0))
        bit = 1 << (asked.bit_length() if place.cell is None else place.cell)
        items[place.item] = asked | bit, right | (bit if correct else 0)

    def values(self, stratum: str, cells: int = ALL_CELLS) -> Iterator[tuple[str, float]]:
        """(item, its value in [0, 1]) for the items that have a judgement among `cells`."""
        for item, (asked, right) in self.strata.get(stratum, {}).items():
            if self.slip:
                asked, right = _slipped(asked), _slipped(right)
            if asked & cells:
                share = (right & cells).bit_count() / (asked & cells).bit_count()
                yield item, float(share == 1) if stratum.startswith("BoN") else share

    def strata_of(self, statistic: Statistic) -> list[Stratum]:
        """The strata of a score, for `stats.score` and `stats.bootstrap_interval`."""
        return self._strata(statistic, lambda stratum: (value for _, value in self.values(stratum, statistic.cells)))

    def differences(self, other: Items, statistic: Statistic) -> list[Stratum]:
        """The strata of the difference of a score, item by item, self - other; both must hold the same items."""

        def paired(stratum: str) -> Iterator[float]:
            theirs = dict(other.values(stratum, statistic.cells))
            return (value - theirs[item] for item, value in self.values(stratum, statistic.cells))

        return self._strata(statistic, paired)

    def _strata(self, statistic: Statistic, values: Callable[[str], Iterator[float]]) -> list[Stratum]:
        return [Stratum(weight, Counter(values(name))) for name, weight in statistic.weights.items()]

    def matrix(self, domain: str) -> list[list[float | None]]:
        """RM-Bench: the share of a domain's items that are right, [chosen style][rejected style]; None: no item."""
        counts = [[(0, 0)] * STYLES for _ in range(STYLES)]
        for asked, right in self.strata.get(domain, {}).values():
            asked, right = (_slipped(asked), _slipped(right)) if self.slip else (asked, right)
            for i in range(STYLES):
                for j in range(STYLES):
                    bit = 1 << (i * STYLES + j)
                    n, hits = counts[i][j]
                    counts[i][j] = n + bool(asked & bit), hits + bool(right & bit)
        return [[hits / n if n else None for n, hits in row] for row in counts]


def statistics(benchmark: str | None, items: Items) -> list[Statistic]:
    """The scores of a benchmark over the strata that hold an item: the headline first, then its sections."""
    present = items.strata.keys()
    if benchmark == "rewardbench":
        return _rewardbench(present)
    known = {"rm-bench": DOMAINS, "rmb": RMB_SETS}.get(benchmark or "", tuple(present))
    names = [name for name in known if name in present]
    found = [Statistic("headline", dict.fromkeys(names, 1.0)), *(Statistic(name, {name: 1.0}) for name in names)]
    if benchmark == "rm-bench":
        found += [Statistic(name, dict.fromkeys(names, 1.0), cells) for name, cells in DIFFICULTIES.items()]
    return found


def _rewardbench(present: Set[str]) -> list[Statistic]:
    unknown = sorted(present - {subset for weights in SECTIONS.values() for subset in weights})
    if unknown:
        raise InputError(f"RewardBench has no subset {', '.join(unknown)}; the judgements are of other rows")
    sections = []
    for name, weights in SECTIONS.items():
        there = {subset: weight for subset, weight in weights.items() if subset in present}
        if there:
            total = sum(there.values())
            sections.append(Statistic(name, {subset: weight / total for subset, weight in there.items()}))
    headline = {subset: weight for section in sections for subset, weight in section.weights.items()}
    return [Statistic("headline", headline), *sections]


def _domain(name: str) -> str:
    """RM-Bench's safety-refuse and safety-response are one domain."""
    found = next((domain for domain in DOMAINS if str(name).startswith(domain)), None)
    if found is None:
        raise KeyError("domain")
    return found


def _cell(meta: Mapping[str, Any]) -> int:
    i, j = meta["chosen_style"], meta["rejected_style"]
    if not (0 <= i < STYLES and 0 <= j < STYLES):
        raise KeyError("chosen_style, rejected_style")
    return i * STYLES + j


def _slipped(bits: int) -> int:
    """An item's bits with cell (i, i + 1), which file 2 holds, replaced by cell (i, i + 2), which file 3 holds."""
    for i in range(STYLES):
        of_file_2, of_file_3 = (i * STYLES + (i + k) % STYLES for k in (1, 2))
        bits = bits & ~(1 << of_file_2) | (bits >> of_file_3 & 1) << of_file_2
    return bits
