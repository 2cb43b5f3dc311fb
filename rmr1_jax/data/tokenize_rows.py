"""Tokenizing rows in several processes, in order and in bounded memory.

Next: `prepare.py`, which writes the examples.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from rmr1_jax.data.examples import Example, SourceRow
from rmr1_jax.errors import InputError
from rmr1_jax.model.tokenizer import Tokenizer

CHUNK = 64  # rows a process takes at a time


@dataclass(frozen=True)
class Refused:
    """A well-formed row that cannot become an example of this set, and why."""

    id: str
    reason: str


def tokenize_rows(
    rows: Iterable[SourceRow], tokenizer: Tokenizer, make: Callable[[Tokenizer, SourceRow], Example], workers: int
) -> Iterator[Example | Refused]:
    """Make an example of each row, in the order of the rows.

    With several workers, a few chunks a worker are in memory at any time. Close the iterator to stop the processes.

    Args:
        make: raises InputError for a row that it refuses; it must be picklable, such as a partial of `make_example`.

    Raises:
        BrokenProcessPool: a worker was killed.
    """
    work = functools.partial(_tokenize_chunk, str(tokenizer.directory), str(tokenizer.fingerprint), make)
    rows = iter(rows)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    if workers == 1:
        yield from itertools.chain.from_iterable(map(work, chunks))
        return
    # Spawned, because forking a process that has threads is unsafe.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        pending = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(work, chunk))
                if len(pending) >= 4 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _tokenize_chunk(
    directory: str, fingerprint: str, make: Callable[[Tokenizer, SourceRow], Example], rows: Sequence[SourceRow]
) -> list[Example | Refused]:
    tokenizer = _load_once(directory, fingerprint)
    outcomes: list[Example | Refused] = []
    for row in rows:
        try:
            outcomes.append(make(tokenizer, row))
        except InputError as e:
            outcomes.append(Refused(row.id, str(e)))
    return outcomes


@functools.lru_cache(maxsize=1)
def _load_once(directory: str, fingerprint: str) -> Tokenizer:
    """Load one tokenizer per process. The fingerprint is part of the key so that an edited directory is read again."""
    return Tokenizer(directory)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and stops this process

    def exit_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # otherwise a worker would wait forever for a parent that was killed

    threading.Thread(target=exit_with_parent, daemon=True).start()
