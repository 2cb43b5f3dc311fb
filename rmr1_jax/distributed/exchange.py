"""Communication between the processes of a run: barriers, flags, and gathering Python values.

In a run of one process every function here works and does nothing. None imports JAX before several processes have
joined, so that commands without a model start fast. Next: `join.py`, which starts several processes; `rows.py`, files
to which all of them append.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from rmr1_jax.errors import exit_code

T = TypeVar("T")

GATHER_BYTES = 2**28  # gathered in one collective, over all processes; the bytes lie on every device for that time


def this_process() -> tuple[int, int]:
    """Return the number of this process and the number of processes."""
    if "jax" not in sys.modules:  # nothing has joined this process to others
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def first() -> bool:
    """Return True in process 0, which writes the files of a run and shows its progress."""
    return this_process()[0] == 0


def wait(name: str) -> None:
    """Wait for all processes at the barrier `name` (a collective)."""
    if this_process()[1] > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def wait_idle(name: str) -> None:
    """Wait like `wait` where the others may take hours: without a collective, which some backends give up, and so that
    a signal is handled at once."""
    index, count = this_process()
    set_flag(f"{name}/{index}")
    while not all(flag_is_set(f"{name}/{i}") for i in range(count) if i != index):
        time.sleep(0.2)


def any_of(flag: bool) -> bool:
    """Return on all processes whether `flag` is true on any of them (a collective)."""
    return flag if this_process()[1] == 1 else bool(_all_gathered([flag]).any())


def set_flag(name: str) -> None:
    """Set a flag that the other processes read with `flag_is_set`. Not a collective."""
    if client := _client():
        import jax

        with suppress(jax.errors.JaxRuntimeError):  # process 0 has ended, and the key-value store with it
            client.key_value_set(name, "1", allow_overwrite=True)


def flag_is_set(name: str) -> bool:
    """Return whether any process has set this flag. Not a collective."""
    if client := _client():
        import jax

        with suppress(jax.errors.JaxRuntimeError):  # no such key
            return bool(client.key_value_try_get(name))
    return False


def gather(value: T) -> list[T]:
    """Return the values of all processes in their order, on all of them (a collective). A value may be of any type
    that can be pickled and of any size."""
    if (count := this_process()[1]) == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), np.uint8)
    sizes = _all_gathered(np.asarray([len(data)], np.int32))[:, 0]
    pieces, most = [], GATHER_BYTES // count
    for at in range(0, int(sizes.max()), most):
        size = min(most, 1 << int(sizes.max() - at - 1).bit_length())  # powers of two, to compile for few sizes
        piece = np.zeros(size, np.uint8)
        piece[: max(0, len(data) - at)] = data[at : at + size]
        pieces.append(_all_gathered(piece))
    joined = np.concatenate(pieces, axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(joined, sizes, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in process 0 alone, and return its value on all processes (a collective). Where it raises an error,
    process 0 raises it, to be shown once, and the others raise SystemExit with the same exit code."""
    if this_process()[1] == 1:
        return make()
    value, code = None, 0
    if first():
        try:
            value = make()
        except Exception as e:
            gather((None, exit_code(e)))
            raise
    value, code = gather((value, code))[0]
    if code:
        raise SystemExit(code)
    return value


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of `items`: of n processes, process i takes items i, i + n, i + 2n, ..."""
    index, count = this_process()
    return items[index::count]


def all_shares(mine: Sequence[T]) -> list[T]:
    """Gather one result for each item of every `own_share`, in the order of the whole sequence (a collective)."""
    parts = gather(list(mine))
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def _all_gathered(value: Sequence[T] | np.ndarray) -> np.ndarray:
    """The arrays of all processes, which have one shape, stacked (a collective)."""
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(np.asarray(value))


def _client() -> Any:
    """JAX's `coordination_client`, if JAX is imported."""
    if "jax" not in sys.modules:
        return None
    from rmr1_jax.jax_private import coordination_client

    return coordination_client()
