"""The command `rmr1`: each subcommand is a dataclass with its options and a `run` that calls the library.

Everything heavy is imported inside `run`, so that help and mistakes in a command show at once. Exit codes: 0; 1 for a
run that cannot go on; 2 for bad input; 42 for SIGTERM, when what was done is safe and the same command goes on from
there; 130 when interrupted.

Next: the functions that the commands call: `train/sft.py`, `train/grpo.py`, `judge_file.py`, `report.py`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from rmr1_jax.cli.data import Data
from rmr1_jax.cli.eval import Compare, Eval, Score
from rmr1_jax.cli.judge import JudgePairs
from rmr1_jax.cli.options import MaybePath
from rmr1_jax.cli.train import Export, Grpo, Plan, Sft
from rmr1_jax.distributed.preemption import PREEMPTED, Preempted, Preemption
from rmr1_jax.errors import InputError, RunError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train and evaluate a small judge from nothing, in minutes, on any machine."""

    out: Path = Path("runs/quickstart")
    """Directory for the models, results.json and report.html."""
    seed: int = 0
    """Decides the questions, the weights and the sampling."""
    control: bool = False
    """Also spend GRPO's time on more SFT, to compare."""

    def run(self) -> None:
        from rmr1_jax.quickstart.quickstart import quickstart

        quickstart(out=self.out, seed=self.seed, control=self.control)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One HTML file about training runs (curves, traces) or evaluations (scores, every judgement)."""

    run_dirs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR [RUN_DIR ...]", help_behavior_hint="")]
    """Directories that `rmr1` wrote to; several are compared."""
    out: MaybePath = None
    """The file to write; by default report.html in the first directory."""

    def run(self) -> None:
        from rmr1_jax.eval.compare import compare
        from rmr1_jax.report.report import write_report

        if not self.run_dirs:
            raise InputError("no run directory is given; expected rmr1 report RUN_DIR [RUN_DIR ...]")
        out = self.out or self.run_dirs[0] / "report.html"
        print(f"written: {write_report(self.run_dirs, out, compare=compare)}")


Command = (
    Annotated[Quickstart, subcommand("quickstart")]
    | Annotated[Sft, subcommand("sft")]
    | Annotated[Grpo, subcommand("grpo")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[JudgePairs, subcommand("judge")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Score, subcommand("score")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Report, subcommand("report")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` defaults to the process's own arguments."""
    command = tyro.cli(
        Command,
        prog="rmr1",
        description="Train and use reasoning reward models. `rmr1 COMMAND --help` says more; try `rmr1 quickstart`.",
        args=argv,
        config=(FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes),
    )
    # Transformers is here for its tokenizers; that PyTorch is absent is no news to anybody.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with Preemption() as preemption, preemption.interruptible():
            command.run()
    except Preempted:
        print("stopped by SIGTERM; run the same command again to go on where it stopped", file=sys.stderr)
        return PREEMPTED
    except (InputError, RunError) as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return 130
    return 0
