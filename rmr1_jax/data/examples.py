"""From rows to training examples: the token ids of a prompt and its answer, and which of them are trained.

Next: `store.py`, which stores examples on disk; `packing.py`, which packs them into batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import locate
from rmr1_jax.model.tokenizer import TOKENIZER_FILES, Tokenizer, prompt_end
from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.pair import render_pair
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import Row
from rmr1_jax.pairs.training_sets import PublishedRow, read_published
from rmr1_jax.prompts.prompt import Messages, Prompt
from rmr1_jax.prompts.thought import continue_thought
from rmr1_jax.prompts.verdict import strict_verdict

Stage = Literal["sft", "grpo"]
Target = Literal["trace", "verdict"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One training row before packing.

    tokens: [T] int32. trained: [T] bool, True at the tokens that the loss trains (nowhere in a prompt for GRPO).
    source: "" if unknown. better: the better side or the one that the trace names, "A" or "B"; None if unknown.
    """

    id: str
    tokens: np.ndarray
    trained: np.ndarray
    source: str = ""
    better: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def load_tokenizer(model: str, chat_template_kwargs: Mapping[str, Any] | None = None) -> Tokenizer:
    """Load the tokenizer of a model, a directory or a hub id, without its weights."""
    return Tokenizer(locate(model, kind="model", patterns=TOKENIZER_FILES), chat_template_kwargs)


def read_training_rows(
    paths: Sequence[Path], prompt: Prompt | None, *, seed: int = 0, **reading: Any
) -> Iterator[PublishedRow]:
    """Read rendered rows from `paths`, or the pairs of the only path and render them with `prompt`. Raises InputError
    if a source holds no rows, pairs without a prompt, or rendered rows with one.

    Args:
        seed: decides the order of A and B of pairs that fix none. reading: rejects, report of `parse_rows`.
    """
    for path in paths:
        first = next((row for row in read_rows(path) if isinstance(row, Row)), None)
        if first is None:
            raise InputError(f"{path}: holds no rows")
        rendered = "context_messages" in first.value
        if rendered and prompt:
            raise InputError(f"{first.place}: these rows are rendered already; leave `prompt` out")
        if not rendered and not prompt:
            fields = ", ".join(map(repr, first.value))
            raise InputError(
                f"{first.place}: no rendered row (context_messages, winner), it has {fields}; for pairs set `prompt` "
                "(cor, reasoning, a file) of `rmr1 data prepare` or --prompt of `rmr1 data show`, or make traces of "
                "them with `rmr1 data chains`"
            )
    if prompt is None:
        yield from read_published(paths, **reading)
        return
    for pair in read_pairs(paths[0], seed=seed, **reading):
        both_empty = "both_empty" in pair.meta  # an error, and not one of the pairs that are dropped
        kind = "ties" if pair.tie else "identical_answers" if pair.identical and not both_empty else ""
        facts = {"better": pair.better, "both_empty": both_empty}
        source, messages = str(pair.meta.get("source") or ""), render_pair(prompt, pair)
        yield PublishedRow(id=pair.id, messages=messages, winner="", source=source, no_right_side=kind, meta=facts)


def sft_example(tokenizer: Tokenizer, id: str, messages: Messages, trace: str | None) -> Example:
    """Tokenize a rendered prompt, and a trace with the end of the turn, which are trained; None: the prompt alone.

    A thought that the chat template begins is not begun again. Raises InputError as `continue_thought` does.
    """
    prompt = tokenizer.render(messages)
    target: list[int] = []
    if trace is not None:
        written = continue_thought(prompt_end(tokenizer, prompt), trace)
        target = [*tokenizer.encode_trace(written), tokenizer.stop_ids[0]]
    trained = np.arange(len(prompt) + len(target)) >= len(prompt)
    return Example(id, np.asarray(prompt + target, np.int32), trained)


def make_example(tokenizer: Tokenizer, row: PublishedRow, stage: Stage | None, target: Target = "trace") -> Example:
    """Tokenize a row for a stage of training.

    Args:
        stage: "sft" gives the prompt and the target; "grpo" the prompt, of a row with a better side; None the prompt.
        target: what SFT trains: the row's "trace", or only the right "verdict" (the baseline without reasoning).

    Raises:
        InputError: the row lacks what the stage and the target need, or the chat template refuses it.
    """
    if row.better is None and (stage == "grpo" or (stage, target) == ("sft", "verdict")):
        what = "a trace as its winner and no field `better`" if row.trace else "no better side"
        raise InputError(f"row {row.id} has {what}; {stage} needs to know the better one (winner model_a or model_b)")
    trace = f"<answer>[[{row.better}]]</answer>" if target == "verdict" else row.trace or ""
    try:
        if row.meta.get("both_empty"):
            raise InputError("both answers are empty, there is nothing to judge")
        if stage == "sft" and not trace:
            raise InputError(
                "its winner is a side, and SFT learns a trace; give rows with traces, or prepare with target=verdict"
            )
        example = sft_example(tokenizer, row.id, row.messages, trace if stage == "sft" else None)
    except InputError as e:
        raise InputError(f"row {row.id}: {e}") from e
    return dataclasses.replace(example, source=row.source, better=row.better or strict_verdict(trace))
