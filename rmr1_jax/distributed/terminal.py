"""Tells the user what goes on: lines, waits and progress bars, on stderr, by the first process.

A thread repeats what is shown, so that no stretch of more than ten seconds passes without a word while a program is
compiled or a batch takes minutes. Imports no JAX: commands speak before they load it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from rmr1_jax.distributed.exchange import first

QUIET = 6.0  # seconds after which a wait is said again, and a bar is drawn again where that makes a line
TICK = 1.0  # seconds after which a bar is drawn again where it is drawn over itself
DELAY = 2.0  # seconds that a wait must take to be said at all


def say(text: str) -> None:
    """Print a line without breaking a progress bar."""
    if first():
        tqdm.write(text, file=sys.stderr)


@contextmanager
def waiting(text: str, *, delay: float = DELAY) -> Iterator[None]:
    """Say "text ..." if the block takes longer than `delay` seconds, and again with its time so far until it ends."""
    began = time.monotonic()

    def say_again() -> None:
        tqdm.write(f"{text} ... {time.monotonic() - began:.0f} s", file=sys.stderr)

    if not first():
        yield
        return
    if not delay:
        say(f"{text} ...")
    with _repeated(say_again, first_after=delay or QUIET, every=QUIET):
        yield


def pace(brief: bool = False) -> dict[str, Any]:
    """How often a progress bar moves, as arguments of `tqdm`: always in a terminal or a notebook, and elsewhere, where
    each time is one more line of a file, after `QUIET` seconds. brief: for a bar inside another one. A file leaves it
    out if it takes fewer seconds, and only a terminal shows both at once."""
    options: dict[str, Any] = {"mininterval": 0.1}
    if not _overwrites():
        options = {"mininterval": QUIET, "maxinterval": QUIET, "delay": QUIET if brief else 0.0}
    return options | ({"position": 0} if brief and not sys.stderr.isatty() else {})


@contextmanager
def bar(name: str, *, start: int = 0, total: int | None, unit: str, shown: bool = True) -> Iterator[tqdm]:
    """A progress bar from `start` to `total`. It is drawn again with the time so far when it does not move."""
    options: dict[str, Any] = {"desc": name, "initial": start, "total": total, "unit": unit, "dynamic_ncols": True}
    with tqdm(**options, **pace(), disable=not (shown and first())) as found:
        if found.disable:
            yield found
            return
        quiet, drawn = (TICK if _overwrites() else QUIET), 0.0

        def draw() -> None:
            nonlocal drawn
            if (now := time.time()) - max(drawn, found.last_print_t) >= quiet:
                found.refresh()
                drawn = now

        with _repeated(draw, first_after=TICK, every=TICK):
            yield found


def _overwrites() -> bool:
    """Whether a bar is drawn over itself, as in a terminal and in a notebook, and not line by line in a file."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextmanager
def _repeated(action: Callable[[], Any], *, first_after: float, every: float) -> Iterator[None]:
    """Call `action` from a thread until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        wait = first_after
        while not ended.wait(wait):
            with suppress(OSError, ValueError):  # stderr is closed
                action()
            wait = every

    thread = threading.Thread(target=repeat, name="terminal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
