"""The geometry of the curves."""

import re

import numpy as np
import pytest

from rmr1_jax.report.curves import POINTS, make_chart, make_panel, short, smooth


def test_smoothing_keeps_constants_and_ramps_and_takes_out_noise():
    np.testing.assert_allclose(smooth([2.5] * 100), 2.5, rtol=1e-12)
    np.testing.assert_allclose(smooth(np.arange(100.0))[:96], np.arange(96.0), atol=1e-9)  # centred: no lag
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise)[200:].std() < 0.2
    np.testing.assert_array_equal(smooth([3.0, 1.0, 2.0]), [3.0, 1.0, 2.0])  # too few to average


def test_a_long_curve_is_thinned_and_keeps_its_spikes():
    values = dict(enumerate(np.sin(np.arange(50_000) / 3000).tolist()))
    values[31_234] = 40.0
    line = make_panel("loss", {0: values})["data"]["lines"][0]
    assert len(line["steps"]) <= POINTS + 2 and line["steps"][0] == 0 and line["steps"][-1] == 49_999
    assert 31_234 in line["steps"] and max(line["raw"]) == 40.0
    assert list(line["steps"]) == sorted(set(line["steps"]))


@pytest.mark.parametrize(
    "values", [{5: 1.0}, {0: 0.0, 1: 0.0}, {0: -3.0, 9: -3.0}, {0: 1e-12, 1: 1e300}, {3: -1e-9, 4: 2.0}]
)
def test_any_finite_curve_has_ticks_and_stays_in_its_panel(values):
    panel = make_panel("loss", {0: values})
    assert len(panel["value_ticks"]) >= 2 and len(panel["step_ticks"]) >= 1
    places = [float(x) for x in re.findall(r"-?[\d.]+", panel["lines"][0]["raw_path"])]
    assert (
        all(np.isfinite(places))
        and all(0 <= x <= 340 for x in places[::2])
        and all(0 <= y <= 170 for y in places[1::2])
    )


def test_numbers_are_short():
    assert [short(v) for v in (0, 0.5, 12.3456, 15000, 2.5e6, 3e-6, -1.25e-5, 2e12)] == (
        ["0", "0.5", "12.35", "15k", "2.5M", "3e-6", "-1.25e-5", "2e12"]
    )
    assert short(0.865, percent=True) == "86.5%"


def test_a_chart_puts_doublings_at_equal_steps():
    chart = make_chart([[(512, 10.0), (1024, 20.0), (4096, 40.0)], []], log=True)
    first, second, last = (x for x, _ in chart["lines"][0]["points"])
    assert last - second == pytest.approx(2 * (second - first), abs=0.2)
    assert [label for _, label in chart["x_ticks"]] == ["512", "1,024", "4,096"] and chart["lines"][1]["path"] == ""
