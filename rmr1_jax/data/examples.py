"""From rows to training examples: the token ids of a prompt and its answer, and which of them are trained.

Rows are either rendered (`context_messages` and `winner`, as published) or pairs, which a prompt renders.

Next: `store.py`, which stores examples on disk; `packing.py`, which packs them into batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import locate
from rmr1_jax.model.tokenizer import TOKENIZER_FILES, Tokenizer
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import Row, read_rows
from rmr1_jax.pairs.training_sets import PublishedRow, read_published
from rmr1_jax.prompts.prompt import Messages, Prompt
from rmr1_jax.prompts.verdict import strict_verdict

Stage = Literal["sft", "grpo"]
Target = Literal["trace", "verdict"]
SourceRow = PublishedRow | PreferencePair  # a rendered row or a pair


@dataclasses.dataclass(frozen=True)
class Example:
    """One training row before packing.

    tokens: [T] int32. trained: [T] bool, True at the tokens that the loss trains (nowhere in a prompt for GRPO).
    source: where the row comes from, "" if unknown. better: the better side or the one that the trace names, "A" or
    "B"; None if unknown.
    """

    id: str
    tokens: np.ndarray
    trained: np.ndarray
    source: str = ""
    better: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def load_tokenizer(model: str) -> Tokenizer:
    """Load the tokenizer of a model, a directory or a hub id, without its weights."""
    return Tokenizer(locate(model, kind="model", patterns=TOKENIZER_FILES))


def first_row(path: Path) -> Row:
    """Read the first row of `path` that is valid JSON.

    Raises:
        InputError: there is none.
    """
    first = next((row for row in read_rows(path) if isinstance(row, Row)), None)
    if first is None:
        raise InputError(f"{path}: holds no rows")
    return first


def is_rendered(row: Row) -> bool:
    """Whether a row holds a rendered prompt; if not, it is a pair."""
    return "context_messages" in row.value


def read_source(paths: Sequence[Path], prompt: Prompt | None, *, seed: int = 0, **reading: Any) -> Iterator[SourceRow]:
    """Read rendered rows from `paths`, or with a prompt the pairs of its only path.

    Args:
        seed: decides the order of A and B of pairs that fix none. reading: rejects, report of `parse_rows`.
    """
    if prompt is None:
        return read_published(paths, **reading)
    return read_pairs(paths[0], seed=seed, **reading)


def sft_example(tokenizer: Tokenizer, id: str, messages: Messages, trace: str) -> Example:
    """Tokenize a rendered prompt, a trace and the end of the turn; the trace and the end of the turn are trained."""
    prompt, target = tokenizer.render(messages), [*tokenizer.encode(trace), tokenizer.stop_ids[0]]
    trained = np.arange(len(prompt) + len(target)) >= len(prompt)
    return Example(id, np.asarray(prompt + target, np.int32), trained)


def make_example(
    tokenizer: Tokenizer,
    row: SourceRow,
    stage: Stage | None,
    target: Target = "trace",
    prompt: Prompt | None = None,
) -> Example:
    """Tokenize a row for a stage of training.

    Args:
        row: a rendered row, or a pair, which `prompt` renders.
        stage: "sft" gives the prompt and the target; "grpo" the prompt, which needs a better side; None the prompt
            alone, to look at.
        target: what SFT trains: the row's "trace", or only the right "verdict" (the baseline without reasoning).

    Raises:
        InputError: the row lacks what the stage and the target need, or the chat template refuses it.
    """
    pair = isinstance(row, PreferencePair)
    source = str(row.meta.get("source") or "") if pair else row.source
    better = row.better
    if (stage == "grpo" or (stage, target) == ("sft", "verdict")) and better is None:
        what = "no better side" if pair else "a trace as its winner and no field `better`"
        raise InputError(f"row {row.id} has {what}; {stage} needs to know the better one (winner model_a or model_b)")
    if pair and row.meta.get("both_empty"):
        raise InputError(f"row {row.id}: both answers are empty, there is nothing to judge")
    messages = render_pair(prompt, row) if pair else row.messages
    try:
        if stage != "sft":
            tokens = np.asarray(tokenizer.render(messages), np.int32)
            return Example(row.id, tokens, np.zeros(len(tokens), bool), source, better)
        trace = f"<answer>[[{better}]]</answer>" if target == "verdict" else row.trace
        if trace is None:
            raise InputError(
                "its winner is a side, and SFT learns a trace; give rows with traces, or prepare with target=verdict"
            )
        example = sft_example(tokenizer, row.id, messages, trace)
    except InputError as e:
        raise InputError(f"row {row.id}: {e}") from e
    return dataclasses.replace(example, source=source, better=better or strict_verdict(trace))
