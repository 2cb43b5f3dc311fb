"""Packing and batches: examples become rows of one length, and rows become batches, in an order fixed by the seed.

The order of a whole run is planned before it starts, from lengths alone: each epoch is shuffled and packed first-fit,
and the plan is a list of rows. Therefore the data cursor of a run is one number, the next batch; no example is
truncated or lost; and a resumed run, or one on another number of hosts, gets the same rows. Every process has the plan,
and reads and assembles only its own rows. GRPO packs its rollouts by `groups.py` or `pack`, and assembles them here.

Rows may have two lengths, so that attention is not computed over 12,288 positions for sequences of 1,800 tokens: what
fits into a short row goes there, the rest into long ones.

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


class Packing(NamedTuple):
    """Further rules of packing. max_items: the most items in a row; None: any number. short_length: the length of the
    short rows, a divisor of the long ones'; None: there are none. micro_rows: the rows of a micro-batch, which have one
    length."""

    max_items: int | None = None
    short_length: int | None = None
    micro_rows: int = 1


ONE_LENGTH = Packing()  # rows of one length, with any number of items


def row_lengths(long_rows: int, row_length: int, short_length: int, most: int) -> np.ndarray:
    """Return the lengths of rows of which the first `long_rows` are long, `most` of them and as many short ones."""
    return np.repeat([row_length, short_length], [long_rows, most])


def pack(
    lengths: Sequence[int],
    row_length: int | np.ndarray,
    order: Sequence[int] | None = None,
    *,
    max_items: int | None = None,
) -> list[list[int]]:
    """Pack items first-fit: in `order` (None: all, from the first), each goes to the first row with room for it.

    All rows stay open, so that short items fill the room that long ones left. A row with `max_items` items is closed.
    row_length: of all rows, or of each one. Returns the numbers of the items in each row.
    """
    order = range(len(lengths)) if order is None else order
    rows: list[list[int]] = []
    # In each row; there are at most as many rows as items, beside long ones that stay empty.
    room = np.array(row_length) if np.ndim(row_length) else np.full(len(order), row_length, np.int64)
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
        packed = pack(lengths, row_length, _shuffled(lengths, row_length, rng), max_items=max_items)
        # First-fit leaves the emptiest rows last: shuffled again, all batches are filled alike.
        rows += [packed[i] for i in rng.permutation(len(packed))]
    return rows


def _shuffled(lengths: np.ndarray, row_length: int, rng: np.random.Generator) -> list[int]:
    """The numbers of the examples that fit into a row: shuffled, then the longest of each window first."""
    shuffled = rng.permutation(np.flatnonzero(lengths <= row_length))
    return [i for window in batched(shuffled, WINDOW) for i in window[np.argsort(-lengths[window], kind="stable")]]


def plan_slots(
    lengths: Sequence[int], row_length: int, packing: Packing, *, epochs: int, seed: int
) -> list[list[list[int]]]:
    """Plan the slots of a whole run: a slot is a long row, or as many short rows as have its length together.

    In each epoch every example occurs once, in a short row if it fits into one; but the room that is left in long rows
    is filled first. `micro_rows` slots in turn, the first at a multiple of that, are of one kind. What fills no such
    turn of short rows at the end of an epoch begins the next one's. Without short rows these are those of `plan_rows`.
    """
    short, micro = packing.short_length, packing.micro_rows
    if short is None:
        rows = plan_rows(lengths, row_length, epochs=epochs, seed=seed, max_items=packing.max_items)
        return [[row] for row in rows]
    lengths, slots, rest = np.asarray(lengths), [], []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = _shuffled(lengths, row_length, rng)
        need_long = [i for i in order if lengths[i] > short]
        need = len(pack(lengths, row_length, need_long, max_items=packing.max_items))
        long = -(-need // micro) * micro
        order = need_long + [i for i in order if lengths[i] <= short]
        packed = pack(lengths, row_lengths(long, row_length, short, len(order)), order, max_items=packing.max_items)
        packed += [[]] * (long - len(packed))
        short_rows = [packed[long + i] for i in rng.permutation(len(packed) - long)]
        short_rows += [[]] * (-len(short_rows) % (row_length // short))
        rest += batched(short_rows, row_length // short)
        turns = batched([[packed[i]] for i in rng.permutation(long)], micro)
        whole = len(rest) // micro * micro
        turns += batched(rest[:whole], micro)
        rest = rest[whole:]
        slots += [slot for i in rng.permutation(len(turns)) for slot in turns[i]]
    return slots + rest


def batched(items: Sequence, size: int) -> list[Sequence]:
    """Return the items in parts of `size`, the last of which may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


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


class PackedRows(NamedTuple):
    """Rows of one length, as one process has them.

    arrays: of the B rows of this process, tokens, positions, segment_ids [B, T] int32, and trained [B, T] float32, 1 at
    the tokens that the loss trains. used: how many rows of all processes are to be computed; those behind them are
    empty, and keep B the same in all batches. most_trained: the most trained tokens in any such row of the whole run.
    """

    arrays: dict[str, np.ndarray]
    used: int
    most_trained: int


class Batch(NamedTuple):
    """A batch of packed rows: `rows` of each length that occurs in it. items, lengths: the numbers and the tokens of
    all examples in the whole batch. trained_tokens: the trained tokens in the whole batch."""

    rows: list[PackedRows]
    items: list[int]
    lengths: list[int]
    trained_tokens: int


def sft_batches(
    examples: Sequence,
    *,
    row_length: int,
    batch_rows: int,
    epochs: int,
    seed: int,
    start: int = 0,
    own: Sequence[int] | None = None,
    packing: Packing = ONE_LENGTH,
) -> tuple[Iterator[Batch], int]:
    """Return the batches of packed rows from batch number `start` on, and the number of batches of the whole run.

    Args:
        examples: of `Example` (see `lengths_of`). own: the rows of a batch that this process assembles; None: all. If
            there are short rows, it is a pattern of `packing.micro_rows` rows that repeats.

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
    plan = plan_slots(lengths, row_length, packing, epochs=epochs, seed=seed)
    total = -(-len(plan) // batch_rows)
    short, own = packing.short_length, range(batch_rows) if own is None else own
    kinds = {1: row_length} | ({row_length // short: short} if short else {})  # rows of a slot -> their length
    trained = {n: [int(trained_lengths[row].sum()) for slot in plan if len(slot) == n for row in slot] for n in kinds}

    def make_batch(k: int) -> Batch:
        slots, rows = plan[k * batch_rows : (k + 1) * batch_rows], []
        items = [i for slot in slots for row in slot for i in row]
        for n, length in kinds.items():
            if chosen := [row for slot in slots if len(slot) == n for row in slot]:
                used = len(chosen) if short else batch_rows
                chosen += [[]] * (n * batch_rows - len(chosen))  # empty rows fill up the batch
                own_rows = [[examples[i] for i in chosen[part * batch_rows + r]] for part in range(n) for r in own]
                arrays = assemble(own_rows, length, ["trained"])
                arrays["trained"] *= arrays["positions"] > 0  # see `trained_lengths_of`
                rows.append(PackedRows(arrays, used, max(trained[n])))
        return Batch(rows, items, lengths[items].tolist(), int(trained_lengths[items].sum()))

    dataset = grain.MapDataset.range(total)[start:].map(make_batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))), total
