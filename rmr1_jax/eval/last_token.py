"""A model's state at the last token of each of many rows, in batches of rows of like length.

A batch's shape depends on its rows' length alone, so what comes out for a row does not depend on what it was computed
with, and few shapes are compiled.

Next: `scalar.py`, which reads scores off the states; `forced.py`, which reads verdicts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmr1_jax.model import qwen
from rmr1_jax.model.config import QwenConfig

SHORTEST = 64  # tokens of the shortest batch


class Batch(NamedTuple):
    """Rows on the left, padding on the right and below. numbers: of the rows, at most B; tokens: [B, T] int32; counts:
    [B] int32, how many of a row's tokens are real."""

    numbers: list[int]
    tokens: np.ndarray
    counts: np.ndarray


def padded_length(length: int, longest: int) -> int:
    """The batch's length for a row: 2^k or 1.5 x 2^k, so that a third at most is padding; at most `longest`."""
    power = SHORTEST << max(0, math.ceil(math.log2(length / SHORTEST)))
    shorter = power * 3 // 4
    return min(shorter if power > SHORTEST and length <= shorter else power, longest)


def batches(rows: Sequence[Sequence[int]], *, longest: int, batch_tokens: int, divisor: int = 1) -> Iterator[Batch]:
    """All rows, the longest first, so that memory runs out at once or never.

    Args:
        rows: token ids, each 1 to `longest` long. batch_tokens: B x T of a batch, roughly. divisor: of B.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_length[padded_length(len(row), longest)].append(number)
    for length in sorted(by_length, reverse=True):
        size = max(1, batch_tokens // length // divisor) * divisor
        for first in range(0, len(by_length[length]), size):
            numbers = by_length[length][first : first + size]
            tokens, counts = np.zeros((size, length), np.int32), np.ones(size, np.int32)
            for place, number in enumerate(numbers):
                counts[place] = len(rows[number])
                tokens[place, : counts[place]] = rows[number]
            yield Batch(numbers, tokens, counts)


def last_states(config: QwenConfig, params: qwen.Params, tokens: jax.Array, counts: jax.Array, *, dtype) -> jax.Array:
    """tokens [B, T] int32, of which the first counts [B] of each row are real -> [B, D] in `dtype`. To be jitted."""
    segment_ids = (jnp.arange(tokens.shape[1]) < counts[:, None]).astype(jnp.int32)  # [B, T]
    x = qwen.hidden_states(config, params, tokens, segment_ids=segment_ids, dtype=dtype)  # [B, T, D]
    return jnp.take_along_axis(x, counts[:, None, None] - 1, axis=1)[:, 0]
