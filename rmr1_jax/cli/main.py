"""The command `rmr1`. Each subcommand is a dataclass of its name, with its options and a `run` that calls the library.

Heavy imports are inside `run`, so that help and mistakes in a command show at once. Exit codes: 0 for success; 1 for a
run that cannot go on; 2 for a mistake in the command, its settings or its data; 42 after SIGTERM, when the work so far
is saved and the same command resumes it; 130 after Ctrl-C. Read next: `words.py` and `options.py`, and `train.py`,
`data.py`, `judge.py` and `eval.py`, the other commands.
"""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg

import rmr1_jax
from rmr1_jax.cli.data import Data
from rmr1_jax.cli.eval import Compare, Eval, Score
from rmr1_jax.cli.judge import Judge
from rmr1_jax.cli.options import ConfigCommand, MaybePath, MaybeText, starting
from rmr1_jax.cli.recipes import find_config, missing, recipe_lines
from rmr1_jax.cli.train import Export, Grpo, Plan, Sft
from rmr1_jax.cli.words import check_words, command_of, commands_of
from rmr1_jax.distributed.preemption import PREEMPTED, Preempted, Preemption
from rmr1_jax.errors import InputError, RunError, exit_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train and evaluate a small judge from scratch, in minutes, on any machine, or resume an interrupted run."""

    out: Path = Path("runs/quickstart")
    """Directory for the models, results.json and report.html."""
    seed: int = 0
    """Seed of the questions, the initial weights and the sampling."""
    control: bool = False
    """Also spend the time that GRPO took on more SFT, for comparison."""

    def run(self) -> None:
        from rmr1_jax.quickstart.plan import plan_text

        print(plan_text(self.out, control=self.control), file=sys.stderr, flush=True)
        with starting("loading JAX"):
            from rmr1_jax.quickstart.quickstart import quickstart

        quickstart(out=self.out, seed=self.seed, control=self.control)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about training runs (curves and traces), evaluations (scores and every judgement) or prepared
    data (lengths and sources)."""

    run_dirs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR [RUN_DIR ...]", help_behavior_hint="")]
    """Directories written by `rmr1`, or files written by `rmr1 judge`; the page compares them if there are several."""
    out: MaybePath = None
    """File to write. Defaults to report.html in the first directory, or to FILE.html beside a file FILE.jsonl."""

    def run(self) -> None:
        from rmr1_jax.report.report import found_below, write_report

        if not self.run_dirs:
            raise InputError("no run directory is given; expected rmr1 report RUN_DIR [RUN_DIR ...]")
        first = self.run_dirs[0]
        out = first.with_suffix(".html") if first.is_file() else first / "report.html"
        print(f"written: {write_report(self.run_dirs, self.out or out)}")
        if found := found_below(self.run_dirs):
            print(f"shows:   {', '.join(map(str, found))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Print a recipe: the settings of a published or tested run, with the command that takes them. Without a name, list
    the recipes."""

    name: Annotated[Positional[MaybeText], arg(metavar="[NAME]", help_behavior_hint="")] = None
    """Name of the recipe. `rmr1 sft NAME KEY=VALUE` and the like take it too, in place of a file."""

    def run(self) -> None:
        if self.name is None:
            print("\n".join(recipe_lines()))
        elif (path := find_config(Path(self.name))).is_file():
            print(path.read_text(encoding="utf-8"), end="")
        else:
            raise missing(path)


Command = Quickstart | Sft | Grpo | Plan | Judge | Eval | Score | Compare | Data | Config | Export | Report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `argv` defaults to `sys.argv[1:]`."""
    words = sys.argv[1:] if argv is None else list(argv)
    # Silences the warning that PyTorch is absent: only the tokenizers of Transformers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if words == ["--version"]:
            print(f"rmr1 {rmr1_jax.__version__}")
        else:
            command = _parse(words)
            with Preemption() as preemption, preemption.interruptible():
                command.run()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it once more at exit
        return 128 + signal.SIGPIPE
    except Preempted:
        print("stopped by SIGTERM; run the same command again to resume", file=sys.stderr)
        return PREEMPTED
    except (InputError, RunError) as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return exit_code(e)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


def _reader_is_gone() -> bool:
    """Returns whether stdout is a pipe whose reader has left it, as `head` does when it has enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _parse(words: list[str]) -> Any:
    """Returns the command that the words describe. Raises InputError for an unknown name, SystemExit for other mistakes
    and after a help text."""
    commands = commands_of(Command)
    check_words(commands, words)
    try:
        return tyro.cli(
            Command,
            prog="rmr1",
            description="Train and use reasoning reward models. For the options of a command: `rmr1 COMMAND --help`.",
            args=words,
            config=(FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes),
        )
    except SystemExit as left:
        command = command_of(commands, words)
        if not left.code and command and issubclass(command, ConfigCommand) and command.settings:
            print(command.settings_help())
        sys.stdout.flush()  # here, where a closed pipe is noticed
        raise
