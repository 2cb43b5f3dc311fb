"""The geometry of the report's curves: values by step -> panels of SVG paths, ticks, and the numbers behind them.

Pure functions on plain values, without a word of HTML. A panel is one metric of one stage; every run is a line in it,
drawn twice: the raw values faintly, and a centred mean over neighbouring steps, which shows the trend without lag.

Read next: `report.html.j2`, which draws the panels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

WIDTH, HEIGHT = 340, 170  # of a panel, in its own units; it scales with the page


LEFT, RIGHT, TOP, BOTTOM = 46, 330, 8, 148  # of the plot in the panel


POINTS = 400  # drawn per line; more would weigh the page down and not be seen


PERCENT = frozenset({"accuracy", "clip_fraction", "mixed_groups", "packed", "truncated", "valid", "verdict_a"})


EXACT = frozenset({"lr"})  # scheduled, not measured: a mean would blunt its corners


ORDER = ("loss", "reward", "accuracy", "valid", "response_length", "kl", "entropy", "clip_fraction", "verdict_a")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run in a panel: which run (its place in the legend), the SVG paths, and the points for the tooltip."""

    run: int
    raw_path: str
    mean_path: str
    steps: tuple[int, ...]
    raw: tuple[float, ...]
    mean: tuple[float, ...]
    last: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric over the steps. Ticks are (place in the panel's units, label); ranges are in the data's units."""

    metric: str
    percent: bool
    lines: tuple[Line, ...]
    steps: tuple[float, float]
    values: tuple[float, float]
    step_ticks: tuple[tuple[float, str], ...]
    value_ticks: tuple[tuple[float, str], ...]
    summary: str

    def data(self) -> dict[str, Any]:
        """What the tooltip needs, fit for JSON."""
        lines = [{"run": x.run, "steps": x.steps, "raw": x.raw, "mean": x.mean} for x in self.lines]
        return {"percent": self.percent, "steps": self.steps, "values": self.values, "lines": lines}


def order_of(metric: str) -> tuple[int, str]:
    """Sorts what is trained for before how the machine did."""
    return (ORDER.index(metric) if metric in ORDER else len(ORDER), metric)


def make_panel(metric: str, lines: Mapping[int, Mapping[int, float]]) -> Panel:
    """The panel of one metric from finite values by ascending step, by run number. No line may be empty."""
    percent = metric in PERCENT
    steps = _span([step for line in lines.values() for step in line])
    values = _padded(_span([value for line in lines.values() for value in line.values()]))
    drawn = tuple(_line(run, line, metric, steps, values) for run, line in lines.items())
    first = next(iter(lines.values()))
    (begin, start), (end, stop) = min(first.items()), max(first.items())
    return Panel(
        metric=metric,
        percent=percent,
        lines=drawn,
        steps=steps,
        values=values,
        step_ticks=tuple((round(_x(t, steps), 1), short(t)) for t in _ticks(*steps, whole=True)),
        value_ticks=tuple((round(_y(t, values), 1), short(t, percent=percent)) for t in _ticks(*values)),
        summary=f"from {short(start, percent=percent)} at step {begin} to {short(stop, percent=percent)} at step {end}",
    )


def make_chart(lines: Sequence[Sequence[tuple[float, float]]], *, log: bool = False) -> dict[str, Any]:
    """Lines through a few points (x, percentage), by run; `log`: equal steps of x are doublings. A tick at every x."""

    def across(x: float) -> float:
        return math.log2(max(x, 1e-9)) if log else x

    places = sorted({x for line in lines for x, _ in line})
    xs = _span([across(x) for x in places])
    ys = _padded(_span([y for line in lines for _, y in line]))
    drawn = []
    for run, line in enumerate(lines):
        points = [(round(_x(across(x), xs), 1), round(_y(y, ys), 1)) for x, y in sorted(line)]
        path = "M" + "L".join(f"{x},{y}" for x, y in points) if points else ""
        drawn.append({"run": run, "path": path, "points": points})
    return {
        "lines": drawn,
        "x_ticks": [(round(_x(across(x), xs), 1), f"{x:,.0f}") for x in places],
        "y_ticks": [(round(_y(t, ys), 1), f"{t:.4g}%") for t in _ticks(*ys)],
    }


def smooth(values: Sequence[float]) -> np.ndarray:
    """The mean over a window of about a twelfth of the values, centred. [n] -> [n]

    The window narrows towards the start, where training is steep, and is cut off at the end, where the last mean is
    what a reader takes home.
    """
    n = len(values)
    i = np.arange(n)
    first, last = i - np.minimum(n // 24, i), np.minimum(i + np.minimum(n // 24, i), n - 1)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def short(value: float, *, percent: bool = False) -> str:
    """A number in few characters: 0.0123, 12.5k, 3e-6; a share as a percentage."""
    if percent:
        return f"{100 * value:.3g}%"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e9):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, suffix in ((1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if suffix == 'k' else unit):.4g}{suffix}"
    return f"{value:.4g}"


def _line(run: int, line: Mapping[int, float], metric: str, steps: tuple, values: tuple) -> Line:
    raw = np.fromiter(line.values(), dtype=np.float64)
    mean = raw if metric in EXACT else smooth(raw)
    kept = _thinned(raw)
    at = [list(line)[i] for i in kept] if len(kept) < len(line) else list(line)
    raw, mean = raw[kept], mean[kept]

    def path(points: np.ndarray) -> str:
        places = [f"{_x(s, steps):.1f},{_y(v, values):.1f}" for s, v in zip(at, points, strict=True)]
        # A line of one point is drawn as a dot, by its round end.
        return "M" + "L".join(places if len(places) > 1 else places * 2)

    return Line(
        run=run,
        raw_path=path(raw),
        mean_path=path(mean),
        steps=tuple(at),
        raw=tuple(float(f"{v:.5g}") for v in raw),
        mean=tuple(float(f"{v:.5g}") for v in mean),
        last=short(float(mean[-1]), percent=metric in PERCENT),
    )


def _thinned(values: np.ndarray) -> np.ndarray:
    """Indices of at most POINTS values: the least and the greatest of each stretch, so that no spike is lost."""
    if len(values) <= POINTS:
        return np.arange(len(values))
    bounds = np.linspace(0, len(values), POINTS // 2, dtype=int)
    extremes = {int(a + pick(values[a:b])) for a, b in pairwise(bounds) for pick in (np.argmin, np.argmax)}
    return np.array(sorted(extremes | {0, len(values) - 1}))


def _span(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = min(numbers), max(numbers)
    return (low, high) if low < high else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _padded(span: tuple[float, float]) -> tuple[float, float]:
    """A little air above and below; down to zero where the values come near it from above."""
    low, high = span
    pad = 0.06 * (high - low)
    return (0.0 if 0 <= low < 0.4 * high else low - pad, high + pad)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Two to six round numbers between low and high."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10 * power)
    step = max(1.0, float(round(step))) if whole else step
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _x(step: float, span: tuple[float, float]) -> float:
    return LEFT + (RIGHT - LEFT) * (step - span[0]) / (span[1] - span[0])


def _y(value: float, span: tuple[float, float]) -> float:
    return BOTTOM - (BOTTOM - TOP) * (value - span[0]) / (span[1] - span[0])
