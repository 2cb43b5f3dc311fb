"""Decides which answer of a pair is shown as A, where a row only says which one is chosen and which is rejected.

The order decides up to 8 points on RMB, so it is part of the data. Training sets draw it from the seed and the row's id
alone. Benchmarks draw it once for every judgement, in the order of the data set; the published evaluations drew from
NumPy's legacy generator with seed 0.

Next: `pairs/training_sets.py` and `pairs/benchmarks.py`, whose rows are ordered by this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rmr1_jax.errors import InputError


class LegacyFlags:
    """flags[k] is `rand() > 0.5` at draw k of NumPy's legacy generator, as in the published evaluations."""

    def __init__(self, seed: int = 0):
        if not 0 <= seed < 2**32:
            raise InputError(f"seed={seed}: NumPy's legacy generator takes 0 to {2**32 - 1}")
        self._random = np.random.RandomState(seed)
        self._flags: list[bool] = []

    def __getitem__(self, draw: int) -> bool:
        while draw >= len(self._flags):
            self._flags += (self._random.rand(4096) > 0.5).tolist()
        return self._flags[draw]


OrderFlags = LegacyFlags | Sequence[bool]


class Order:
    """Says for each pair of one source whether the chosen answer is shown as B.

    Args:
        seed: of the draws. items: the number of rows of the source, on which only RM-Bench's order depends.
        flags: the benchmarks' order, flags[k] for judgement k; by default `LegacyFlags(seed)`.
    """

    def __init__(self, seed: int = 0, flags: OrderFlags | None = None, items: int = 0):
        self.seed, self.items = seed, items
        self._flags = LegacyFlags(seed) if flags is None else flags
        self._reserved = 0

    def by_id(self, id: str) -> bool:
        """The draw of a row of a training set, by seed and id."""
        return bool(hashlib.sha256(f"{self.seed}/{id}".encode()).digest()[0] & 1)

    def by_number(self, draw: int) -> bool:
        """The draw of a benchmark's judgement, by its number. Raises InputError where the flags given end before it."""
        try:
            return bool(self._flags[draw])
        except IndexError as error:
            raise InputError(f"the A/B order flags end before draw {draw}; give one for every judgement") from error

    def reserve(self, count: int) -> int:
        """Reserve that many draws for a row, and return the number of the first."""
        first = self._reserved
        self._reserved += count
        return first
