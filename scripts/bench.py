"""Measure speed, beside peers and limits that are measured in the same run.

    python scripts/bench.py sample --peer hf --peer tunix    the sampler
    python scripts/bench.py steps                            a decode step by the length of the longest sample
    python scripts/bench.py train --peer hf --peer tunix     a training step

The peers run one after the other in environments of their own (`bash scripts/peers` makes them); see `bench_peers.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from rmr1_jax.errors import InputError, RunError

sys.path.insert(0, str(Path(__file__).parent))  # where this file is loaded and not run

from bench_sample import Sample, Steps
from bench_train import Train

Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Steps, subcommand("steps")]
    | Annotated[Train, subcommand("train")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, by the rules of `rmr1`."""
    try:
        command = tyro.cli(
            Command,
            prog="bench.py",
            description=__doc__.splitlines()[0],
            args=argv,
            config=(FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes),
        )
        command.run()
    except (InputError, RunError) as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
