"""The commands `rmr1 data ...`: each is a dataclass with its options and a `run` that calls the library.

Next: `cli.py`, which collects them; the modules of `data/`, which they call.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Suppress, arg, subcommand

from rmr1_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPrompt:
    """Recover the exact prompt of a published checkpoint from rows it was trained on."""

    rows: Path
    """Published training rows (context_messages, winner) as JSONL, JSON or Parquet."""
    out: Path
    """The prompt file to write, for `--prompt`."""

    def run(self) -> None:
        from rmr1_jax.data.published import read_published
        from rmr1_jax.prompts.cor import recover_prompt, save_prompt

        rows = [row.messages for row in read_published(self.rows)]
        try:
            prompt = recover_prompt(rows, name=self.out.stem)
        except InputError as e:
            raise InputError(f"{self.rows}: {e}") from e
        save_prompt(prompt, self.out)
        print(f"{prompt.note}\nwritten: {self.out}")


# Without the second, hidden member this would be no choice, and its options would belong to `data` itself.
DataAction = Annotated[DataPrompt, subcommand("prompt")] | Annotated[None, Suppress]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Prepare data: recover a published prompt."""

    action: Annotated[DataAction, arg(name="")]

    def run(self) -> None:
        self.action.run()
