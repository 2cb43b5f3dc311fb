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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from rmr1_jax.cli_data import Data
from rmr1_jax.cli_eval import Compare, Eval, Score
from rmr1_jax.cli_options import ConfigFile, Dtype, MaybeFloat, MaybeInt, MaybePath, MaybeText, Overrides
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.preemption import PREEMPTED, Preempted, Preemption


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
        from rmr1_jax.quickstart import quickstart

        quickstart(out=self.out, seed=self.seed, control=self.control)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Stage one: distil reasoning traces into a model. A killed run goes on from its last checkpoint."""

    config: ConfigFile
    """The run's settings; configs/ has one file for each run."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. out=runs/sft optimizer.lr=1e-5"""

    def run(self) -> None:
        from rmr1_jax.config import load_config
        from rmr1_jax.train.sft import SftConfig, sft

        config = load_config(SftConfig, self.config, self.overrides)
        _train(sft, config, f"rmr1 grpo CONFIG.yaml model={config.out}/model out=DIR")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Stage two: reinforcement learning with a verifiable reward. A killed run goes on from its last checkpoint."""

    config: ConfigFile
    """The run's settings; configs/ has one file for each run."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. out=runs/grpo optimizer.lr=1e-6"""

    def run(self) -> None:
        from rmr1_jax.config import load_config
        from rmr1_jax.train.grpo import GrpoConfig, grpo

        config = load_config(GrpoConfig, self.config, self.overrides)
        _train(grpo, config, f"rmr1 judge --model {config.out}/model --input F --output F")


def _train(stage: Callable[[Any], Any], config: Any, then: str) -> None:
    """Run a stage with the other processes of the run, if there are any; and say which command comes next."""
    from rmr1_jax.processes import first, together

    with together():
        stage(config)
        if first():
            print(f"trained: {config.out}/model\nnext:    {then}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes on a TPU slice that is not there, by compiling its programs for it. Needs the extra `tpu`."""

    config: ConfigFile
    """The run's settings, of `rmr1 sft` or of `rmr1 grpo`."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. micro_rows=64 mesh.tensor=4"""
    topology: str
    """The slice: v5e:16x16, v6e:4x4 (two dimensions), v5p:4x4x4 (three)."""
    slices: int = 1
    """Slices, the replicas of one another."""
    sampler_only: bool = False
    """A GRPO run's sampler with nothing of training beside it, as a judge has it."""
    json: bool = False
    """Print a list of JSON objects instead of a table."""

    def run(self) -> None:
        from rmr1_jax.plan import print_plan

        options = {"topology": self.topology, "slices": self.slices, "sampler_only": self.sampler_only}
        print_plan(self.config, self.overrides, **options, as_json=self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePairs:
    """Judge a file of pairs. A killed run goes on where it stopped: run the same command again."""

    model: str
    """A Hugging Face directory (such as RUN/model), or a hub id."""
    input: Path
    """Pairs as JSONL, JSON or Parquet: our own rows, RewardBench, RM-Bench or RMB."""
    output: Path
    """JSONL to write, one row a pair: id, winner, status, votes, text, and correct where the better answer is known."""
    prompt: str = "cor"
    """cor, reasoning, compare, rubric, or a prompt file (`rmr1 data prompt` makes one for a published checkpoint)."""
    votes: int = 1
    """Texts for each pair and order; the majority of the valid verdicts wins."""
    both_orders: bool = False
    """Ask about (A, B) and about (B, A); a tie where the two disagree."""
    rule: Literal["strict", "eval"] = "strict"
    """How a verdict is read; eval is the published rule."""
    temperature: MaybeFloat = None
    """Of the sampling. Default: 0 (greedy) for one vote, 1 for several."""
    max_new_tokens: MaybeInt = None
    """Of one text. Default: 8192, or half of the model's positions where that is less."""
    max_prompt_tokens: MaybeInt = None
    """Pairs with a longer prompt are not asked: status too_long. Default: what the model's positions leave."""
    seed: int = 0
    """Of the sampling, and of the order in which chosen and rejected answers are shown."""
    batch_size: int = 1024
    """Pairs handed to the judge at a time; a killed run judges the batch that it was in again."""
    dtype: Dtype = "bfloat16"
    """Of the model's arithmetic."""
    rejects: MaybePath = None
    """JSONL for rows that cannot be read, with the reasons; without it, such a row is an error."""

    def run(self) -> None:
        from rmr1_jax.data.appending import files_digest, model_digest
        from rmr1_jax.data.containers import source_files
        from rmr1_jax.data.preferences import ReadReport, read_pairs
        from rmr1_jax.judge import Judge
        from rmr1_jax.judge_file import judge_file
        from rmr1_jax.policy import load
        from rmr1_jax.prompts.cor import get_prompt

        prompt = get_prompt(self.prompt)
        on_bad_row = "error" if self.rejects is None else "quarantine"
        reading = {"seed": self.seed, "on_bad_row": on_bad_row, "rejects": self.rejects}
        report = ReadReport()
        # All rows are read once before the model is: a bad one shows now, not after hours.
        total = sum(1 for _ in read_pairs(self.input, report=report, **reading))
        if report.rejected:
            print(f"{report}: see {self.rejects}", file=sys.stderr)
        policy = load(self.model, self.dtype)
        judge = Judge(
            policy,
            prompt,
            rule=self.rule,
            max_new_tokens=self.max_new_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            temperature=self.temperature,
        )
        directory = policy.tokenizer.directory
        weights = model_digest(directory)
        summary = judge_file(
            judge,
            read_pairs(self.input, **reading),
            self.output,
            votes=self.votes,
            both_orders=self.both_orders,
            seed=self.seed,
            batch_size=self.batch_size,
            total=total,
            identity={
                "model": f"{Path(self.model).name} (sha256 {weights})",
                "dtype": self.dtype,
                "input": f"{self.input.name} (sha256 {files_digest(source_files(self.input))})",
            },
        )
        print(f"{summary}\nwritten: {self.output}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the newest checkpoint of a run as a Hugging Face directory, while the run goes on or after it."""

    checkpoint: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """The directory of a run of `rmr1 sft` or `rmr1 grpo`."""
    out: Path
    """The directory to write."""
    model: MaybeText = None
    """Where the architecture and the tokenizer are from; by default the model that the run's config.yaml names."""
    dtype: Dtype = "bfloat16"
    """Of the weights in the files."""

    def run(self) -> None:
        import jax

        from rmr1_jax.policy import load
        from rmr1_jax.train.checkpoint import restore_params

        policy = load(self.model or self._model_of_run(), self.dtype)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), policy.params)
        policy = policy.with_params({})  # the old weights go before the new ones come
        policy.with_params(restore_params(self.checkpoint, like)).save(self.out)
        print(f"written: {self.out}")

    def _model_of_run(self) -> str:
        import yaml

        path = self.checkpoint / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as e:
            raise InputError(f"{self.checkpoint} is not a run directory: {path} cannot be read ({e})") from e
        model = config.get("model") if isinstance(config, dict) else None
        if not model:
            raise InputError(f"{path} names no model; give --model, a directory with its config.json and tokenizer")
        return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One HTML file about training runs (curves, traces) or evaluations (scores, every judgement)."""

    run_dirs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR [RUN_DIR ...]", help_behavior_hint="")]
    """Directories that `rmr1` wrote to; several are compared."""
    out: MaybePath = None
    """The file to write; by default report.html in the first directory."""

    def run(self) -> None:
        from rmr1_jax.eval.compare import compare
        from rmr1_jax.report import write_report

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
