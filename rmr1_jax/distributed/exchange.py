"""What the processes of a run tell each other."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

import jax
import numpy as np

T = TypeVar("T")

GATHER_BYTES = 2**28  # of all processes together, gathered at a time: for a moment they lie on every device


def first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Wait until all processes are at the place called `name`."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Whether it is so for any process; the same answer on all, which must all ask."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(process_allgather(np.asarray([flag])).any())


def posts() -> bool:
    """Whether there are other processes to leave notes for."""
    return _store() is not None


def post(name: str) -> None:
    """Leave a note for the other processes, which may read it at any time with `posted`."""
    if store := _store():
        with suppress(jax.errors.JaxRuntimeError):  # the first process is gone, and with it the store
            store.key_value_set(name, "1", allow_overwrite=True)


def posted(name: str) -> bool:
    """Whether any process has left this note."""
    store = _store()
    with suppress(jax.errors.JaxRuntimeError):  # it is not there
        return bool(store and store.key_value_try_get(name))
    return False


def _store():
    """The key-value store that JAX's coordination service has; None in one process. JAX has no public name for it."""
    from jax._src.distributed import global_state

    return global_state.client


def gather(value: T) -> list[T]:
    """One value of each process, in their order, on all of them. It is pickled, so it may be of any size and kind."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), np.uint8)
    sizes = process_allgather(np.asarray([len(data)], np.int32))[:, 0]
    pieces, most = [], GATHER_BYTES // jax.process_count()
    for at in range(0, int(sizes.max()), most):
        size = min(most, 1 << int(sizes.max() - at - 1).bit_length())  # few sizes, few compilations
        piece = np.zeros(size, np.uint8)
        piece[: max(0, len(data) - at)] = data[at : at + size]
        pieces.append(process_allgather(piece))
    joined = np.concatenate(pieces, axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(joined, sizes, strict=True)]


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th item, dealt to n processes like cards."""
    return items[jax.process_index() :: jax.process_count()]


def all_shares(mine: Sequence[T]) -> list[T]:
    """What all processes made of their shares, one for one, in the order of the whole."""
    parts = gather(list(mine))
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
