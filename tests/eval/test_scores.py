"""Tests of the statistics against SciPy or numbers worked out by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rmr1_jax.eval.scores import Stratum, bootstrap_interval, cohen_kappa, mcnemar, score, wilson_interval


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (1, 2), (632, 1000), (2985, 2985)])
def test_wilson_equals_scipy_s(right, n):
    wanted = scipy_stats.binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_by_hand():
    """8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z = 1.96, that is 0.4902 to 0.9433."""
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert all(math.isnan(x) for x in wilson_interval(0, 0))


def test_a_score_is_the_weighted_mean_of_means():
    strata = [Stratum(3.0, {1.0: 1, 0.0: 3}), Stratum(1.0, {1.0: 2}), Stratum(0.0, {0.0: 5}), Stratum(9.0, {})]
    assert score(strata) == pytest.approx((3 * 0.25 + 1) / 4)
    assert math.isnan(score([Stratum(1.0, {})]))


def test_the_bootstrap_equals_scipy_s():
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 10, size) / 9 for size in (23, 150, 61)]
    weights = np.array([0.5, 0.3, 0.2])
    strata = [Stratum(weight, Counter(x.tolist())) for weight, x in zip(weights, samples, strict=True)]

    def mean(*samples, axis):
        return sum(weight * x.mean(axis) for weight, x in zip(weights, samples, strict=True))

    for level in (0.95, 0.5):
        wanted = scipy_stats.bootstrap(
            samples,
            mean,
            n_resamples=50_000,
            batch=5_000,
            confidence_level=level,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(1),
        ).confidence_interval
        found = bootstrap_interval(strata, level=level, resamples=50_000)
        width = wanted.high - wanted.low
        assert found == pytest.approx((wanted.low, wanted.high), abs=0.03 * width)


def test_the_bootstrap_of_one_stratum_is_binomial():
    """630 of 1000 resampled: the counts are binomial, whose quantiles SciPy knows."""
    low, high = bootstrap_interval([Stratum(1.0, {1.0: 630, 0.0: 370})], resamples=100_000)
    exact = scipy_stats.binom(1000, 0.63)
    assert (low, high) == pytest.approx((exact.ppf(0.025) / 1000, exact.ppf(0.975) / 1000), abs=0.0011)


def test_the_bootstrap_is_deterministic():
    strata = [Stratum(1.0, {1.0: 30, 0.0: 20})]
    assert bootstrap_interval(strata, seed=3) == bootstrap_interval(strata, seed=3)
    assert bootstrap_interval([Stratum(1.0, {1.0: 5})]) == (1.0, 1.0)
    assert all(math.isnan(x) for x in bootstrap_interval([]))


def test_mcnemar_by_hand():
    """Two judges differ on 10 pairs, of which A is right on one: p = 2 (1 + 10) / 1024."""
    assert mcnemar(1, 9) == pytest.approx(22 / 1024, abs=1e-12)
    assert mcnemar(9, 1) == pytest.approx(22 / 1024, abs=1e-12)
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1.0


def test_kappa_by_hand():
    """20 and 15 of 50 cases agree: observed 0.7; by chance 25/50 x 30/50 + 25/50 x 20/50 = 0.5; kappa 0.4."""
    assert cohen_kappa([[20, 5], [10, 15]]) == pytest.approx(0.4, abs=1e-12)
    assert cohen_kappa([[5, 0, 0], [0, 5, 0], [0, 0, 5]]) == pytest.approx(1)
    assert cohen_kappa([[5, 5], [5, 5]]) == pytest.approx(0)
    assert math.isnan(cohen_kappa([[5, 0], [0, 0]])) and math.isnan(cohen_kappa([[0, 0], [0, 0]]))
