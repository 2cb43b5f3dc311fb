"""Communication between the processes of a run: barriers, flags, and gathering Python values.

In a run of one process every function here works and does nothing. Next: `join.py`, which starts several processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices

from rmr1_jax.jax_private import coordination_client

T = TypeVar("T")

GATHER_BYTES = 2**28  # gathered in one collective, over all processes; the bytes lie on every device for that time


def first() -> bool:
    """Return True in process 0, which writes the files of a run and shows its progress."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Wait for all processes at the barrier `name` (a collective)."""
    if jax.process_count() > 1:
        sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Return on all processes whether `flag` is true on any of them (a collective)."""
    return flag if jax.process_count() == 1 else bool(process_allgather(np.asarray([flag])).any())


def set_flag(name: str) -> None:
    """Set a flag that the other processes read with `flag_is_set`. Not a collective."""
    if client := coordination_client():
        with suppress(jax.errors.JaxRuntimeError):  # process 0 has ended, and the key-value store with it
            client.key_value_set(name, "1", allow_overwrite=True)


def flag_is_set(name: str) -> bool:
    """Return whether any process has set this flag. Not a collective."""
    client = coordination_client()
    with suppress(jax.errors.JaxRuntimeError):  # no such key
        return bool(client and client.key_value_try_get(name))
    return False


def gather(value: T) -> list[T]:
    """Return the values of all processes in their order, on all of them (a collective). A value may be of any type
    that can be pickled and of any size."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), np.uint8)
    sizes = process_allgather(np.asarray([len(data)], np.int32))[:, 0]
    pieces, most = [], GATHER_BYTES // jax.process_count()
    for at in range(0, int(sizes.max()), most):
        size = min(most, 1 << int(sizes.max() - at - 1).bit_length())  # powers of two, to compile for few sizes
        piece = np.zeros(size, np.uint8)
        piece[: max(0, len(data) - at)] = data[at : at + size]
        pieces.append(process_allgather(piece))
    joined = np.concatenate(pieces, axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(joined, sizes, strict=True)]


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of `items`: of n processes, process i takes items i, i + n, i + 2n, ..."""
    return items[jax.process_index() :: jax.process_count()]


def all_shares(mine: Sequence[T]) -> list[T]:
    """Gather one result for each item of every `own_share`, in the order of the whole sequence (a collective)."""
    parts = gather(list(mine))
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
