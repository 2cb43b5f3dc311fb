"""What tests of prepared sets share: rows in the published format, and a set of them.

As a program, `python prepared.py CONFIG.yaml [LIMIT]` prepares a set, with no file larger than LIMIT bytes, and prints
how many bytes of memory it took at most.
"""

import functools
import json
import re
import resource
import sys
from pathlib import Path

from rmr1_jax.config import load_config
from rmr1_jax.data.prepare import PrepareConfig, prepare

TRACE = "<type>Chat</type><eval>{}</eval><answer>[[{}]]</answer>"


def rows(count: int, *, sides: bool = False, words: int = 12) -> list[dict]:
    """Rows with ids and two sources in turn; with traces, or (`sides`) naming the better one, A and B in turn."""
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


# One process: to start another takes seconds.
config_of = functools.partial(PrepareConfig, workers=1)


if __name__ == "__main__":
    if sys.argv[2:]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    prepare(load_config(PrepareConfig, sys.argv[1]))
    # Of this program alone; getrusage would count what the process was before it became this one.
    print(1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]))
