"""Forced verdicts: the verdict of a judge that is stopped at a token budget and made to answer.

A text that is longer than a budget is cut there, an open thought is closed, and `<answer>[[` is appended; the likelier
of A and B is the verdict. The inference-compute curve of one run then shows what the judge knew at each budget, and not
only whether it had finished.

    OUT/forced.jsonl    one object for each judgement with a cut text: id, verdicts {budget: by order and vote}

Next: `lenses.py`, which computes the curve; `judge/scalar.py` for the batches.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from rmr1_jax.distributed.exchange import this_process
from rmr1_jax.distributed.mesh import rows_divisor
from rmr1_jax.distributed.rows import SharedRows
from rmr1_jax.eval.lenses import BUDGETS, FORCED, longest_text
from rmr1_jax.eval.logs import JUDGEMENTS, conversations, read_judgements
from rmr1_jax.files.append import settings_file
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.judge.file import put_in_order
from rmr1_jax.judge.judge import Judge
from rmr1_jax.judge.judgement import RULES
from rmr1_jax.judge.scalar import batches, last_states
from rmr1_jax.model.qwen import split
from rmr1_jax.model.tokenizer import completion_text
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.prompts.thought import after_thinking
from rmr1_jax.prompts.verdict import other_side
from rmr1_jax.sampler.weights import Weights, bind

ENDING = "\n<answer>[["
CLOSE = "\n</think>\n"  # closes an open thought
_BATCH = 64  # judgements that are computed and written at a time
_Place = tuple[int, str, int, int]  # (judgement, budget, order, vote)


class _Question(NamedTuple):
    """A cut text with the ending, and the two tokens that could follow it."""

    tokens: list[int]
    choices: tuple[int, int]  # A's and B's
    place: _Place


def force_verdicts(
    judge: Judge, out: Path, *, budgets: Sequence[int] = BUDGETS, batch_tokens: int = 16_384, progress: bool = True
) -> Path:
    """Write OUT/forced.jsonl for OUT/judgements.jsonl, which `judge` made; continue where a killed run stopped.
    Of several processes, each does its share.

    A text that fits in a budget, or names its winner before the cut by the judge's rule, keeps its verdict. A text
    whose prompt leaves no room for the ending has no verdict.

    Raises:
        InputError: OUT/forced.jsonl was made of other judgements.
    """
    path, side = out / FORCED, settings_file(out / JUDGEMENTS)
    settings = {"budgets": list(budgets), "ending": ENDING, "judgements": read_object(side)}
    index, count = this_process()
    done: set[str] = set()
    shared = {"parse": operator.itemgetter("id"), "add": done.add, "key": str, "command": "rmr1 eval"}
    rows = SharedRows(path, settings, **shared)
    bar = tqdm(desc="forced verdicts", unit="pair", disable=not progress or index > 0, dynamic_ncols=True)
    with rows.open(), bar:
        cut = (row for row in read_judgements(out / JUDGEMENTS) if longest_text(row) > min(budgets))
        own = itertools.islice(cut, index, None, count)
        todo = (row for row in own if row["id"] not in done)
        while batch := list(itertools.islice(todo, _BATCH)):
            rows.append(*_forced(judge, batch, budgets, batch_tokens))
            bar.update(len(batch))
        rows.finish(lambda: _put_in_order(out))
    return path


def _put_in_order(out: Path) -> None:
    """Put the rows of forced.jsonl in the order of the judgements."""
    numbers = {row["id"]: number for number, row in enumerate(read_judgements(out / JUDGEMENTS))}
    put_in_order(out / FORCED, lambda row: numbers[row["id"]])


def _forced(judge: Judge, rows: Sequence[Mapping[str, Any]], budgets: Sequence[int], batch_tokens: int) -> list[dict]:
    """The rows of forced.jsonl for these judgements."""
    verdicts = [{str(b): [list(own) for own in row["verdicts"]] for b in budgets} for row in rows]
    asked, known = [], []
    for number, row in enumerate(rows):
        for question in _questions(judge, row, number, budgets):
            (asked if isinstance(question, _Question) else known).append(question)
    for (number, budget, order, vote), verdict in (*known, *_answers(judge, asked, batch_tokens)):
        verdicts[number][budget][order][vote] = other_side(verdict) if order else verdict
    return [{"id": row["id"], "verdicts": own} for row, own in zip(rows, verdicts, strict=True)]


def _questions(
    judge: Judge, row: Mapping[str, Any], number: int, budgets: Sequence[int]
) -> Iterator[_Question | tuple[_Place, str | None]]:
    """The questions about a judgement's texts; (place, verdict) for a cut text that has a verdict or is too long."""
    tokenizer, read = judge.policy.tokenizer, RULES[judge.rule]
    chosen, rejected = conversations(dict(row))
    pair = PreferencePair.from_preference(row["id"], chosen, rejected, chosen_in_b=row["better"] == "B")
    for order, texts in enumerate(row["texts"]):
        prompt = tokenizer.render(render_pair(judge.prompt, pair.swapped() if order else pair))
        # A thought that the chat template opens is part of both the text and the prompt.
        opening = completion_text(tokenizer, prompt, [])
        for vote, text in enumerate(texts):
            written = tokenizer.encode_trace(text.removeprefix(opening))
            for budget in budgets:
                if row["tokens"][order][vote] <= budget:
                    continue
                place, begun = (number, str(budget), order, vote), written[:budget]
                cut = opening + tokenizer.decode(begun)
                thinking = after_thinking(cut) == len(cut) and not cut.endswith("</think>")
                ending, choices = _ending(tokenizer, CLOSE if thinking else "")
                question = _Question([*prompt, *begun, *ending], choices, place)
                if (known := read(cut)) or len(question.tokens) > judge.policy.config.max_length:
                    yield place, known
                else:
                    yield question


def _ending(tokenizer: Any, close: str) -> tuple[list[int], tuple[int, int]]:
    """The tokens that are appended after the cut, and the next token of A and of B, where their endings differ."""
    a, b = (tokenizer.encode_trace(f"{close}{ENDING}{letter}]]</answer>") for letter in "AB")
    same = next(k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[:same], (a[same], b[same])


def _answers(judge: Judge, asked: list[_Question], batch_tokens: int) -> Iterator[tuple[_Place, str]]:
    policy, rows = judge.policy, [question.tokens for question in asked]
    divisor, graphdef = rows_divisor(policy.mesh), split(policy.module)[0]
    for batch in batches(rows, longest=policy.config.max_length, batch_tokens=batch_tokens, divisor=divisor):
        choices = np.zeros((len(batch.counts), 2), np.int32)
        choices[: len(batch.numbers)] = [asked[number].choices for number in batch.numbers]
        with jax.set_mesh(policy.mesh):
            found = _logits(graphdef, policy.weights, *batch[1:], choices)
        for number, (a, b) in zip(batch.numbers, np.asarray(found).tolist(), strict=False):
            yield asked[number].place, "A" if a >= b else "B"


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _logits(
    graphdef: nnx.GraphDef, weights: Weights, tokens: jax.Array, counts: jax.Array, choices: jax.Array
) -> jax.Array:
    """tokens [B, T], counts [B], choices [B, 2] token ids -> their logits after each row, [B, 2] float32. From the
    sampler's weights: the judge has just sampled from them, so that no other copy is needed."""
    model, blocks = bind(graphdef, weights)
    dtype = weights["final_norm"].dtype
    last = last_states(model, tokens, counts, dtype=dtype, blocks=blocks)  # [B, D]
    weight, dims = model.output_weight.get_value(), model.output_weight.dims
    chosen = weight[choices] if dims == "VD" else jnp.moveaxis(weight[:, choices], 0, -1)  # [B, 2, D]
    return jnp.einsum("BD,BXD->BX", last, chosen, preferred_element_type=jnp.float32)
