"""From examples and rollouts to the arrays of an optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.data.packing import Batch, assemble, pack
from rmr1_jax.distributed.mesh import (
    own_rows,
    place_rows,
)
from rmr1_jax.train.losses import AggregationKind, aggregation_weights
from rmr1_jax.train.rollout import Group

if TYPE_CHECKING:
    pass


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One prompt + response as the trainer reads it: all arrays [T], all but the tokens 0 on the prompt."""

    tokens: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    sampler_logp: np.ndarray


def mini_batch(
    groups: Sequence[Group],
    *,
    row_length: int,
    micro_rows: int,
    aggregation: AggregationKind,
    max_new_tokens: int,
    max_segments: int,
    skip_unmixed: bool,
    own: Sequence[int] | None = None,
) -> tuple[dict[str, np.ndarray], int, list[int]]:
    """One mini-batch's sequences, packed.

    Args:
        skip_unmixed: leave out sequences whose advantage is zero. Their policy term and its gradient are exactly zero,
            so where the loss has no other term this saves their computation and changes nothing; they still count in
            the averages (and so are kept where the average is over what is in a micro-batch).
        own: the rows of each micro-batch that this process assembles, default all `micro_rows`.

    Returns:
        Arrays [A, own rows, T] (tokens, positions, segment_ids, weights, advantages, sampler_logp); how many of the A
        micro-batches hold anything (at least 1); and the lengths of all sequences in them, whoever assembles them. A is
        a power of two: few shapes, few compilations.
    """
    members = [(g, i) for g in groups for i in range(len(g.samples))]
    responses = np.asarray([len(g.samples[i].token_ids) for g, i in members])
    lengths = responses + [len(g.prompt.tokens) for g, _ in members]
    keep_all = not skip_unmixed or aggregation == "micro_batch"
    kept = [m for m, (g, i) in enumerate(members) if keep_all or g.advantages[i] != 0]
    rows = pack(lengths, row_length, kept, max_items=max_segments)
    count = max(1, -(-len(rows) // micro_rows))
    room = 2 ** (count - 1).bit_length()
    micro_of = np.full(len(members), -1)
    for r, row in enumerate(rows):
        micro_of[row] = r // micro_rows
    weights = aggregation_weights(responses, aggregation, micro_batch_of=micro_of, max_length=max_new_tokens)
    rows += [[]] * (room * micro_rows - len(rows))
    own = range(micro_rows) if own is None else own
    packed = [rows[a * micro_rows + b] for a in range(room) for b in own]
    sequences = [[_sequence(*members[m], weights[m]) for m in row] for row in packed]
    batch = assemble(sequences, row_length, ["weights", "advantages", "sampler_logp"])
    batch = {k: v.reshape(room, len(own), row_length) for k, v in batch.items()}
    return batch, count, lengths[kept].tolist()


def _sequence(group: Group, i: int, weight: float) -> Trajectory:
    sample, prompt = group.samples[i], group.prompt.tokens
    tokens = np.concatenate([prompt, np.asarray(sample.token_ids, np.int32)])
    trained = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
    sampler_logp = np.zeros(len(tokens), np.float32)
    sampler_logp[len(prompt) :] = sample.sampled_logprobs
    return Trajectory(tokens, trained * weight, trained * group.advantages[i], sampler_logp)


def to_micro_batches(batch: Batch, micro_rows: int, mesh: Mesh) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """[rows, T] -> [A, micro_rows, T] on the mesh, with the loss averaged over the trained tokens of the whole step;
    and facts about the whole batch for the metrics."""
    rows = dict(batch.rows)
    rows["weights"] = rows.pop("trained") / max(1, batch.trained_tokens)
    own = len(own_rows(mesh, micro_rows))
    micro = {k: v.reshape(-1, own, v.shape[-1]) for k, v in rows.items()}
    positions = len(micro["tokens"]) * micro_rows * rows["tokens"].shape[-1]
    tokens = sum(batch.lengths)
    facts = {"tokens": tokens, "trained_tokens": batch.trained_tokens, "packed": tokens / positions}
    return place_rows(mesh, "ABT", micro, micro_rows), facts
