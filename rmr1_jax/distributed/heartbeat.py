"""The heartbeat: every process of a run shows the others that it is alive, and stops when one of them is lost.

Without it the others would wait in the middle of a step: on some machines without end, on others until JAX ends them
with an error that does not name the lost process. The heartbeats are kept in the key-value store of JAX's coordination
service, in process 0. When process 0 itself is lost, JAX ends the others at once, with exit code 134 and its own error.
Next: `preemption.py`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import jax

from rmr1_jax.distributed.preemption import PREEMPTED

HEARTBEATS, EXIT_CODES = "rmr1/heartbeat", "rmr1/exit_code"  # keys in the store, each with a process's number below it


class Heartbeat(threading.Thread):
    """Writes a heartbeat each second, and ends this process when another one has failed or is silent for `timeout`
    seconds. client: the client of JAX's coordination service. host: the name of this process's host."""

    def __init__(self, client: Any, *, index: int, count: int, host: str, timeout: float):
        super().__init__(name="heartbeat", daemon=True)
        self._client, self._index, self._count, self._host = client, index, count, host
        self._timeout, self._ended = timeout, threading.Event()

    def run(self) -> None:
        seen_at = {i: time.monotonic() for i in range(self._count) if i != self._index}
        beats: dict[int, str] = {}
        exit_codes: dict[int, str] = {}
        beat = 0
        while not self._ended.wait(1.0):
            beat += 1
            try:
                self._client.key_value_set(f"{HEARTBEATS}/{self._index}", f"{beat} {self._host}", allow_overwrite=True)
                now, exit_codes = self._read(HEARTBEATS), self._read(EXIT_CODES)
            except jax.errors.JaxRuntimeError:
                # Process 0, which holds the store, does not answer: nothing is known of the others.
                now = {i: text for i, text in beats.items() if i == 0}
                seen_at |= {i: time.monotonic() for i in seen_at if i}
            seen_at |= {i: time.monotonic() for i, text in now.items() if i in seen_at and text != beats.get(i)}
            beats |= now
            self._check(seen_at, beats, exit_codes)

    def end(self, code: int) -> None:
        """Stop: this process ends with exit code `code`. After 0 the others go on without it."""
        self._ended.set()
        self.join(5)
        with suppress(jax.errors.JaxRuntimeError):  # the store has ended
            self._client.key_value_set(f"{EXIT_CODES}/{self._index}", str(code), allow_overwrite=True)

    def wait_for_lost_process(self) -> None:
        """Call this when a collective has failed: ends the process if another one is lost, and returns otherwise."""
        self._timeout = min(self._timeout, 10)
        time.sleep(self._timeout + 3)

    def _read(self, key: str) -> dict[int, str]:
        return {int(name.rpartition("/")[2]): value for name, value in self._client.key_value_dir_get(key)}

    def _check(self, seen_at: dict[int, float], beats: dict[int, str], exit_codes: dict[int, str]) -> None:
        failed = {i: int(c) for i, c in exit_codes.items() if i in seen_at and c not in ("0", str(PREEMPTED))}
        if failed:
            time.sleep(3)  # if the same error occurs in this process, the error itself is the better message
            index, code = min(failed.items())
            self._exit(f"{self._describe(index, beats)} ended with exit code {code}; this process ends too", code)
        silent = {i: time.monotonic() - at for i, at in seen_at.items() if i not in exit_codes}
        lost = [i for i, seconds in silent.items() if seconds > self._timeout]
        if lost:
            described = ", ".join(self._describe(i, beats) for i in sorted(lost))
            self._exit(
                f"{described}: no heartbeat for {self._timeout:g} s; this process, {self._index}, stops too. Start the "
                "run again on all hosts: it goes on from its last checkpoint",
                PREEMPTED,
            )

    def _describe(self, index: int, beats: dict[int, str]) -> str:
        return f"process {index} of {self._count} on {beats.get(index, '? an unknown host').partition(' ')[2]}"

    def _exit(self, message: str, code: int) -> None:
        if not self._ended.is_set():
            print(f"\nerror: {message}", file=sys.stderr, flush=True)
            os._exit(code)
