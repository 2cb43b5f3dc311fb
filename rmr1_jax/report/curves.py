"""Computes the geometry of the report's curves: values by step -> SVG paths, ticks, and the values for the tooltip.

These are pure functions on plain values and contain no HTML. A panel shows one metric of one training stage with a
line for every run. A line is drawn twice: the raw values faintly, and a centred moving mean, which shows the trend
without lag.

Read next: `templates/training.html.j2`, which draws the panels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

# The size of a panel in SVG units, and the edges of the plot in it. A panel scales with the page.
WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 330, 8, 148
PLOT = MappingProxyType({"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM})
POINTS = 400  # points drawn per line; more would enlarge the page without being visible
PERCENT = frozenset({"accuracy", "clip_fraction", "mixed_groups", "packed", "truncated", "valid", "verdict_a"})
EXACT = frozenset({"lr"})  # metrics that are scheduled, not measured, and need no moving mean
FEW = 12  # a line of at most so many points also has a dot for each
# The groups of a stage's metrics, in the order in which they and their metrics are shown; others are of the last group.
GROUPS = MappingProxyType(
    {
        "learning": ("reward", "accuracy", "eval_accuracy", "loss", "eval_loss", "valid", "eval_valid"),
        "health": (
            *("response_length", "truncated", "mixed_groups", "entropy", "kl", "grad_norm", "lr", "verdict_a"),
            *("clip_fraction", "ratio_mean", "ratio_max", "importance_mean", "importance_max", "importance_capped"),
            "skipped",
        ),
        "speed": ("tokens_per_second", "mfu", "seconds"),
    }
)
MEASURED = ("eval_", "reward_")  # prefixes of further metrics that show learning
EQUAL = 1e-4  # a metric whose values differ by less than this share of them is called constant
NOISE = 1e-6  # a loss below this is zero up to rounding, as GRPO's is in its first update


def group_of(metric: str) -> str:
    """Returns the name of the group that a metric is shown in."""
    found = next((name for name, members in GROUPS.items() if metric in members), "speed")
    return "learning" if metric.startswith(MEASURED) and not metric.endswith("seconds") else found


def order_of(metric: str) -> tuple[int, int, str]:
    """Returns the sort key of a metric: by group, and within it the known ones in their order before the others."""
    group = group_of(metric)
    known = GROUPS[group]
    return list(GROUPS).index(group), known.index(metric) if metric in known else len(known), metric


def make_groups(metrics: Mapping[str, Mapping[int, Mapping[int, float]]]) -> list[dict[str, Any]]:
    """Returns the groups of a stage's metrics that are not empty, each as {"name", "panels", "constants"}.

    A metric that is constant over all runs is not drawn: "constants" holds its (name, value as text). One with the same
    values as another is not drawn either, but named in the "also" of that panel.

    Args:
        metrics: by name, the lines of each metric; see `make_panel`.
    """
    groups: dict[str, dict[str, Any]] = {name: {"name": name, "panels": [], "constants": []} for name in GROUPS}
    drawn: list[dict[str, Any]] = []
    for metric in sorted(metrics, key=order_of):
        group, lines = groups[group_of(metric)], metrics[metric]
        if words := constant(metric, lines):
            group["constants"].append((metric, words))
        elif twin := next((panel for panel in drawn if metrics[panel["metric"]] == lines), None):
            twin["also"].append(metric)
        else:
            drawn.append(make_panel(metric, lines))
            group["panels"].append(drawn[-1])
    return [group for group in groups.values() if group["panels"] or group["constants"]]


def constant(metric: str, lines: Mapping[int, Mapping[int, float]]) -> str:
    """Returns the value of a metric that is constant over all its lines as text, or "" if it is not."""
    values = [value for line in lines.values() for value in line.values()]
    size = max(map(abs, values))
    if metric == "loss" and size < NOISE:
        return "0"
    same = max(values) - min(values) <= EQUAL * size
    return short(float(f"{values[-1]:.4g}"), percent=is_percent(metric)) if same else ""


def is_percent(metric: str) -> bool:
    """Returns whether a metric is a share from 0 to 1, which is shown as a percentage."""
    return metric.removeprefix("eval_") in PERCENT


def make_panel(metric: str, lines: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    """Returns the panel of one metric.

    Args:
        lines: by the run's index in the legend, finite values by ascending step; no line may be empty.

    Returns:
        "metric"; "also", an empty list; "lines", each with SVG paths "raw_path" and "mean_path", the "dots" of a line
        of few points, and its "last" mean; "step_ticks" and "value_ticks", (position in SVG units, label); "summary",
        a text; and "data", the JSON values for the tooltip, with the ranges of the axes in "steps" and "values".
    """
    percent = is_percent(metric)
    steps = _span([step for line in lines.values() for step in line])
    values = _padded(_span([value for line in lines.values() for value in line.values()]))
    first = next(iter(lines.values()))
    ends = [
        f"{short(value, percent=percent)} at step {step}" for step, value in (min(first.items()), max(first.items()))
    ]
    drawn, data = zip(*(_line(run, line, metric, steps, values) for run, line in lines.items()), strict=True)
    return {
        "metric": metric,
        "also": [],
        "lines": drawn,
        "step_ticks": _labelled([(round(_x(t, steps), 1), t) for t in _ticks(*steps, whole=True)]),
        "value_ticks": _labelled([(round(_y(t, values), 1), t) for t in _ticks(*values)], percent=percent),
        "summary": f"from {ends[0]} to {ends[1]}",
        "data": {"percent": percent, "steps": steps, "values": values, "lines": data},
    }


def make_chart(lines: Sequence[Sequence[tuple[float, float]]], *, log: bool = False) -> dict[str, Any]:
    """Returns a chart of lines through a few points (x, percentage), with a tick at every x.

    With `log`, the x axis is logarithmic: doublings have equal distances.
    """

    def scaled(x: float) -> float:
        return math.log2(max(x, 1e-9)) if log else x

    numbers = sorted({x for line in lines for x, _ in line})
    xs = _span([scaled(x) for x in numbers])
    ys = _padded(_span([y for line in lines for _, y in line]))
    drawn = []
    for run, line in enumerate(lines):
        points = [(round(_x(scaled(x), xs), 1), round(_y(y, ys), 1)) for x, y in sorted(line)]
        path = "M" + "L".join(f"{x},{y}" for x, y in points) if points else ""
        drawn.append({"run": run, "path": path, "points": points})
    return {
        "lines": drawn,
        "x_ticks": [(round(_x(scaled(x), xs), 1), f"{x:,.0f}") for x in numbers],
        "y_ticks": [(round(_y(t, ys), 1), f"{t:.4g}%") for t in _ticks(*ys)],
    }


def smooth(values: Sequence[float]) -> np.ndarray:
    """Returns the centred moving mean over a window of about a twelfth of the values. [n] -> [n]

    The window narrows towards the start, where training is steep. At the end it is cut off, so that the last mean
    still averages over several steps.
    """
    n = len(values)
    i = np.arange(n)
    first, last = i - np.minimum(n // 24, i), np.minimum(i + np.minimum(n // 24, i), n - 1)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def short(value: float, *, percent: bool = False, digits: int = 4) -> str:
    """Formats a number in few characters, such as 0.0123, 12.5k or 3e-6; a share as a percentage."""
    if percent:
        return f"{100 * value:.{digits - 1}g}%"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e9):
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{float(mantissa):.{digits}g}e{int(exponent)}"
    if size >= 1e6:
        return f"{value / 1e6:.{digits}g}M"
    return f"{value / 1e3:.{digits}g}k" if size >= 1e4 else f"{value:.{digits}g}"


def _labelled(ticks: Sequence[tuple[float, float]], *, percent: bool = False) -> list[tuple[float, str]]:
    """Returns the ticks with their labels, in as many digits as it takes to tell them apart."""
    for digits in range(4, 17):
        labels = [short(value, percent=percent, digits=digits) for _, value in ticks]
        if len(set(labels)) == len(labels):
            break
    return [(place, label) for (place, _), label in zip(ticks, labels, strict=True)]


def _line(run: int, line: Mapping[int, float], metric: str, steps: tuple, values: tuple) -> tuple[dict, dict]:
    """Returns what is drawn of a line, and its points for the tooltip."""
    raw = np.fromiter(line.values(), dtype=np.float64)
    mean = raw if metric in EXACT or metric.startswith("eval_") else smooth(raw)
    kept = _thinned(raw)
    at, raw, mean = np.array(list(line))[kept].tolist(), raw[kept], mean[kept]

    def path(points: np.ndarray) -> str:
        places = [f"{_x(s, steps):.1f},{_y(v, values):.1f}" for s, v in zip(at, points, strict=True)]
        # A line of one point is drawn as a dot, by its round end.
        return "M" + "L".join(places if len(places) > 1 else places * 2)

    last = short(float(mean[-1]), percent=is_percent(metric))
    places = [(round(_x(s, steps), 1), round(_y(v, values), 1)) for s, v in zip(at, raw, strict=True)]
    data = {"run": run, "steps": at, "raw": [float(f"{v:.5g}") for v in raw], "mean": [float(f"{v:.5g}") for v in mean]}
    dots = places if len(places) <= FEW else []
    return {"run": run, "raw_path": path(raw), "mean_path": path(mean), "dots": dots, "last": last}, data


def _thinned(values: np.ndarray) -> np.ndarray:
    """Returns the indices of about POINTS values: the extremes of every stretch, so that no spike is lost."""
    if len(values) <= POINTS:
        return np.arange(len(values))
    bounds = np.linspace(0, len(values), POINTS // 2, dtype=int)
    extremes = {int(a + pick(values[a:b])) for a, b in pairwise(bounds) for pick in (np.argmin, np.argmax)}
    return np.array(sorted(extremes | {0, len(values) - 1}))


def _span(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = min(numbers), max(numbers)
    return (low, high) if low < high else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _padded(span: tuple[float, float]) -> tuple[float, float]:
    """Widens the range by a margin; it starts at zero if the values come near zero from above."""
    low, high = span
    pad = 0.06 * (high - low)
    return (0.0 if 0 <= low < 0.4 * high else low - pad, high + pad)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Returns two to six round numbers between low and high."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10 * power)
    step = max(1.0, float(round(step))) if whole else step
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _x(step: float, span: tuple[float, float]) -> float:
    return LEFT + (RIGHT - LEFT) * (step - span[0]) / (span[1] - span[0])


def _y(value: float, span: tuple[float, float]) -> float:
    return BOTTOM - (BOTTOM - TOP) * (value - span[0]) / (span[1] - span[0])
