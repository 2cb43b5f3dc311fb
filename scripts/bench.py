"""Measures the speed of sampling and training, with peers and limits measured in the same run.

    python scripts/bench.py sample --peer hf --peer tunix    the sampler
    python scripts/bench.py steps                            decode steps, by the length of the longest sample
    python scripts/bench.py train --peer hf --peer tunix     a training step
    python scripts/bench.py update                           a GRPO update, with both peers

Each peer runs alone, in an environment of its own that `bash scripts/peers` installs. Read next: `bench_common.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from rmr1_jax.errors import InputError, RunError

sys.path.insert(0, str(Path(__file__).parent))  # for tests, which import this file

from bench_sample import Sample, Steps
from bench_train import Train
from bench_update import GrpoUpdate

Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Steps, subcommand("steps")]
    | Annotated[Train, subcommand("train")]
    | Annotated[GrpoUpdate, subcommand("update")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, as `rmr1` does."""
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
