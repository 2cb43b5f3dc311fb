"""Tests of the statistics against numbers worked out by hand."""

import math

import pytest

from rmr1_jax.eval.scores import Stratum, cohen_kappa, mcnemar, score


def test_a_score_is_the_weighted_mean_of_means():
    strata = [Stratum(3.0, {1.0: 1, 0.0: 3}), Stratum(1.0, {1.0: 2}), Stratum(0.0, {0.0: 5}), Stratum(9.0, {})]
    assert score(strata) == pytest.approx((3 * 0.25 + 1) / 4)
    assert math.isnan(score([Stratum(1.0, {})]))


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
