"""Micro-batches: the arrays of an optimizer step, from examples (SFT) or from scored samples (GRPO).

`to_micro_batches` is SFT's. GRPO's `mini_batch` first lists the trajectories, then plans from their lengths alone which
row holds which, and only then assembles the rows of this process. Next: `logprobs.py`, what a step computes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.data.packing import Batch, View, assemble, lengths_of, pack
from rmr1_jax.distributed.mesh import own_rows, place_rows
from rmr1_jax.distributed.terminal import say
from rmr1_jax.sampler.sample import Sample
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.losses import aggregation_weights
from rmr1_jax.train.rollout import Group


def drop_longer(examples: Sequence[Any], limit: int, name: str) -> Sequence[Any]:
    """Drop what is longer than `limit` tokens, and print its number. `name` says what it is. Nothing is truncated."""
    fits = lengths_of(examples) <= limit
    if not fits.all():
        say(f"dropped {(~fits).sum()} of {len(examples)} {name} longer than {limit} tokens")
    return View(examples, fits.nonzero()[0])


def to_micro_batches(batch: Batch, micro_rows: int, mesh: Mesh) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The rows of a batch as arrays [A, micro_rows, T] on the mesh, with weights that average the loss over the trained
    tokens of the whole step; and facts about the batch for the metrics."""
    rows = dict(batch.rows)
    rows["weights"] = rows.pop("trained") / max(1, batch.trained_tokens)
    own, T = len(own_rows(mesh, micro_rows)), rows["tokens"].shape[-1]
    micro = {k: v.reshape(-1, own, T) for k, v in rows.items()}
    positions, tokens = len(micro["tokens"]) * micro_rows * T, sum(batch.lengths)
    facts = {"tokens": tokens, "trained_tokens": batch.trained_tokens, "packed": tokens / positions}
    return place_rows(mesh, "ABT", micro, micro_rows), facts


class MiniBatch(NamedTuple):
    """The data of one GRPO update.

    arrays: [A, B, T] each: tokens, positions, segment_ids int32; weights, advantages, sampler_logp float32. A is a
    power of two: few shapes, few compilations. count: how many of the A micro-batches hold anything, at least 1.
    lengths: the tokens of each sequence in them, of all processes.
    """

    arrays: dict[str, Any]
    count: int
    lengths: list[int]


class Trajectory(NamedTuple):
    """A prompt, [T] int32, with one of its responses."""

    prompt: np.ndarray
    sample: Sample
    advantage: np.float32

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.sample.token_ids)

    def packed(self, weight: np.float32) -> SimpleNamespace:
        """The arrays [T] to pack: tokens, and weights, advantages and log-probabilities that are 0 on the prompt."""
        response = np.asarray(self.sample.token_ids, np.int32)
        values = {"weights": weight, "advantages": self.advantage, "sampler_logp": self.sample.sampled_logprobs}
        before = np.zeros(len(self.prompt), np.float32)
        arrays = {k: np.concatenate([before, np.broadcast_to(v, len(response))]) for k, v in values.items()}
        return SimpleNamespace(tokens=np.concatenate([self.prompt, response]), **arrays)


def mini_batch(
    groups: Sequence[Group], config: GrpoConfig, *, skip_unmixed: bool, own: Sequence[int] | None = None
) -> MiniBatch:
    """Pack the trajectories of one update.

    skip_unmixed: leave out trajectories whose advantage is zero. Their policy term and its gradient are exactly zero,
    so where the loss has no other term this saves their computation and changes nothing. They still count in averages,
    and are kept where the average is over what is in a micro-batch. own: the rows of each micro-batch that this process
    assembles; None: all `config.micro_rows`.
    """
    trajectories = [
        Trajectory(g.prompt.tokens, *each) for g in groups for each in zip(g.samples, g.advantages, strict=True)
    ]
    rows, weights = _plan(trajectories, config, skip_unmixed)
    count = max(1, -(-len(rows) // config.micro_rows))
    room = 2 ** (count - 1).bit_length()
    own = range(config.micro_rows) if own is None else own
    padded = rows + [[]] * (room * config.micro_rows - len(rows))
    places = [a * config.micro_rows + b for a in range(room) for b in own]
    filled = [[trajectories[i].packed(weights[i]) for i in padded[place]] for place in places]
    arrays = assemble(filled, config.row_length, ["weights", "advantages", "sampler_logp"])
    arrays = {k: v.reshape(room, len(own), config.row_length) for k, v in arrays.items()}
    return MiniBatch(arrays, count, [trajectories[i].length for i in sorted(i for row in rows for i in row)])


def _plan(
    trajectories: Sequence[Trajectory], config: GrpoConfig, skip_unmixed: bool
) -> tuple[list[list[int]], np.ndarray]:
    """The numbers of the trajectories in each row, and the weight of each trajectory's tokens, [S] float32."""
    responses = np.asarray([len(t.sample.token_ids) for t in trajectories])
    keep_all = not skip_unmixed or config.aggregation == "micro_batch"
    kept = [i for i, t in enumerate(trajectories) if keep_all or t.advantage != 0]
    rows = pack([t.length for t in trajectories], config.row_length, kept, max_items=config.max_segments)
    micro_of = np.full(len(trajectories), -1)
    for r, row in enumerate(rows):
        micro_of[row] = r // config.micro_rows
    limit = config.sampling.max_new_tokens
    return rows, aggregation_weights(responses, config.aggregation, micro_batch_of=micro_of, max_length=limit)
