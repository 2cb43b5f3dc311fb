"""The commands `rmr1 data ...`: each is a dataclass with its options and a `run` that calls the library.

Next: `cli.py`, which collects them; the modules of `data/`, which they call.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress, arg, subcommand

from rmr1_jax.cli.options import ConfigFile, MaybeText, Overrides
from rmr1_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPrompt:
    """Recover the exact prompt of a published checkpoint from rows it was trained on."""

    rows: Path
    """Published training rows (context_messages, winner) as JSONL, JSON or Parquet."""
    out: Path
    """The prompt file to write, for `--prompt`."""

    def run(self) -> None:
        from rmr1_jax.pairs.training_sets import read_published
        from rmr1_jax.prompts.prompt import save_prompt
        from rmr1_jax.prompts.recover import recover_prompt

        rows = [row.messages for row in read_published(self.rows)]
        try:
            prompt = recover_prompt(rows, name=self.out.stem)
        except InputError as e:
            raise InputError(f"{self.rows}: {e}") from e
        save_prompt(prompt, self.out)
        print(f"{prompt.note}\nwritten: {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataMix:
    """Mix preference sets into the pairs to train on: filtered, drawn, deduplicated, shuffled, A and B in balance."""

    config: ConfigFile
    """The mixture's sources and seed; configs/mixture_rm_r1.yaml is the paper's."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. out=mixture seed=1 sources.0.path=skywork.parquet"""

    def run(self) -> None:
        from rmr1_jax.config import load_config
        from rmr1_jax.data.mix.mixture import MixtureConfig, mix

        config = load_config(MixtureConfig, self.config, self.overrides)
        report = mix(config)
        print(f"{report.table()}\nwritten: {config.out}/pairs.jsonl, {config.out}/mixture.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataChains:
    """Reasoning chains from a teacher, in two passes. A killed run goes on where it stopped: run the same command."""

    config: ConfigFile
    """The run's settings; configs/chains.yaml is one."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. pairs=mixture/pairs.jsonl out=chains teacher.model=NAME"""

    def run(self) -> None:
        from rmr1_jax.config import load_config
        from rmr1_jax.data.chains.chains import make_chains, read_known_pairs
        from rmr1_jax.data.chains.config import ChainsConfig
        from rmr1_jax.endpoint import Endpoint

        config = load_config(ChainsConfig, self.config, self.overrides)
        pairs = read_known_pairs(config)  # before a model is loaded: a bad row shows now
        second = Endpoint(config.second) if config.second else None
        if config.policy:
            from rmr1_jax.data.chains.policy_teacher import PolicyTeacher
            from rmr1_jax.policy import load

            teacher = PolicyTeacher(config.policy, load(config.policy.model, config.policy.dtype))
        else:
            teacher = Endpoint(config.teacher)
        ledger = make_chains(config, pairs, teacher, second)
        print(f"{ledger}\nwritten: {config.out}/chains.jsonl, {config.out}/ledger.json")
        if ledger.open:
            print("the budget is spent; the same command with a larger one goes on")
        else:
            print(f"next:    rmr1 sft CONFIG.yaml data={config.out}/chains.jsonl model=MODEL out=DIR")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPrepare:
    """Tokenise rows for training, once: a prepared set, which `rmr1 sft` and `rmr1 grpo` read by random access."""

    config: ConfigFile
    """The set's settings; configs/prepare_sft.yaml and configs/prepare_grpo.yaml name them."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. out=prepared/sft workers=16"""

    def run(self) -> None:
        from rmr1_jax.config import load_config
        from rmr1_jax.data.prepare import PrepareConfig, prepare, summary_line

        config = load_config(PrepareConfig, self.config, self.overrides)
        print(summary_line(prepare(config)))
        print(f"written: {config.out}\nnext:    rmr1 {config.stage} CONFIG.yaml data={config.out} model={config.model}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShow:
    """Print rows as the model will see them, the trained tokens marked."""

    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """A prepared set, rendered rows (context_messages, winner), or pairs."""
    model: MaybeText = None
    """Whose tokenizer, a directory or hub id. A prepared set knows its own."""
    prompt: MaybeText = None
    """For pairs: cor, reasoning, compare, rubric, or a prompt file."""
    count: Annotated[int, arg(aliases=["-n"])] = 3
    """Rows to print, from the first on."""

    def run(self) -> None:
        from rmr1_jax.data.show import show

        colour = sys.stdout.isatty()
        for text in show(self.path, model=self.model, prompt=self.prompt, count=self.count, colour=colour):
            print(text)


# Without the second, hidden member this would be no choice, and its options would belong to `data` itself.
DataAction = (
    Annotated[DataMix, subcommand("mix")]
    | Annotated[DataChains, subcommand("chains")]
    | Annotated[DataPrepare, subcommand("prepare")]
    | Annotated[DataShow, subcommand("show")]
    | Annotated[DataPrompt, subcommand("prompt")]
    | Annotated[None, Suppress]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Make training data: mix preference sets, ask for chains, tokenise, look at rows, recover a published prompt."""

    action: Annotated[DataAction, arg(name="")]

    def run(self) -> None:
        self.action.run()
