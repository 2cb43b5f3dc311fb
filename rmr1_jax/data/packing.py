"""Packing and batches: examples -> rows of one length -> batches, in an order that is a pure function of the seed.

The order of a whole run is planned before it starts, from lengths alone: each epoch is shuffled and packed first-fit,
and the plan is a list of rows. So the cursor of a run is one number, the next batch; no example is cut or lost; and a
resumed run, or one on another number of hosts, sees the same rows. Every process has the plan, and reads and assembles
its own rows only. Grain reads ahead of the training step. GRPO packs its rollouts with the same two functions, `pack`
and `assemble`.

Next: `data/store.py`, the examples of a prepared set, whose lengths are known without reading them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from rmr1_jax.errors import InputError

WINDOW = 256  # examples that are packed longest first


class Packable(Protocol):
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """rows: for each row of the run, the numbers of the examples in it. too_long: examples that fit in no row."""

    rows: list[list[int]]
    too_long: list[int]


def lengths_of(examples: Sequence) -> np.ndarray:
    """[N] int32: the tokens of each example; from `examples.lengths` where it has them, which reads no example."""
    known = getattr(examples, "lengths", None)
    return np.fromiter((len(x.tokens) for x in examples), np.int32, len(examples)) if known is None else known


def trained_lengths_of(examples: Sequence) -> np.ndarray:
    """[N] int32: the trained tokens of each example, less its first token, which nothing stands before to predict it
    from; from `examples.trained_lengths` where it has them."""
    known = getattr(examples, "trained_lengths", None)
    return np.fromiter((x.trained[1:].sum() for x in examples), np.int32, len(examples)) if known is None else known


class View(Sequence):
    """Some of a sequence's examples, each as `make` makes it of them when it is asked for."""

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
    lengths: Sequence[int], row_length: int, order: Sequence[int] | None = None, *, most: int | None = None
) -> list[list[int]]:
    """First-fit: each item goes to the first row with room, in `order`. Returns the items of each row.

    `most`: items that a row holds at most. All rows stay open, so that short items fill what long ones left.
    """
    rows: list[list[int]] = []
    room = np.zeros(0, np.int64)
    for item in range(len(lengths)) if order is None else order:
        fits = np.flatnonzero(room[: len(rows)] >= lengths[item])
        if len(fits):
            row = int(fits[0])
        else:
            row = len(rows)
            rows.append([])
            if row >= len(room):
                room = np.concatenate([room, np.full(max(64, len(room)), row_length, np.int64)])
        rows[row].append(int(item))
        room[row] -= lengths[item]
        if len(rows[row]) == most:
            room[row] = -1  # closed
    return rows


def plan_rows(lengths: Sequence[int], row_length: int, *, epochs: int, seed: int) -> RowPlan:
    """The rows of a whole run, in order: each epoch has every example that fits exactly once, in its own order.

    The shuffled examples are packed window by window, the longest of a window first: at the published rows' lengths
    97.7% of the positions are filled, against 96.8% in the shuffled order itself.
    """
    lengths = np.asarray(lengths)
    fits = lengths <= row_length
    rows = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(np.flatnonzero(fits))
        windows = (shuffled[i : i + WINDOW] for i in range(0, len(shuffled), WINDOW))
        order = [i for window in windows for i in window[np.argsort(-lengths[window], kind="stable")]]
        packed = pack(lengths, row_length, order)
        # First-fit leaves the emptiest rows last; shuffled, no batch is worse filled than another.
        rows += [packed[i] for i in rng.permutation(len(packed))]
    return RowPlan(rows, np.flatnonzero(~fits).tolist())


def assemble(
    rows: Sequence[Sequence[int]], items: Sequence[Packable], row_length: int, **values: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Packed rows as arrays.

    Args:
        rows: the items of each of B rows. values: more per-token numbers, one array for each item, packed alongside.

    Returns:
        tokens, positions, segment_ids: [B, T] int32 (segments count from 1, 0 is padding), and each of `values` [B, T]
        float32.
    """
    B = len(rows)
    batch = {name: np.zeros((B, row_length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch |= {name: np.zeros((B, row_length), np.float32) for name in values}
    for b, row in enumerate(rows):
        at = 0
        for segment, item in enumerate(row, start=1):
            n = len(items[item].tokens)
            span = (b, slice(at, at + n))
            batch["tokens"][span] = items[item].tokens
            batch["positions"][span] = np.arange(n)
            batch["segment_ids"][span] = segment
            for name, v in values.items():
                batch[name][span] = v[item]
            at += n
    return batch


def renumber(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The items of some rows, in order; and these rows in numbers of theirs: what `assemble` takes for a part."""
    items = [item for row in rows for item in row]
    numbers = iter(range(len(items)))
    return items, [[next(numbers) for _ in row] for row in rows]


class Batch(NamedTuple):
    """A batch of packed rows, as one process has it.

    rows: tokens, positions, segment_ids [B, T] int32 and trained [B, T] float32 (1 where the loss looks), of this
    process's B rows. items, lengths, trained_tokens: of all examples in the whole batch, their numbers in the data and
    their tokens, and the sum of their trained ones.
    """

    rows: dict[str, np.ndarray]
    items: list[int]
    lengths: list[int]
    trained_tokens: int


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Grain's view of a run: batch k is rows k x B to k x B + B of the plan; empty rows fill up the last one."""

    plan: RowPlan
    examples: Sequence
    lengths: np.ndarray
    trained_lengths: np.ndarray
    row_length: int
    batch_rows: int
    own: Sequence[int]

    def __len__(self) -> int:
        return -(-len(self.plan.rows) // self.batch_rows)

    def __getitem__(self, k: int) -> Batch:
        rows = self.plan.rows[k * self.batch_rows : (k + 1) * self.batch_rows]
        whole = [i for row in rows for i in row]
        items, numbered = renumber([rows[i] if i < len(rows) else [] for i in self.own])
        local = [self.examples[i] for i in items]
        own = assemble(numbered, local, self.row_length, trained=[x.trained for x in local])
        own["trained"] *= own["positions"] > 0  # nothing stands before a first token: it cannot be predicted
        return Batch(own, whole, self.lengths[whole].tolist(), int(self.trained_lengths[whole].sum()))


def sft_batches(
    examples: Sequence,
    *,
    row_length: int,
    batch_rows: int,
    epochs: int,
    seed: int,
    start: int = 0,
    own: Sequence[int] | None = None,
) -> tuple[Iterator[Batch], int]:
    """Batches of packed rows from batch number `start` on, and how many the whole run has. examples: any sequence of
    `Example`; only those of this process's rows are asked for, where their lengths are known (`lengths_of`). own: the
    rows of a batch that this process assembles, by default all.

    Raises:
        InputError: there are no examples, or one fits in no row (cutting a trace would train a wrong end).
    """
    if not len(examples):
        raise InputError("there is nothing to train on: the data set has no rows")
    lengths = lengths_of(examples)
    plan = plan_rows(lengths, row_length, epochs=epochs, seed=seed)
    if plan.too_long:
        worst = int(lengths.argmax())
        raise InputError(
            f"{len(plan.too_long)} examples are longer than row_length={row_length} tokens (the longest, "
            f"{examples[worst].id}, has {lengths[worst]}); raise row_length, or set on_too_long: drop"
        )
    own = range(batch_rows) if own is None else own
    batches = _Batches(plan, examples, lengths, trained_lengths_of(examples), row_length, batch_rows, own)
    dataset = grain.MapDataset.source(batches)[start:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))), len(batches)
