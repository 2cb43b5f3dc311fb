"""Micro-batches: the arrays of an optimizer step, from examples (SFT) or from scored samples (GRPO).

`to_micro_batches` is SFT's. GRPO's `mini_batch` first lists the trajectories, then plans from their lengths alone which
row holds which (by default a group's prompt once: `data/groups.py`), and only then assembles the rows of this process.
Next: `logprobs.py`, what a step computes of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from rmr1_jax.data.groups import pack_groups
from rmr1_jax.data.packing import Batch, View, assemble, lengths_of, pack, row_lengths
from rmr1_jax.distributed.mesh import own_rows, place_rows
from rmr1_jax.distributed.terminal import say
from rmr1_jax.sampler.sample import Sample
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.logprobs import trained_places
from rmr1_jax.train.losses import aggregation_weights
from rmr1_jax.train.optim import Stack
from rmr1_jax.train.rollout import Group


def drop_longer(examples: Sequence[Any], limit: int, name: str) -> Sequence[Any]:
    """Drop what is longer than `limit` tokens, and print its number. `name` says what it is. Nothing is truncated."""
    fits = lengths_of(examples) <= limit
    if not fits.all():
        say(f"dropped {(~fits).sum()} of {len(examples)} {name} longer than {limit} tokens")
    return View(examples, fits.nonzero()[0])


def to_micro_batches(batch: Batch, micro_rows: int, mesh: Mesh) -> tuple[list[Stack], dict[str, Any]]:
    """The rows of a batch as arrays [A, micro_rows, T] on the mesh, for each T, with weights that average the loss over
    the trained tokens of the whole step; and facts about the batch for the metrics."""
    stacks, own = [], len(own_rows(mesh, micro_rows))
    for rows in batch.rows:
        arrays = dict(rows.arrays)
        arrays["weights"] = arrays.pop("trained") / max(1, batch.trained_tokens)
        arrays = {k: v.reshape(-1, own, v.shape[-1]) for k, v in arrays.items()}
        arrays = place_rows(mesh, "ABT", _with_trained_places(arrays, rows.most_trained), micro_rows)
        stacks.append((arrays, -(-rows.used // micro_rows)))
    tokens = sum(batch.lengths)
    facts = {"tokens": tokens, "trained_tokens": batch.trained_tokens, "packed": tokens / positions_of(stacks)}
    return stacks, facts


def positions_of(stacks: Sequence[Stack]) -> int:
    """The positions that an update computes, padding included."""
    return sum(count * math.prod(arrays["tokens"].shape[1:]) for arrays, count in stacks)


def _with_trained_places(arrays: dict[str, np.ndarray], most: int) -> dict[str, np.ndarray]:
    """Add `trained_at`, for `trained_logprobs`, where the head then reads less."""
    places = trained_places(arrays["weights"] > 0, most)
    return arrays if places is None else arrays | {"trained_at": places}


class MiniBatch(NamedTuple):
    """The data of one GRPO update.

    stacks: for each length T of rows, arrays [A, B, T]: tokens, positions, segment_ids and, where prompts are shared,
    parents int32; weights, advantages, sampler_logp float32; and perhaps trained_at [A, B, S] int32 (see
    `trained_places`). A is a power of two: few shapes, few compilations. Beside them, how many of the A micro-batches
    hold anything, at least 1. lengths, starts: the tokens of each segment in them, of all processes, and the position
    of its first token.
    """

    stacks: list[Stack]
    lengths: list[int]
    starts: list[int]


class Segment(NamedTuple):
    """A segment of a row before its arrays are made: tokens `begin` to the end of a prompt and its response. parent:
    the number of the segment before it in the row whose tokens it sees too, from 1; 0 for none. prompt_only: the
    segment has no response, and not the prompt's last token, with which that of a response begins."""

    trajectory: int
    begin: int = 0
    parent: int = 0
    prompt_only: bool = False


class Trajectory(NamedTuple):
    """A prompt, [T] int32, with one of its responses."""

    prompt: np.ndarray
    sample: Sample
    advantage: np.float32

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.sample.token_ids)

    def tokens_of(self, segment: Segment) -> slice:
        """The tokens of the prompt with its response that a segment holds."""
        return slice(segment.begin, len(self.prompt) - 1 if segment.prompt_only else self.length)

    def packed(self, segment: Segment, weight: np.float32) -> SimpleNamespace:
        """The arrays of a segment to pack: tokens, and weights, advantages and log-probabilities, 0 on the prompt."""
        response, where = np.asarray(self.sample.token_ids, np.int32), self.tokens_of(segment)
        values = {"weights": weight, "advantages": self.advantage, "sampler_logp": self.sample.sampled_logprobs}
        before = np.zeros(len(self.prompt), np.float32)
        arrays = {k: np.concatenate([before, np.broadcast_to(v, len(response))]) for k, v in values.items()}
        arrays |= {"tokens": np.concatenate([self.prompt, response])}
        arrays = {name: values[where] for name, values in arrays.items()}
        return SimpleNamespace(first=segment.begin, parent=segment.parent, **arrays)


def mini_batch(
    groups: Sequence[Group],
    config: GrpoConfig,
    *,
    skip_unmixed: bool,
    own: Sequence[int] | None = None,
    max_separate: float | None = None,
) -> MiniBatch:
    """Pack the trajectories of one update.

    skip_unmixed: leave out trajectories whose advantage is zero. Their policy term and its gradient are exactly zero,
    so where the loss has no other term this saves their computation and changes nothing. They still count in averages,
    and are kept where the average is over what is in a micro-batch. own: the rows of each micro-batch that this process
    assembles; None: all `config.micro_rows`. max_separate: see `pack_groups`.
    """
    trajectories = [
        Trajectory(g.prompt.tokens, *each) for g in groups for each in zip(g.samples, g.advantages, strict=True)
    ]
    responses = np.asarray([len(t.sample.token_ids) for t in trajectories])
    keep_all = not skip_unmixed or config.aggregation == "micro_batch"
    kept = [i for i, t in enumerate(trajectories) if keep_all or t.advantage != 0]
    options = {"max_items": config.max_segments}
    if config.share_prompts:
        options |= {"max_separate": max_separate}

    short = config.short_rows or 0
    if config.share_prompts:
        groups_of = np.repeat(np.arange(len(groups)), [len(g.samples) for g in groups])
        sizes = np.bincount(groups_of[kept], 1 + responses[kept], len(groups)) + [
            len(g.prompt.tokens) - 1 for g in groups
        ]
        long = [i for i in kept if sizes[groups_of[i]] > short]
    else:
        long = [i for i in kept if trajectories[i].length > short]

    def rows_of(row_length: int | np.ndarray, only: Sequence[int]) -> list[list[Segment]]:
        if config.share_prompts:
            return _shared_rows(groups, responses, set(only), row_length, options)
        order = sorted(only, key=lambda i: trajectories[i].length <= short)  # in order, but first what needs a long row
        packed = pack([t.length for t in trajectories], row_length, order, **options)
        return [[Segment(i) for i in row] for row in packed]

    classes = _row_classes(rows_of, kept, long, config)
    weights = _weights(responses, classes, config)
    own = range(config.micro_rows) if own is None else own
    stacks = []
    for T, rows in classes.items():
        count = max(1, -(-len(rows) // config.micro_rows))
        room = 2 ** (count - 1).bit_length()
        padded = rows + [[]] * (room * config.micro_rows - len(rows))
        chosen = [padded[a * config.micro_rows + b] for a in range(room) for b in own]
        filled = [[trajectories[s.trajectory].packed(s, weights[s.trajectory]) for s in row] for row in chosen]
        arrays = assemble(filled, T, ["weights", "advantages", "sampler_logp"], shared=config.share_prompts)
        most = max((sum(int(responses[s.trajectory]) for s in row if not s.prompt_only) for row in rows), default=0)
        arrays = {k: v.reshape(room, len(own), T) for k, v in arrays.items()}
        stacks.append((_with_trained_places(arrays, most), count))
    segments = [s for rows in classes.values() for row in rows for s in row]
    spans = [trajectories[s.trajectory].tokens_of(s) for s in segments]
    return MiniBatch(stacks, [s.stop - s.start for s in spans], [s.start for s in spans])


def _row_classes(
    rows_of: Callable[..., list[list[Segment]]], kept: Sequence[int], long: Sequence[int], config: GrpoConfig
) -> dict[int, list[list[Segment]]]:
    """The rows of each length that has any: those that make the fewest positions, padding included, and among such
    the fewest long rows. rows_of: packs trajectories into rows of one length or of several. long: those of the
    trajectories `kept` that fit into no short row."""
    T, short, micro = config.row_length, config.short_rows, config.micro_rows
    whole, plans = rows_of(T, kept), []
    if short:
        need, most = (-(-len(rows) // micro) * micro for rows in (rows_of(T, long), whole))
        for count in range(need, most, micro):
            rows = rows_of(row_lengths(count, T, short, len(kept)), kept)
            plans.append({T: rows[:count], short: rows[count:]})

    def positions(plan: dict[int, list]) -> int:
        return sum(-(-len(rows) // micro) * length for length, rows in plan.items())

    best = min([*plans, {T: whole}], key=positions)
    return {length: rows for length, rows in best.items() if rows} or {T: []}


def _shared_rows(
    groups: Sequence[Group],
    responses: Int[np.ndarray, " S"],
    kept: set[int],
    row_length: int | np.ndarray,
    limits: dict[str, Any],
) -> list[list[Segment]]:
    """The segments of each row that holds a group's prompt once. A prompt of one token leaves no segment of its own."""
    starts = np.cumsum([0, *(len(g.samples) for g in groups)])
    members = [[i for i in range(a, b) if i in kept] for a, b in itertools.pairwise(starts)]
    prompts = [len(g.prompt.tokens) for g in groups]
    rows = []
    for pieces in pack_groups(prompts, members, responses, row_length, **limits):
        row: list[Segment] = []
        for group, numbers in pieces:
            begin, parent = prompts[group] - 1, 0
            if begin:
                row.append(Segment(numbers[0], prompt_only=True))
                parent = len(row)
            row += [Segment(i, begin, parent) for i in numbers]
        rows.append(row)
    return rows


def _weights(
    responses: Int[np.ndarray, " S"], classes: dict[int, list[list[Segment]]], config: GrpoConfig
) -> Float[np.ndarray, " S"]:
    """The weight of the tokens of each trajectory's response."""
    micro_of, first = np.full(len(responses), -1), 0
    for rows in classes.values():
        for r, row in enumerate(rows):
            micro_of[[s.trajectory for s in row]] = first + r // config.micro_rows
        first = micro_of.max() + 1
    limit = config.sampling.max_new_tokens
    return aggregation_weights(responses, config.aggregation, micro_batch_of=micro_of, max_length=limit)
