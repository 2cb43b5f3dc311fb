"""Packing of groups: a row holds a group's prompt once, and behind it the responses that share it.

A group is a prompt with several responses. In a row it is laid out as segments: the prompt without its last token, then
for each response a copy of the prompt's last token and the response. So the token before each token of a response is in
the same segment, as if the response stood behind a prompt of its own. `parents` says which segment a response sees
beside its own: its prompt's. Next: `train/micro_batches.py`, which fills the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A group is split over rows, which repeats its prompt, where the responses that fill the rest of a row have so many
# times the tokens of the prompt. Measured with lognormal lengths: smaller values repeat more than they fill.
WORTH_REPEATING = 2


class Piece(NamedTuple):
    """The part of a group in one row. prompt: the number of the group. responses: the numbers of its responses."""

    prompt: int
    responses: list[int]


def pack_groups(
    prompts: Sequence[int],
    groups: Sequence[Sequence[int]],
    lengths: Sequence[int],
    row_length: int | np.ndarray,
    *,
    max_items: int | None = None,
    max_separate: float | None = None,
) -> list[list[Piece]]:
    """Pack groups into rows of `row_length`, each prompt once a row; a group is split where that saves rows or it is
    longer than a row.

    Args:
        prompts: the tokens of each prompt, at least 1. groups: the numbers of each prompt's responses, possibly none.
        lengths: the tokens of each response. row_length: of all rows, or of each one, the longest first. A prompt and
            any one of its responses fit into a row, and what does not fit into the shorter rows into the longer ones.
        max_items: the most responses in a row. max_separate: the most tokens in a row if each response had a prompt of
            its own, as a multiple of the row's length, at least 1.

    Returns:
        The pieces of each row.
    """
    sizes = np.full(len(lengths), row_length) if np.ndim(row_length) == 0 else np.asarray(row_length)
    separate = np.floor(sizes * (max_separate or len(lengths)))
    limits = np.stack([sizes, np.full(len(sizes), max_items or len(lengths)), separate], axis=1).astype(np.int64)
    plans = [_pack(prompts, groups, lengths, limits, worth) for worth in (np.inf, WORTH_REPEATING)]
    fitting = [plan for plan in plans if plan is not None]
    assert fitting, "a prompt with one of its responses is longer than a row"
    return min(fitting, key=len)


def _pack(
    prompts: Sequence[int],
    groups: Sequence[Sequence[int]],
    lengths: Sequence[int],
    limits: np.ndarray,
    worth: float,
) -> list[list[Piece]] | None:
    """`pack_groups` with a group split where the responses that go first have `worth` times the prompt's tokens: groups
    and responses from the longest on, each to the first row with room for all that is left of the group. limits: the
    tokens, responses and separate tokens that fit into each row, [rows, 3]. None: a response does not fit."""
    rows: list[list[Piece]] = []
    room = limits.copy()

    def needs(group: int, responses: Sequence[int]) -> np.ndarray:
        own = sum(1 + lengths[i] for i in responses)
        shared = prompts[group] - 1
        return np.array([shared + own, len(responses), shared * len(responses) + own])

    def that_fit(group: int, responses: Sequence[int], limit: np.ndarray) -> list[int]:
        fit: list[int] = []
        for i in responses:
            if (needs(group, [*fit, i]) <= limit).all():
                fit.append(i)
        return fit

    for group in sorted(range(len(groups)), key=lambda g: -needs(g, groups[g])[0]):
        left = sorted(groups[group], key=lambda i: -lengths[i])
        while left:
            used = room[: len(rows)]
            fits = np.flatnonzero((used >= needs(group, left)).all(axis=1))
            row, part = (int(fits[0]), left) if len(fits) else (len(rows), [])
            if not part and len(rows):
                emptiest = int(used[:, 0].argmax())
                some = that_fit(group, left, used[emptiest])
                if some and needs(group, some)[0] > (1 + worth) * prompts[group]:
                    row, part = emptiest, some
            if row == len(rows):
                rows.append([])
                part = that_fit(group, left, room[row])
            if not part:
                return None
            rows[row].append(Piece(group, sorted(part)))
            room[row] -= needs(group, part)
            left = [i for i in left if i not in part]
    return rows
