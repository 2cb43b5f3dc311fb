"""Prompts x policy -> scored rollouts -> packed mini-batches: everything of GRPO that happens on the host.

Prompts are drawn in an order that is a function of the seed, so the run's cursor is one number: how many prompts were
consumed. Next: `grpo.py`, which trains on what comes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmr1_jax.data.pipeline import assemble, pack
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import eval_verdict
from rmr1_jax.sampler.config import Sample
from rmr1_jax.train.losses import AggregationKind, aggregation_weights, group_advantages


@dataclasses.dataclass(frozen=True)
class RlPrompt:
    """A rendered prompt and what is known of it. tokens: [T] int32. better: "A" or "B". meta: what a reward reads."""

    id: str
    tokens: np.ndarray
    better: str
    meta: Any = None


# reward(text of a completion, the prompt it answers) -> a finite number.
Reward = Callable[[str, RlPrompt], float]


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt's R samples, their texts, rewards [R] and advantages [R] float32."""

    prompt: RlPrompt
    samples: list[Sample]
    texts: list[str]
    rewards: np.ndarray
    advantages: np.ndarray

    @property
    def mixed(self) -> bool:
        """Whether the rewards differ: a group without that teaches nothing."""
        return bool(np.ptp(self.rewards) > 0)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One prompt + response as the trainer reads it: all arrays [T], `trained` True on the response."""

    tokens: np.ndarray
    trained: np.ndarray
    advantages: np.ndarray
    sampler_logp: np.ndarray


def next_prompts(prompts: Sequence[RlPrompt], count: int, consumed: int, seed: int) -> list[RlPrompt]:
    """The `count` prompts after the first `consumed` ones of the run; every epoch in an order of its own."""
    chosen = []
    for i in range(consumed, consumed + count):
        epoch, at = divmod(i, len(prompts))
        if not chosen or at == 0:
            order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[order[at]])
    return chosen


def score(
    prompts: Sequence[RlPrompt],
    groups: Sequence[Sequence[Sample]],
    decode: Callable[[Sequence[int]], str],
    reward: Reward,
    *,
    normalize_std: bool,
) -> list[Group]:
    """Rewards and group advantages for what the sampler returned."""
    texts = [[decode(s.token_ids) for s in group] for group in groups]
    rewards = np.asarray([[reward(t, p) for t in group] for p, group in zip(prompts, texts, strict=True)], np.float32)
    advantages = group_advantages(rewards, normalize_std=normalize_std)
    return [Group(*x) for x in zip(prompts, groups, texts, rewards, advantages, strict=True)]


def rollout_metrics(groups: Sequence[Group], structure: str) -> dict[str, float]:
    """Means over all samples; `valid` is the share of complete traces, `verdict_a` that of verdicts for A among those
    that name a side, `mixed_groups` the share of groups whose rewards differ."""
    texts = [text for g in groups for text in g.texts]
    verdicts = [eval_verdict(text) for text in texts]
    right = [v == g.prompt.better for g, vs in zip(groups, _by_group(verdicts, groups), strict=True) for v in vs]
    named = [v for v in verdicts if v is not None]
    samples = [s for g in groups for s in g.samples]
    return {
        "reward": float(np.mean([g.rewards for g in groups])),
        "accuracy": float(np.mean(right)),
        "valid": float(np.mean([parse_trace(text).is_complete(structure) for text in texts])),
        "verdict_a": float(np.mean([v == "A" for v in named])) if named else 0.5,
        "response_length": float(np.mean([len(s.token_ids) for s in samples])),
        "truncated": float(np.mean([s.finish_reason == "length" for s in samples])),
        "mixed_groups": float(np.mean([g.mixed for g in groups])),
    }


def mini_batch(
    groups: Sequence[Group],
    *,
    row_length: int,
    micro_rows: int,
    aggregation: AggregationKind,
    max_new_tokens: int,
    max_segments: int,
    skip_unmixed: bool,
) -> tuple[dict[str, np.ndarray], int]:
    """One mini-batch's sequences, packed.

    Args:
        skip_unmixed: leave out sequences whose advantage is zero. Their policy term and its gradient are exactly zero,
            so where the loss has no other term this saves their computation and changes nothing; they still count in
            the averages (and so are kept where the average is over what is in a micro-batch).

    Returns:
        Arrays [A, micro_rows, T] (tokens, positions, segment_ids, weights, advantages, sampler_logp) and how many of
        the A micro-batches hold anything (at least 1). A is a power of two: few shapes, few compilations.
    """
    sequences = [_sequence(g, i) for g in groups for i in range(len(g.samples))]
    lengths = np.asarray([int(s.trained.sum()) for s in sequences])
    keep_all = not skip_unmixed or aggregation == "micro_batch"
    kept = [i for i, s in enumerate(sequences) if keep_all or s.advantages[-1] != 0]
    rows = pack([len(s.tokens) for s in sequences], row_length, kept, most=max_segments)
    count = max(1, -(-len(rows) // micro_rows))
    room = 2 ** (count - 1).bit_length()
    micro_of = np.full(len(sequences), -1)
    for r, row in enumerate(rows):
        micro_of[row] = r // micro_rows
    per_token = aggregation_weights(lengths, aggregation, micro_batch_of=micro_of, max_length=max_new_tokens)
    weights = [np.where(s.trained, w, 0).astype(np.float32) for s, w in zip(sequences, per_token, strict=True)]
    rows += [[]] * (room * micro_rows - len(rows))
    batch = assemble(
        rows,
        sequences,
        row_length,
        weights=weights,
        advantages=[s.advantages for s in sequences],
        sampler_logp=[s.sampler_logp for s in sequences],
    )
    return {k: v.reshape(room, micro_rows, row_length) for k, v in batch.items()}, count


def _sequence(group: Group, i: int) -> Trajectory:
    sample, prompt = group.samples[i], group.prompt.tokens
    tokens = np.concatenate([prompt, np.asarray(sample.token_ids, np.int32)])
    trained = np.arange(len(tokens)) >= len(prompt)
    sampler_logp = np.zeros(len(tokens), np.float32)
    sampler_logp[len(prompt) :] = sample.sampled_logprobs
    advantages = np.where(trained, group.advantages[i], 0).astype(np.float32)
    return Trajectory(tokens, trained, advantages, sampler_logp)


def _by_group(values: Sequence, groups: Sequence[Group]) -> list[Sequence]:
    at, split = 0, []
    for g in groups:
        split.append(values[at : at + len(g.texts)])
        at += len(g.texts)
    return split
