"""Packing and batches: examples become rows of one length, and rows become batches, in an order fixed by the seed.

The order of a whole run is planned before it starts, from lengths alone: each epoch is shuffled and packed first-fit,
and the plan is a list of rows. Therefore the data cursor of a run is one number, the next batch; no example is
truncated or lost; and a resumed run, or one on another number of hosts, gets the same rows. Every process has the plan,
and reads and assembles only its own rows. GRPO packs its rollouts by `groups.py` or `pack`, and assembles them here.

Next: `store.py`, the examples of a prepared set, whose lengths are known without reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from rmr1_jax.errors import InputError

WINDOW = 256  # examples that are sorted by length before they are packed


def lengths_of(examples: Sequence) -> np.ndarray:
    """Return the number of tokens of each example, [N] int32. Reads no example if `examples` has `lengths`."""
    known = getattr(examples, "lengths", None)
    return np.fromiter((len(x.tokens) for x in examples), np.int32, len(examples)) if known is None else known


def mean_length(examples: Sequence) -> float:
    """Return the mean number of tokens of the examples, at least 1."""
    return max(1.0, float(lengths_of(examples).sum()) / max(1, len(examples)))


def trained_lengths_of(examples: Sequence) -> np.ndarray:
    """Return the number of trained tokens of each example, [N] int32. Reads no example if `examples` has
    `trained_lengths`. A first token does not count: no token precedes it, so it cannot be predicted."""
    known = getattr(examples, "trained_lengths", None)
    return np.fromiter((x.trained[1:].sum() for x in examples), np.int32, len(examples)) if known is None else known


class View(Sequence):
    """A lazy selection of a sequence of examples: item i is `make(examples[chosen[i]])`. chosen: [M] integers."""

    def __init__(self, examples: Sequence, chosen: np.ndarray, make: Callable[[Any], Any] = lambda example: example):
        self._examples, self._chosen, self._make = examples, chosen, make

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        return self._make(self._examples[int(self._chosen[index])])

    @property
    def lengths(self) -> np.ndarray:
        return lengths_of(self._examples)[self._chosen]

    @property
    def trained_lengths(self) -> np.ndarray:
        return trained_lengths_of(self._examples)[self._chosen]


def pack(
    lengths: Sequence[int], row_length: int, order: Sequence[int] | None = None, *, max_items: int | None = None
) -> list[list[int]]:
    """Pack items first-fit: in `order` (None: all, from the first), each goes to the first row with room for it.

    All rows stay open, so that short items fill the room that long ones left. A row with `max_items` items is closed.
    Returns the numbers of the items in each row.
    """
    order = range(len(lengths)) if order is None else order
    rows: list[list[int]] = []
    room = np.full(len(order), row_length, np.int64)  # in each row; there are at most as many rows as items
    for item in order:
        fits = np.flatnonzero(room[: len(rows)] >= lengths[item])
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(int(item))
        room[row] -= lengths[item]
        if len(rows[row]) == max_items:
            room[row] = -1
    return rows


def plan_rows(
    lengths: Sequence[int], row_length: int, *, epochs: int, seed: int, max_items: int | None = None
) -> list[list[int]]:
    """Plan the rows of a whole run: in each epoch every example that fits into a row occurs exactly once.

    The shuffled examples are packed window by window, the longest of a window first, which fills the rows better.
    Returns the numbers of the examples in each row.
    """
    lengths = np.asarray(lengths)
    rows = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(np.flatnonzero(lengths <= row_length))
        windows = (shuffled[i : i + WINDOW] for i in range(0, len(shuffled), WINDOW))
        order = [i for window in windows for i in window[np.argsort(-lengths[window], kind="stable")]]
        packed = pack(lengths, row_length, order, max_items=max_items)
        # First-fit leaves the emptiest rows last: shuffled again, all batches are filled alike.
        rows += [packed[i] for i in rng.permutation(len(packed))]
    return rows


def assemble(
    rows: Sequence[Sequence[Any]], row_length: int, values: Sequence[str] = (), *, shared: bool = False
) -> dict[str, np.ndarray]:
    """Assemble packed rows into arrays.

    Args:
        rows: the items of each of B rows, with `tokens` [T] int32. values: names of attributes of the items, each an
            array of one number a token, to pack alongside. shared: items see the `parent` before them, the number of
            an item in the row from 1, or 0; their first token has the position `first`.

    Returns:
        tokens, positions, segment_ids: [B, row_length] int32, segments from 1, padding 0; `values`, float32; and of
        shared rows `parents`, [B, row_length] int32, the segment that a token sees beside its own, or 0.
    """
    B, names = len(rows), ("tokens", "positions", "segment_ids", "parents")
    batch = {name: np.zeros((B, row_length), np.int32) for name in names[: None if shared else -1]}
    batch |= {name: np.zeros((B, row_length), np.float32) for name in values}
    for b, row in enumerate(rows):
        end = 0
        for segment, item in enumerate(row, start=1):
            start, end = end, end + len(item.tokens)
            batch["positions"][b, start:end] = np.arange(end - start)
            batch["segment_ids"][b, start:end] = segment
            if shared:
                batch["positions"][b, start:end] += item.first
                batch["parents"][b, start:end] = item.parent
            for name in ("tokens", *values):
                batch[name][b, start:end] = getattr(item, name)
    return batch


class Batch(NamedTuple):
    """A batch of packed rows, as one process has it.

    rows: the B rows of this process: tokens, positions, segment_ids [B, T] int32, and trained [B, T] float32, 1 at the
    tokens that the loss trains. items, lengths: the numbers and the tokens of all examples in the whole batch.
    trained_tokens: the trained tokens in the whole batch. most_trained: the most in any row of the whole run.
    """

    rows: dict[str, np.ndarray]
    items: list[int]
    lengths: list[int]
    trained_tokens: int
    most_trained: int


def sft_batches(
    examples: Sequence,
    *,
    row_length: int,
    batch_rows: int,
    epochs: int,
    seed: int,
    start: int = 0,
    own: Sequence[int] | None = None,
    max_items: int | None = None,
) -> tuple[Iterator[Batch], int]:
    """Return the batches of packed rows from batch number `start` on, and the number of batches of the whole run.

    Args:
        examples: of `Example` (see `lengths_of`). own: the rows of a batch that this process assembles; None: all.
        max_items: the most examples in a row.

    Raises:
        InputError: there are no examples, or one fits in no row (a truncated trace would train a wrong end).
    """
    if not len(examples):
        raise InputError("there is nothing to train on: the data set has no rows")
    lengths = lengths_of(examples)
    if too_long := int((lengths > row_length).sum()):
        worst = int(lengths.argmax())
        raise InputError(
            f"{too_long} examples are longer than row_length={row_length} tokens (the longest, "
            f"{examples[worst].id}, has {lengths[worst]}); raise row_length, or set on_too_long: drop"
        )
    trained_lengths = trained_lengths_of(examples)
    plan = plan_rows(lengths, row_length, epochs=epochs, seed=seed, max_items=max_items)
    total = -(-len(plan) // batch_rows)
    most_trained = max((int(trained_lengths[row].sum()) for row in plan), default=0)

    def make_batch(k: int) -> Batch:
        rows = plan[k * batch_rows : (k + 1) * batch_rows]
        items = [i for row in rows for i in row]
        rows += [[]] * (batch_rows - len(rows))  # empty rows fill up the last batch
        own_rows = [[examples[i] for i in rows[r]] for r in (range(batch_rows) if own is None else own)]
        batch = assemble(own_rows, row_length, ["trained"])
        batch["trained"] *= batch["positions"] > 0  # see `trained_lengths_of`
        return Batch(batch, items, lengths[items].tolist(), int(trained_lengths[items].sum()), most_trained)

    dataset = grain.MapDataset.range(total)[start:].map(make_batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))), total
