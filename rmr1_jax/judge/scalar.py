"""Scalar reward models (Qwen2ForSequenceClassification, one label) as judges: the answer with the larger score wins.

    judge = ScalarJudge(load_scalar("owner/name"))
    judge.compare_many(pairs)[0].scores

A conversation is rendered as a whole by the model's own chat template, and its score is computed from its last token,
as Transformers does.

Next: `judgement.py` for the interface of a judge; `eval/forced.py`, which uses the batches too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rmr1_jax.distributed.mesh import rows_divisor
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.judge.judgement import AnyJudge, Judgement, Voting, both_empty, count_votes, too_long
from rmr1_jax.model import hf
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Params, ScalarQwen, Transformer, split, with_params
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.pairs.pair import Message, PreferencePair
from rmr1_jax.policy import DTYPES, model_text, open_model, settled_dtype
from rmr1_jax.prompts.verdict import Verdict
from rmr1_jax.sampler.layout import local_layout

SHORTEST = 64  # tokens of the shortest batch


class Batch(NamedTuple):
    """Rows of tokens with padding on the right and below. numbers: indices of the rows, at most B; tokens: [B, T]
    int32; counts: [B] int32, the number of real tokens of each row."""

    numbers: list[int]
    tokens: np.ndarray
    counts: np.ndarray


def padded_length(length: int, longest: int) -> int:
    """The length that a row is padded to: 2^k or 1.5 x 2^k, so that at most a third is padding; at most `longest`."""
    power = SHORTEST << max(0, math.ceil(math.log2(length / SHORTEST)))
    shorter = power * 3 // 4
    return min(shorter if power > SHORTEST and length <= shorter else power, longest)


def batches(rows: Sequence[Sequence[int]], *, longest: int, batch_tokens: int, divisor: int = 1) -> Iterator[Batch]:
    """Batches of all rows, the longest rows first, so that memory runs out in the first batch or never.

    Args:
        rows: token ids, each 1 to `longest` long. batch_tokens: B x T of a batch, roughly. divisor: B is a multiple.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_length[padded_length(len(row), longest)].append(number)
    for length in sorted(by_length, reverse=True):
        size = max(1, batch_tokens // length // divisor) * divisor
        for first in range(0, len(by_length[length]), size):
            numbers = by_length[length][first : first + size]
            tokens, counts = np.zeros((size, length), np.int32), np.ones(size, np.int32)
            for place, number in enumerate(numbers):
                counts[place] = len(rows[number])
                tokens[place, : counts[place]] = rows[number]
            yield Batch(numbers, tokens, counts)


def last_states(model: Transformer, tokens: jax.Array, counts: jax.Array, **options: Any) -> jax.Array:
    """tokens [B, T] int32, of which the first counts [B] of each row are real -> [B, D]. To be jitted. options: those
    of `hidden_states`."""
    segment_ids = (jnp.arange(tokens.shape[1]) < counts[:, None]).astype(jnp.int32)  # [B, T]
    x = model.hidden_states(tokens, segment_ids=segment_ids, **options)  # [B, T, D]
    return jnp.take_along_axis(x, counts[:, None, None] - 1, axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class ScalarModel:
    """A scalar reward model with its tokenizer on a mesh; `dtype` is what the matrix products run in."""

    model: ScalarQwen
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: str = "float32"

    def __repr__(self) -> str:
        return f"ScalarModel({model_text(self.model, self.dtype, self.mesh)})"

    @property
    def config(self) -> QwenConfig:
        return self.model.config

    def render(self, conversation: Sequence[Message]) -> list[int]:
        """Render a conversation that ends with the answer by the model's chat template; returns token ids."""
        return self.tokenizer.render([message._asdict() for message in conversation], answered=True)

    def score(self, rows: Sequence[Sequence[int]], *, batch_tokens: int = 16_384) -> Iterator[tuple[int, float]]:
        """Yield (index of the row, its score) for rows of at most `config.max_length` tokens; see `batches`."""
        divisor = rows_divisor(self.mesh)
        for batch in batches(rows, longest=self.config.max_length, batch_tokens=batch_tokens, divisor=divisor):
            with jax.set_mesh(self.mesh):
                found = _scores(*split(self.model), batch.tokens, batch.counts, dtype=DTYPES[self.dtype])
            yield from zip(batch.numbers, np.asarray(found)[: len(batch.numbers)].tolist(), strict=True)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _scores(graphdef: nnx.GraphDef, params: Params, tokens: jax.Array, counts: jax.Array, *, dtype) -> jax.Array:
    """[B, T], [B] -> [B] float32; see `last_states`."""
    model = nnx.merge(graphdef, params)
    return model(last_states(model, tokens, counts, dtype=dtype))


def load_scalar(
    model: str | Path,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    *,
    tensor: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ScalarModel:
    """Load a scalar reward model from a Hugging Face directory or a hub id. For the arguments see `policy.load`.

    Raises:
        InputError: not a directory or a reachable hub id, another architecture, several labels, or weights that are not
            those of the config (all differences at once); or `tensor` does not divide the number of devices, or the
            devices are too small for the weights.
    """
    dtype = settled_dtype(dtype, mesh)
    directory, config, tokenizer = open_model(model, dtype, scalar=True, chat_template_kwargs=chat_template_kwargs)
    declared = ScalarQwen(config)
    mesh = local_layout(declared, DTYPES[dtype], mesh, tensor)
    params = hf.load_params(directory, declared, dtype=DTYPES[dtype], mesh=mesh)
    return ScalarModel(with_params(declared, params), tokenizer, mesh, dtype)


class ScalarJudge(AnyJudge):
    """Scores each answer by itself; the larger score wins, and equal scores are a tie.

    batch_tokens: positions that are computed at a time, padding included. It bounds memory.
    """

    whole_batches = False  # a score does not depend on the rows beside it

    def __init__(self, model: ScalarModel, *, batch_tokens: int = 16_384):
        if batch_tokens < 1:
            raise InputError(f"batch_tokens={batch_tokens} must be at least 1")
        self.model, self.batch_tokens = model, batch_tokens

    def __repr__(self) -> str:
        return f"ScalarJudge({self.model})"

    def stream(self, pairs: Sequence[PreferencePair], voting: Voting) -> Iterator[tuple[int, Judgement]]:
        """Yield (index of the pair, its judgement) as they are made.

        Raises:
            InputError: several votes or both orders. RunError: a score that is not finite.
        """
        self.settings(voting)
        rows: dict[tuple[int, ...], int] = {}  # a conversation that several pairs share is scored once
        sides: dict[int, tuple[int, int]] = {}  # the two rows of each pair
        waiting: dict[int, list[int]] = defaultdict(list)  # the pairs of each row
        for number, pair in enumerate(pairs):
            own = [self.model.render(conversation) for conversation in (pair.conversation_a, pair.conversation_b)]
            if found := both_empty(pair) or too_long("a conversation", own, self.model.config.max_length):
                yield number, found
            else:
                a, b = (rows.setdefault(tuple(ids), len(rows)) for ids in own)
                sides[number] = a, b
                for row in {a, b}:
                    waiting[row].append(number)
        scores: dict[int, float] = {}
        for row, score in self.model.score(list(rows), batch_tokens=self.batch_tokens):
            if not math.isfinite(score):
                raise RunError(f"pair {pairs[waiting[row][0]].id!r}: its score is {score}; try --dtype float32")
            scores[row] = score
            for number in waiting[row]:
                a, b = sides[number]
                if a in scores and b in scores:
                    yield number, _judgement(scores[a], scores[b])

    def settings(self, voting: Voting) -> dict[str, Any]:
        if voting.votes != 1 or voting.both_orders:
            raise InputError(
                "a scalar reward model scores each answer by itself; give it neither votes nor both orders"
            )
        arguments = dict(self.model.tokenizer.chat_template_kwargs)
        found = {"kind": "scalar", "max_tokens": self.model.config.max_length}
        return found | ({"chat_template_kwargs": arguments} if arguments else {})


def _judgement(a: float, b: float) -> Judgement:
    winner: Verdict = None if a == b else "A" if a > b else "B"
    votes = count_votes([winner] if winner else [])
    return Judgement(winner=winner, status="ok" if winner else "tie", votes=votes, scores=(a, b))
