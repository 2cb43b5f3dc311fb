"""SIGTERM: a machine that is taken away says so some seconds before. A run then saves, and exits with 42: run it again.

Python hears a signal between two of its own instructions, so not during a compilation or a long computation. A thread
hears it at once: it tells the run's other processes, and ends this one with 42 when the main thread has not come back
to a place where it can save within RMR1_GRACE_SECONDS (20); the last checkpoint on the disk then stands.

Next: `train/sft.py`, which asks at every step.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

PREEMPTED = 42  # the exit code; see tpu/README.md


TOLD = "rmr1/preempted"  # where processes read that another one was told


class Preempted(SystemExit):
    """The process was told to stop, and what it did is safe: the same command goes on from there."""

    def __init__(self):
        super().__init__(PREEMPTED)


class Preemption:
    """What SIGTERM does between `with` and its end: it is noted, and raised where that does no harm (`interruptible`).

    Does nothing outside of the main thread, where Python has no signals. Such contexts may lie in each other; the inner
    one hears.

    hold: whether something is under way that is not to be cut off; set it when there is.
    """

    def __init__(self):
        self.hold: Callable[[], bool] = lambda: False
        self._told = self._stopping = self._at_once = False
        self._heard, self._bell = socket.socketpair()
        self._done = threading.Event()

    def __enter__(self) -> Preemption:
        self._active = threading.current_thread() is threading.main_thread()
        self._shared = False
        if "jax" in sys.modules:  # a command without it is one process, and shall not have to load it
            from rmr1_jax.distributed.exchange import posts

            self._shared = posts()
        if self._active:
            self._bell.setblocking(False)
            self._before = signal.signal(signal.SIGTERM, self._handle)
            self._bell_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, name="preemption", daemon=True)
            self._listener.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._active:
            self._done.set()
            with suppress(BlockingIOError):
                self._bell.send(b"\0")
            self._listener.join()
            signal.set_wakeup_fd(self._bell_before)
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        self._heard.close()
        self._bell.close()

    def reached(self) -> bool:
        """Whether to save and stop here: any of the run's processes was told. All must ask, at the same place."""
        from rmr1_jax.distributed.exchange import any_of

        self._stopping = self._stopping or any_of(self._told)
        return self._stopping

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In here SIGTERM raises `Preempted` at once: nothing that cannot be done again is lost."""
        self._at_once = True
        try:
            if self._told:
                self._raise()
            yield
        finally:
            self._at_once = False

    def _handle(self, *_: Any) -> None:
        self._told = True
        if self._at_once:
            self._raise()

    def _raise(self) -> None:
        self._stopping, self._at_once = True, False
        raise Preempted

    def _listen(self) -> None:
        """The thread: hears the signal itself, or from another process, and counts the seconds from then on."""
        until = None
        while not self._done.is_set():
            self._heard.settimeout(1.0)
            with suppress(TimeoutError):
                if signal.SIGTERM in self._heard.recv(64):
                    self._told = True
            if until is None and self._tell():
                until = time.monotonic() + grace_seconds()
            if until and time.monotonic() > until and not (self._stopping or self.hold() or self._done.is_set()):
                _say(f"not at a place to save within {grace_seconds():g} s of SIGTERM; the last checkpoint stands")
                os._exit(PREEMPTED)

    def _tell(self) -> bool:
        """Whether this process or another one was told; then all are."""
        if self._shared:
            from rmr1_jax.distributed.exchange import post, posted

            if self._told:
                post(TOLD)
            elif posted(TOLD):
                self._told = True
                _thread.interrupt_main(signal.SIGTERM)  # it may be in `interruptible`
        if self._told:
            _say("SIGTERM: saving and stopping")
        return self._told


def grace_seconds() -> float:
    """How long the main thread has to come to a place where it can save."""
    try:
        return float(os.environ.get("RMR1_GRACE_SECONDS", 20))
    except ValueError:
        return 20.0


def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
