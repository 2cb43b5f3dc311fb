"""Rows in the published format and prepared sets, for tests.

As a program, `python prepared.py CONFIG.yaml [LIMIT]` prepares a set, with no file larger than LIMIT bytes, and prints
the peak of its memory in bytes.
"""

import functools
import json
import re
import resource
import sys
from pathlib import Path

import numpy as np

from rmr1_jax.config import load_config
from rmr1_jax.data.prepare import PrepareConfig, prepare

TRACE = "<type>Chat</type><eval>{}</eval><answer>[[{}]]</answer>"


def rows(count: int, *, sides: bool = False, words: int = 12) -> list[dict]:
    """Make rows of two sources in turn, with traces, or if `sides`, with the better side, A and B in turn."""
    made = []
    for i in range(count):
        better = "AB"[i % 2]
        text = " ".join(f"word{(i * 31 + j * 7) % 997}" for j in range(words + i % 9))
        winner = f"model_{better.lower()}" if sides else TRACE.format(text[: 20 + i % 30], better)
        messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": f"{i}: {text}"}]
        made.append({"id": f"r{i}", "source": f"s{i % 2}", "context_messages": messages, "winner": winner})
    return made


def write_rows(path, made: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


# One process, because starting another takes seconds.
config_of = functools.partial(PrepareConfig, workers=1)


def assert_same(ours, theirs):
    """Assert that two sequences of examples are equal, dtypes included."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.id, a.source, a.better) == (b.id, b.source, b.better)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.trained, b.trained)
        assert a.tokens.dtype == b.tokens.dtype == np.int32 and a.trained.dtype == b.trained.dtype == bool


if __name__ == "__main__":
    if sys.argv[2:]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    prepare(load_config(PrepareConfig, sys.argv[1]))
    # The peak of this program alone; that of getrusage includes the process before it executed this program.
    print(1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]))
