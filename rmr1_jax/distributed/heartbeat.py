"""Several processes: each leaves a sign of life for the others, so that one that is lost is named, and the rest stop.

Left alone, the others would wait in the middle of a step: on some machines for ever, on others until JAX ends them
without a word about who was missing. The signs are left with the first process: where that is the one that is lost, JAX
ends the others at once, with 134 and words of its own. Next: `processes.py`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import jax

SIGNS, ENDS = "rmr1/sign", "rmr1/end"  # in the store of JAX's coordination service


START_AGAIN = 42  # the exit code of a run that goes on when it is started again


class Pulse(threading.Thread):
    """Beats once a second from `start` to `end`; ends this process when another one fell silent, or failed.

    Args:
        client: of JAX's coordination service. hosts: the name of this process's. timeout: seconds of silence.
    """

    def __init__(self, client: Any, *, index: int, count: int, host: str, timeout: float):
        super().__init__(name="pulse", daemon=True)
        self._client, self._index, self._count, self._host = client, index, count, host
        self._timeout, self._ended = timeout, threading.Event()

    def run(self) -> None:
        heard = {i: time.monotonic() for i in range(self._count) if i != self._index}
        signs: dict[int, str] = {}
        ends: dict[int, str] = {}
        for beat in range(10**9):
            if self._ended.wait(1.0):
                return
            try:
                self._client.key_value_set(f"{SIGNS}/{self._index}", f"{beat} {self._host}", allow_overwrite=True)
                now, ends = self._read(SIGNS), self._read(ENDS)
            except jax.errors.JaxRuntimeError:
                now = {i: said for i, said in signs.items() if i == 0}  # all ask process 0: it alone is silent for sure
                heard |= {i: time.monotonic() for i in heard if i}
            heard |= {i: time.monotonic() for i, said in now.items() if i in heard and said != signs.get(i)}
            signs |= now
            self._judge(heard, signs, ends)

    def end(self, code: int) -> None:
        """This process is done; the others may go on without it where `code` is 0."""
        self._ended.set()
        self.join(5)
        with suppress(jax.errors.JaxRuntimeError):  # nobody is there to read it
            self._client.key_value_set(f"{ENDS}/{self._index}", str(code), allow_overwrite=True)

    def others_may_be_lost(self) -> None:
        """A computation with the others failed: returns when none of them is found missing, else not at all."""
        self._timeout = min(self._timeout, 10)
        time.sleep(self._timeout + 3)

    def _read(self, place: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(place)}

    def _judge(self, heard: dict[int, float], signs: dict[int, str], ends: dict[int, str]) -> None:
        failed = {i: int(code) for i, code in ends.items() if i in heard and code not in ("0", str(START_AGAIN))}
        if failed:
            time.sleep(3)  # what failed for all alike this one is about to say itself
            index, code = min(failed.items())
            self._give_up(f"{self._name_of(index, signs)} ended with exit code {code}; this one ends too", code)
        late = {i: time.monotonic() - at for i, at in heard.items() if i not in ends}
        lost = [i for i, seconds in late.items() if seconds > self._timeout]
        if lost:
            named = ", ".join(self._name_of(i, signs) for i in sorted(lost))
            self._give_up(
                f"{named}: no sign of life for {self._timeout:g} s; this process, {self._index}, stops too. Start the "
                "run again on all hosts: it goes on from its last checkpoint",
                START_AGAIN,
            )

    def _name_of(self, index: int, signs: dict[int, str]) -> str:
        return f"process {index} of {self._count} on {signs.get(index, '? an unknown host').partition(' ')[2]}"

    def _give_up(self, message: str, code: int) -> None:
        if not self._ended.is_set():
            print(f"\nerror: {message}", file=sys.stderr, flush=True)
            os._exit(code)
