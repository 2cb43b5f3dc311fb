"""Packing and batches: examples -> rows of one length -> batches, in an order that is a pure function of the seed.

The order of a whole run is planned before it starts, from lengths alone: each epoch is shuffled and packed first-fit,
and the plan is a list of rows. So the cursor of a run is one number, the next batch; no example is cut or lost; and a
resumed run, or one on another number of hosts, sees the same rows. Every process has the plan and assembles its own
rows only. Grain reads ahead of the training step. GRPO packs its rollouts with the same two functions, `pack` and
`assemble`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from rmr1_jax.errors import InputError


class Packable(Protocol):
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """rows: for each row of the run, the numbers of the examples in it. too_long: examples that fit in no row."""

    rows: list[list[int]]
    too_long: list[int]


def pack(
    lengths: Sequence[int], row_length: int, order: Sequence[int] | None = None, *, most: int | None = None
) -> list[list[int]]:
    """First-fit: each item goes to the first row with room, in `order`. Returns the items of each row.

    `most`: items that a row holds at most. All rows stay open, so at the lengths of real traces 97% and more of the
    positions are filled.
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
    """The rows of a whole run, in order: each epoch has every example that fits exactly once, in its own order."""
    too_long = [i for i, n in enumerate(lengths) if n > row_length]
    fitting = np.asarray([i for i, n in enumerate(lengths) if n <= row_length], np.int64)
    rows = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        packed = pack(lengths, row_length, rng.permutation(fitting))
        # First-fit leaves the emptiest rows last; shuffled, no batch is worse filled than another.
        rows += [packed[i] for i in rng.permutation(len(packed))]
    return RowPlan(rows, too_long)


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
    process's B rows. lengths, trained_tokens: of all examples in the whole batch, and their sum over it.
    """

    rows: dict[str, np.ndarray]
    lengths: list[int]
    trained_tokens: int


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Grain's view of a run: batch k is rows k x B to k x B + B of the plan; empty rows fill up the last one."""

    plan: RowPlan
    examples: Sequence
    row_length: int
    batch_rows: int
    own: Sequence[int]

    def __len__(self) -> int:
        return -(-len(self.plan.rows) // self.batch_rows)

    def __getitem__(self, k: int) -> Batch:
        rows = self.plan.rows[k * self.batch_rows : (k + 1) * self.batch_rows]
        whole = [self.examples[i] for row in rows for i in row]
        items, numbered = renumber([rows[i] if i < len(rows) else [] for i in self.own])
        local = [self.examples[i] for i in items]
        own = assemble(numbered, local, self.row_length, trained=[x.trained for x in local])
        own["trained"] *= own["positions"] > 0  # nothing stands before a first token: it cannot be predicted
        return Batch(own, [len(x) for x in whole], sum(int(x.trained[1:].sum()) for x in whole))


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
    """Batches of packed rows from batch number `start` on, and how many the whole run has. own: the rows of a batch
    that this process assembles, by default all.

    Raises:
        InputError: there are no examples, or one fits in no row (cutting a trace would train a wrong end).
    """
    if not len(examples):
        raise InputError("there is nothing to train on: the data set has no rows")
    plan = plan_rows([len(x) for x in examples], row_length, epochs=epochs, seed=seed)
    if plan.too_long:
        worst = max(plan.too_long, key=lambda i: len(examples[i]))
        raise InputError(
            f"{len(plan.too_long)} examples are longer than row_length={row_length} tokens (the longest, "
            f"{examples[worst].id}, has {len(examples[worst])}); raise row_length, or set on_too_long: drop"
        )
    batches = _Batches(plan, examples, row_length, batch_rows, range(batch_rows) if own is None else own)
    dataset = grain.MapDataset.source(batches)[start:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))), len(batches)
