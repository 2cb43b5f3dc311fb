"""The command line in a process of its own, slowed down, to be killed: `command_worker.py SECONDS COMMAND...`.

Each row takes SECONDS more. So that small models with random weights give files with content, forced
verdicts have small budgets, and a chain is accepted by its text's checksum.
"""

import sys
import time
import zlib

from rmr1_jax.cli.main import main
from rmr1_jax.data.chains.ledger import PairAttempts, Rejection
from rmr1_jax.distributed.rows import SharedRows
from rmr1_jax.eval import lenses


def slow_down(seconds: float) -> None:
    fast = SharedRows.append

    def append(self, *rows, **options):
        time.sleep(seconds * len(rows))
        fast(self, *rows, **options)

    SharedRows.append = append


def accepts(self, attempt):
    return None if zlib.crc32(attempt.answer.text.encode()) % 2 else Rejection("wrong", "its checksum is even")


if __name__ == "__main__":
    lenses.BUDGETS = (4, 12)
    PairAttempts._check = accepts
    slow_down(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
