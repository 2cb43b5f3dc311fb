"""Intervals of scores, of shares and of the difference of two judges, which hold for few items and for equal ones.

A bootstrap resamples the items at hand. A stratum of one item, or of items with equal values, then has no variance, and
the interval is too narrow or has no width. Here the interval comes from a posterior of a weighted mean of bounded
values:

1. The variance of the score is the sum over strata of weight^2 variance / n. The variance of a stratum is pooled with
   the variance over all items, which counts as much as `SHARED` items of the stratum. A single item has the pooled
   variance, as in the method of collapsed strata (Cochran, Sampling Techniques, 1977, section 5A.12). If the strata
   differ, the pooled variance is larger than theirs, and the interval of small strata is wider than needed.
2. The variance gives the effective number of items: how many independent items have a mean of this variance (Korn and
   Graubard, Survey Methodology 24, 1998).
3. The items have a Dirichlet posterior on their values, with a prior of some items at each end of the range. For right
   and wrong items this is Beta(right + a, wrong + a), where Jeffreys' interval has a = 1/2 (Brown, Cai and DasGupta,
   Statistical Science 16, 2001). For paired differences Bonett and Price (Journal of Educational and Behavioral
   Statistics 37, 2012) add 1. The quantiles are those of the Beta distribution on the range that has the mean and the
   variance of the posterior; for right and wrong items it is the posterior.
4. If all values are equal, at most 1 - 0.05^(1/n) of all items have another value (the one-sided exact interval, or
   "rule of three": 3/n), and these may lie at either end of the range.

tests/eval/test_intervals.py simulates the coverage. The two priors were chosen by it: with 1/2, a score of 46 items at
an accuracy of 0.9 is covered in 91.6% of all cases, and with 2/3, one of 5 items in 91.9%.

Next: `scores.py`, which makes the strata; `summary.py` and `compare.py`, which show the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rmr1_jax.eval.scores import Stratum

SHARED = 3.0  # how many items of a stratum the pooled variance is worth
SCORE_PRIOR, DIFFERENCE_PRIOR = 0.6, 0.75  # items at each end of the range
_EQUAL = 1e-12  # a variance below this is that of equal values


def score_interval(strata: Sequence[Stratum], *, difference: bool = False, level: float = 0.95) -> tuple[float, float]:
    """The interval of `score` by the method of this module. (NaN, NaN) if no stratum holds an item.

    Values lie in [0, 1]; with `difference`, they are differences of two such values of one item and lie in [-1, 1].
    """
    from scipy.special import betaincinv  # takes a while to import

    strata = [s for s in strata if s.weight and s.counts]
    if not strata:
        return math.nan, math.nan
    low, width, prior = (-1.0, 2.0, DIFFERENCE_PRIOR) if difference else (0.0, 1.0, SCORE_PRIOR)
    sizes, means, squares = np.array([_moments(s, low, width) for s in strata]).T
    weights = np.array([s.weight for s in strata]) / sum(s.weight for s in strata)
    mean, square = weights @ means, weights @ squares
    parts = weights**2 / sizes
    n = 1 / parts.sum()  # the effective number of items if all strata have one variance (Kish)
    if square - mean**2 < _EQUAL:
        share = (1 - level) ** (1 / n)
        ends = mean * share, 1 - (1 - mean) * share
    else:
        if n > 1:
            pooled = (square - mean**2) * n / (n - 1)
            own = sizes * (squares - means**2)
            n = pooled / (parts @ ((own + SHARED * pooled) / (sizes - 1 + SHARED)))
        total = n + 2 * prior
        centre = (n * mean + prior) / total
        variance = ((n * square + prior) / total - centre**2) / (total + 1)  # of the mean of a Dirichlet distribution
        size = centre * (1 - centre) / variance - 1  # Beta(centre size, (1 - centre) size) has this variance
        tails = (1 - level) / 2, (1 + level) / 2
        ends = betaincinv(centre * size, (1 - centre) * size, tails)
    return low + width * float(ends[0]), low + width * float(ends[1])


def share_interval(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of the share right / n, as of a score; (NaN, NaN) for n = 0."""
    return score_interval([Stratum(1.0, {value: k for value, k in ((1.0, right), (0.0, n - right)) if k})])


def _moments(stratum: Stratum, low: float, width: float) -> tuple[int, float, float]:
    """The number of values and the means of them and of their squares, after the range from `low` became [0, 1]."""
    n = sum(stratum.counts.values())
    values = [((value - low) / width, count) for value, count in stratum.counts.items()]
    return n, sum(v * k for v, k in values) / n, sum(v * v * k for v, k in values) / n
