"""What is counted of a prepared set while its rows pass: lengths, sources, the balance of A and B.

Next: `data/prepare.py`, which counts; `report_data.py`, which shows it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmr1_jax.data.tokens import Example

BINS = 30  # of a histogram, about


@dataclass
class Tally:
    """What is counted while the rows pass: lengths (4 bytes each), and sums."""

    tokens: array = field(default_factory=lambda: array("i"))
    prompts: array = field(default_factory=lambda: array("i"))
    sources: Counter = field(default_factory=Counter)
    better: Counter = field(default_factory=Counter)
    drops: Counter = field(default_factory=Counter)

    def add(self, example: Example) -> None:
        self.tokens.append(len(example))
        self.prompts.append(len(example) - int(example.trained.sum()))
        self.sources[example.source] += 1
        self.better[example.better or "unknown"] += 1

    def summary(self) -> dict[str, Any]:
        tokens, prompts = np.asarray(self.tokens), np.asarray(self.prompts)
        kinds = {"tokens": tokens, "prompt": prompts, "trained": tokens - prompts}
        return {
            "sources": dict(self.sources.most_common()),
            "better": dict(sorted(self.better.items())),
            "lengths": {name: _histogram(values) for name, values in kinds.items() if values.any()},
        }


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts between round edges, and what one asks first: sum, mean, percentiles, the longest."""
    width = max(1, -(-int(values.max()) // BINS))
    step = 10 ** (len(str(width)) - 1)
    width = -(-width // step) * step  # one digit and zeros
    edges = np.arange(0, int(values.max()) + width + 1, width)
    counts, _ = np.histogram(values, edges)
    p50, p99 = np.percentile(values, [50, 99])
    facts = {"sum": int(values.sum()), "mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}
    return {"edges": edges.tolist(), "counts": counts.tolist(), **facts, "max": int(values.max())}
