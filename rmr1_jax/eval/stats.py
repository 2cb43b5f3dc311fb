"""The statistics of an evaluation, over plain counts: intervals, agreement, and tests between two judges.

A benchmark's score is a weighted mean of means over strata (RewardBench's subsets, RM-Bench's domains, RMB's sets). Its
interval resamples items within each stratum, so that no stratum grows or shrinks; the items of one stratum take few
distinct values, so a resample is one multinomial draw of counts and costs nothing.

Next: `items.py`, which brings judgements into strata; `summary.py` and `compare.py`, which report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

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
