"""Threads that stand for the processes of a run, for quick tests of what processes do with files.

A thread that raises ends the others at their next exchange, as a lost process does.
"""

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from rmr1_jax.distributed import exchange


class Lost(Exception):
    """Another thread has ended."""


class Threads:
    """`count` processes. Inside `run`, the modules' `this_process` and `gather` are those of a thread."""

    def __init__(self, monkeypatch, count: int, *modules):
        self.count, self.place = count, threading.local()
        self.changed, self.rounds, self.flags, self.lost = threading.Condition(), defaultdict(dict), set(), False
        fakes = {"this_process": lambda: (self.place.index, count), "gather": self.gather}
        fakes |= {"set_flag": self.flags.add, "flag_is_set": self.flag_is_set}
        for module in (exchange, *modules):
            for name in fakes.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, fakes[name])

    def run(self, call) -> list:
        """Call `call(index)` in all threads; returns what each returned or raised."""

        def process(index):
            self.place.index, self.place.round = index, 0
            try:
                return call(index)
            except BaseException as e:
                with self.changed:
                    self.lost = True
                    self.changed.notify_all()
                return e

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(process, range(self.count)))

    def gather(self, value):
        with self.changed:
            own = self.rounds[self.place.round]
            self.place.round += 1
            own[self.place.index] = value
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(own) == self.count or self.lost, timeout=60)
            if len(own) < self.count:
                raise Lost
            return [own[i] for i in range(self.count)]

    def flag_is_set(self, name):
        if self.lost and name not in self.flags:
            raise Lost
        return name in self.flags
