"""Preemption: on SIGTERM a run saves a checkpoint and exits with 42. The same command then goes on from there.

A machine that is about to be taken away sends SIGTERM some seconds before. Python runs signal handlers only between two
of its own instructions, so not during a compilation or a long computation. A thread sees the signal at once: it informs
the other processes of the run, and ends this one with 42 if the main thread has not reached a point where it can save
within RMR1_GRACE_SECONDS (default 20). The last checkpoint on the disk then stands.

Next: `train/run_directory.py`, where training asks at every step.
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

PREEMPTED = 42  # the exit code of a run that goes on when it is started again; see tpu/README.md

FLAG = "rmr1/preempted"  # set for the other processes when one has received SIGTERM


class Preempted(SystemExit):
    """The process was asked to stop, and its work is safe: the same command goes on from there."""

    def __init__(self):
        super().__init__(PREEMPTED)


class Preemption:
    """A context in which SIGTERM is recorded, for `reached`, and raised as `Preempted` inside `interruptible`.

    Outside of the main thread, where Python has no signals, it does nothing. Contexts may be nested; the innermost one
    receives the signal.

    hold: returns True while work is in progress that must not be cut off, such as a save. Assign it when there is any.
    """

    def __init__(self):
        self.hold: Callable[[], bool] = lambda: False
        self._received = self._stopping = self._interruptible = False

    def __enter__(self) -> Preemption:
        self._active = threading.current_thread() is threading.main_thread()
        self._distributed = "jax" in sys.modules  # a command without JAX has one process, and must not load it
        if self._active:
            # Python writes the number of each signal to one end of this pair, and the thread reads it from the other.
            self._reader, self._writer = socket.socketpair()
            self._reader.settimeout(1.0)
            self._writer.setblocking(False)
            self._handler_before = signal.signal(signal.SIGTERM, self._handle)
            self._writer_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, name="preemption", daemon=True)
            self._listener.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._active:
            signal.set_wakeup_fd(self._writer_before)
            signal.signal(signal.SIGTERM, self._handler_before or signal.SIG_DFL)
            self._writer.close()  # ends the thread
            self._listener.join()
            self._reader.close()

    def reached(self) -> bool:
        """Return whether to save and stop here, because any process has received SIGTERM (a collective)."""
        from rmr1_jax.distributed.exchange import any_of

        self._stopping = self._stopping or any_of(self._received)
        return self._stopping

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Preempted` at once on SIGTERM inside this block, for work that can be repeated without loss."""
        self._interruptible = True
        try:
            if self._received:
                self._raise()
            yield
        finally:
            self._interruptible = False

    def _handle(self, *_: Any) -> None:
        self._received = True
        if self._interruptible:
            self._raise()

    def _raise(self) -> None:
        self._stopping, self._interruptible = True, False
        raise Preempted

    def _listen(self) -> None:
        """Run in the thread: wait for the signal, here or in another process, and enforce the grace period."""
        deadline = None
        while True:
            with suppress(TimeoutError):
                if not (numbers := self._reader.recv(64)):
                    return
                if signal.SIGTERM in numbers:
                    self._received = True
            if deadline is None and self._share():
                deadline = time.monotonic() + grace_seconds()
            if deadline and time.monotonic() > deadline and not (self._stopping or self.hold()):
                _print(f"cannot save within {grace_seconds():g} s of SIGTERM; the last checkpoint stands")
                os._exit(PREEMPTED)

    def _share(self) -> bool:
        """Pass SIGTERM on between the processes. Returns whether any has received it."""
        if self._distributed:
            from rmr1_jax.distributed.exchange import flag_is_set, set_flag

            if self._received:
                set_flag(FLAG)
            elif flag_is_set(FLAG):
                self._received = True
                _thread.interrupt_main(signal.SIGTERM)  # the main thread may be inside `interruptible`
        if self._received:
            _print("SIGTERM: saving and stopping")
        return self._received


def grace_seconds() -> float:
    """Return the seconds that the main thread has to reach a point where it can save."""
    try:
        return float(os.environ.get("RMR1_GRACE_SECONDS", 20))
    except ValueError:
        return 20.0


def _print(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)
