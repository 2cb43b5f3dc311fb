"""The commands `rmr1 data ...`. Read next: the modules of `data/`, which they call."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

from rmr1_jax.cli.options import (
    ConfigCommand,
    MaybeText,
    TemplateArguments,
    all_processes,
    template_arguments,
    template_setting,
)
from rmr1_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Recover the exact prompt of a published checkpoint from its published training rows."""

    rows: Path
    """Published training rows (context_messages, winner): a JSONL, JSON or Parquet file, or a folder of them."""
    out: Path
    """Prompt file to write, for the option --prompt of other commands."""

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
class Mix(ConfigCommand):
    """Combine preference data sets into training pairs: filtered, sampled, deduplicated, shuffled, balanced."""

    settings = "data.mix.mixture:MixtureConfig"

    def run(self) -> None:
        from rmr1_jax.data.mix.mixture import mix

        config = self.load()
        table = mix(config).table()
        files = ("pairs.jsonl", *(["held_out.jsonl"] if config.held_out else []), "mixture.json")
        print(f"{table}\nwritten: {', '.join(f'{config.out}/{name}' for name in files)}")
        print(f"next:    rmr1 data chains CONFIG.yaml pairs={config.out}/pairs.jsonl out=DIR")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chains(ConfigCommand):
    """Generate reasoning traces with a teacher model, correct wrong ones, or resume an interrupted run."""

    settings = "data.chains.chains:ChainsConfig"

    def run(self) -> None:
        from rmr1_jax.data.chains.chains import make_chains, read_known_pairs
        from rmr1_jax.endpoint import Endpoint

        config = self.load()
        pairs = read_known_pairs(config)  # reports a bad row before a model is loaded
        with all_processes(loads_model=config.policy is not None) as first:
            second = Endpoint(config.second) if config.second else None
            if config.policy:
                from rmr1_jax.data.chains.policy_teacher import PolicyTeacher
                from rmr1_jax.policy import load

                asked = config.policy
                arguments = {"tensor": asked.tensor, "chat_template_kwargs": asked.chat_template_kwargs}
                teacher = PolicyTeacher(asked, load(asked.model, asked.dtype, **arguments))
            else:
                teacher = Endpoint(config.teacher)
            ledger = make_chains(config, pairs, teacher, second)
            if first:
                print(f"{ledger}\nwritten: {config.out}/chains.jsonl, {config.out}/ledger.json")
                if not ledger.open and not ledger.accepted:
                    print("no chain was accepted, so there is nothing to train on", file=sys.stderr)
                elif ledger.open:
                    print("the budget is spent; to continue, run the same command with a larger one")
                else:
                    print(f"next:    rmr1 sft CONFIG.yaml data={config.out}/chains.jsonl model=MODEL out=DIR")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(ConfigCommand):
    """Tokenise training rows once, in parallel, into a data set that `rmr1 sft` and `rmr1 grpo` read quickly."""

    settings = "data.prepare:PrepareConfig"

    def run(self) -> None:
        from rmr1_jax.data.prepare import prepare, summary_line

        config = self.load()
        print(summary_line(prepare(config)))
        more = template_setting(config.chat_template_kwargs)
        command = f"rmr1 {config.stage} CONFIG.yaml data={config.out} model={config.model}{more}"
        print(f"written: {config.out}\nnext:    {command}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Print rows as the model sees them, and mark the tokens that are trained on."""

    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """A prepared data set, published training rows (context_messages, winner), or a file of pairs."""
    model: MaybeText = None
    """Directory or hub id of the model whose tokenizer to use. A prepared data set records its own."""
    prompt: MaybeText = None
    """Prompt to render pairs with: cor, reasoning, compare, rubric, or a prompt file."""
    count: Annotated[int, arg(aliases=["-n"])] = 3
    """Number of rows to print, from the beginning."""
    chat_template_kwargs: TemplateArguments = None
    """Arguments for the model's chat template, as JSON. A prepared data set records its own."""

    def run(self) -> None:
        from rmr1_jax.data.show import show

        colour = sys.stdout.isatty()
        arguments = self.chat_template_kwargs and template_arguments(self.chat_template_kwargs)
        options = {"model": self.model, "prompt": self.prompt, "chat_template_kwargs": arguments}
        for text in show(self.path, **options, count=self.count, colour=colour):
            print(text)


# The hidden member `None` makes tyro treat this as a choice of subcommands; without it, their options would become
# options of `data` itself.
Action = Mix | Chains | Prepare | Show | Prompt | Annotated[None, Suppress]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Make training data: mix data sets, generate traces, tokenise, look at rows, recover a published prompt."""

    action: Annotated[Action, arg(name="")]

    def run(self) -> None:
        self.action.run()
