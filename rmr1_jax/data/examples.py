"""A training example: token ids and which of them are trained."""

from __future__ import annotations

import dataclasses

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.pairs.training_sets import PublishedRow
from rmr1_jax.prompts.prompt import Messages, Prompt
from rmr1_jax.prompts.verdict import strict_verdict


@dataclasses.dataclass(frozen=True)
class Example:
    """One training row before packing. tokens: [T] int32. trained: [T] bool, True where the loss looks (nowhere in a
    prompt for GRPO). source: where the row is from, "" where it does not say. better: "A" or "B", the better
    side or the one that the trace names; None: not known."""

    id: str
    tokens: np.ndarray
    trained: np.ndarray
    source: str = ""
    better: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def sft_example(tokenizer: Tokenizer, id: str, messages: Messages, trace: str) -> Example:
    """An example for SFT: the rendered prompt, the trace and the end of the turn, of which the last two are trained."""
    prompt, target = tokenizer.render(messages), [*tokenizer.encode(trace), tokenizer.stop_ids[0]]
    trained = np.arange(len(prompt) + len(target)) >= len(prompt)
    return Example(id, np.asarray(prompt + target, np.int32), trained)


def make_example(
    tokenizer: Tokenizer,
    row: PublishedRow | PreferencePair,
    stage: str | None,
    target: str = "trace",
    prompt: Prompt | None = None,
) -> Example:
    """A row as it is trained on.

    Args:
        row: a rendered row, or a pair that is rendered with `prompt`. stage: "grpo": the prompt, and which side is
            better; "sft": the prompt and what is learnt; None: the prompt as it is, to look at. target: what SFT
            learns, the row's "trace", or the right "verdict" alone (the baseline without reasoning).

    Raises:
        InputError: the row does not have what the stage and target need, or the template refuses it.
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
    return Example(row.id, example.tokens, example.trained, source, better or strict_verdict(trace))
