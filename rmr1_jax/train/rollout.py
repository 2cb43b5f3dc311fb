"""Rollouts: prompts are sampled, scored, and given advantages.

Prompts are drawn in an order that is a function of the seed, so the run's cursor is one number: how many prompts were
consumed. Of several processes each samples and scores its share of the prompts on its own devices; then all processes
have all groups. Next: `micro_batches.py`, which packs them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.distributed.exchange import all_shares, any_of, first, gather, own_share
from rmr1_jax.distributed.mesh import local_mesh, sampling_mesh
from rmr1_jax.distributed.preemption import Preempted
from rmr1_jax.model.tokenizer import Tokenizer, completion_text
from rmr1_jax.policy import DTYPES, Policy
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import eval_verdict
from rmr1_jax.sampler.engine import Engine
from rmr1_jax.sampler.sample import Sample, SampleStats
from rmr1_jax.sampler.weights import sampling_weights
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.losses import group_advantages
from rmr1_jax.train.rewards import Reward, rewards_of


@dataclasses.dataclass(frozen=True)
class RlPrompt:
    """A rendered prompt. tokens: [T] int32. better: the better answer, "A" or "B". meta: anything for the reward."""

    id: str
    tokens: np.ndarray
    better: str
    meta: Any = None


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt's R samples, their texts, rewards [R] and advantages [R] float32. A text on which the reward abstained
    has the reward NaN and the advantage 0."""

    prompt: RlPrompt
    samples: list[Sample]
    texts: list[str]
    rewards: np.ndarray
    advantages: np.ndarray

    @property
    def mixed(self) -> bool:
        """Whether the rewards differ. Where they do not, all advantages are zero."""
        known = self.rewards[~np.isnan(self.rewards)]
        return bool(known.size and np.ptp(known) > 0)


def next_prompts(prompts: Sequence[RlPrompt], count: int, consumed: int, seed: int) -> list[RlPrompt]:
    """The `count` prompts after the first `consumed` ones of the run. Each epoch has its own order."""
    chosen = []
    for i in range(consumed, consumed + count):
        epoch, at = divmod(i, len(prompts))
        if not chosen or at == 0:
            order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[order[at]])
    return chosen


class Rollout(NamedTuple):
    """A rollout batch: its groups, how many prompts it consumed, and counts for the metrics."""

    groups: list[Group]
    consumed: int
    facts: dict[str, float]


def roll_out(
    config: GrpoConfig,
    policy: Policy,
    prompts: Sequence[RlPrompt],
    consumed: int,
    step: int,
    reward: Reward,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Rollout:
    """Sample and score one rollout batch from the policy's weights.

    With dynamic sampling, rounds are sampled until there are `prompts_per_step` mixed groups or no round is left; then
    other groups fill the batch up. consumed: how many of the run's prompts were consumed before. interruptible: a
    context in which SIGTERM raises `Preempted` at once, which is then raised on all processes.
    """
    began = time.perf_counter()
    mesh = sampling_mesh(policy.mesh, config.sampling_tensor)
    weights = jax.block_until_ready(sampling_weights(policy.model, dtype=DTYPES[config.dtype], mesh=mesh))
    weights_seconds = time.perf_counter() - began
    slots = -(-config.sampling.slots // jax.process_count())
    cache_gib = config.sampling.cache_gib and config.sampling.cache_gib / jax.process_count()

    def make_groups(share: Sequence[RlPrompt], seed: int) -> tuple[list[Group], SampleStats]:
        sampling = dataclasses.replace(config.sampling, seed=seed, slots=slots, cache_gib=cache_gib)
        token_ids = [p.tokens.tolist() for p in share]
        engine = Engine.for_prompts(policy.model, weights, token_ids, sampling, mesh=local_mesh(mesh))
        samples, stats = engine.generate(weights, token_ids, policy.tokenizer.stop_ids, bar=first())
        return score(share, samples, policy.tokenizer, reward, normalize_std=config.normalize_std), stats

    P, rounds = config.prompts_per_step, 0
    groups: list[Group] = []
    stats: list[SampleStats] = []
    while rounds < config.dynamic_sampling and sum(g.mixed for g in groups) < P:
        seed = int(np.random.SeedSequence([config.seed, step, rounds]).generate_state(1)[0])
        drawn = next_prompts(prompts, P, consumed + rounds * P, config.seed)
        round_groups, round_stats = _in_shares(drawn, partial(make_groups, seed=seed), local_mesh(mesh), interruptible)
        groups, stats, rounds = groups + round_groups, stats + round_stats, rounds + 1
    if config.dynamic_sampling > 1:
        groups.sort(key=lambda g: not g.mixed)  # mixed groups first, each kind in the order of the prompts
    facts = {
        "prompt_tokens": sum(x.prompt_tokens for x in stats),
        "new_tokens": sum(x.new_tokens for x in stats),
        "rounds": rounds,
        "weights_seconds": weights_seconds,
        "occupancy": float(np.mean([x.occupancy for x in stats])),
    }
    return Rollout(groups[:P], rounds * P, facts)


def _in_shares(
    prompts: Sequence[RlPrompt],
    make_groups: Callable[[Sequence[RlPrompt]], tuple[list[Group], SampleStats]],
    mesh: Mesh,
    interruptible: Callable[[], AbstractContextManager[None]],
) -> tuple[list[Group], list[SampleStats]]:
    """Each process makes the groups of its share of the prompts on its own devices, `mesh`. Returns all groups, in
    order, and all statistics. Raises Preempted on all processes if any of them was interrupted."""
    made = None
    # Leave the global mesh: each process samples and scores on its own devices.
    with suppress(Preempted), jax.set_mesh(mesh), interruptible():
        made = make_groups(own_share(prompts))
    if any_of(made is None):
        raise Preempted
    groups, stats = made
    # Not the prompts: every process has them already, and `meta` may be anything.
    results = all_shares([(g.samples, g.texts, g.rewards, g.advantages) for g in groups])
    return [Group(p, *result) for p, result in zip(prompts, results, strict=True)], gather(stats)


def score(
    prompts: Sequence[RlPrompt],
    groups: Sequence[Sequence[Sample]],
    tokenizer: Tokenizer,
    reward: Reward,
    *,
    normalize_std: bool,
) -> list[Group]:
    """The groups of the sampler's results, with rewards and advantages. A text begins with the `<think>` that the chat
    template opens for it, so that a thought that never ends is rewarded as one. Raises InputError as `rewards_of`."""
    texts = [
        [completion_text(tokenizer, prompt.tokens.tolist(), sample.token_ids) for sample in group]
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    flat = [(text, prompt) for prompt, group in zip(prompts, texts, strict=True) for text in group]
    rewards = rewards_of(reward, *zip(*flat, strict=True)) if flat else np.zeros(0)
    rewards = rewards.astype(np.float32).reshape(len(prompts), -1)
    advantages = group_advantages(rewards, normalize_std=normalize_std)
    return [Group(*x) for x in zip(prompts, groups, texts, rewards, advantages, strict=True)]


def rollout_metrics(groups: Sequence[Group], structure: str) -> dict[str, float]:
    """Means over all samples; `reward` over those that have one. valid: the share of complete traces. verdict_a: the
    share of A among verdicts that name a side. mixed_groups: the share of groups whose rewards differ."""
    samples = [s for g in groups for s in g.samples]
    answers = [(text, eval_verdict(text), g.prompt.better) for g in groups for text in g.texts]
    values = {
        "accuracy": [verdict == better for _, verdict, better in answers],
        "valid": [parse_trace(text).is_complete(structure) for text, _, _ in answers],
        "verdict_a": [verdict == "A" for _, verdict, _ in answers if verdict] or [0.5],
        "response_length": [len(s.token_ids) for s in samples],
        "truncated": [s.finish_reason == "length" for s in samples],
        "mixed_groups": [g.mixed for g in groups],
    }
    means = {name: float(np.mean(value)) for name, value in values.items()}
    known = np.concatenate([g.rewards[~np.isnan(g.rewards)] for g in groups])
    return {"reward": float(known.mean()) if known.size else 0.0} | means


def describe_groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Ids, lengths, rewards and advantages, to find out why an update was not finite."""
    return [
        {
            "id": g.prompt.id,
            "prompt_length": len(g.prompt.tokens),
            "lengths": [len(s.token_ids) for s in g.samples],
            "rewards": g.rewards.tolist(),
            "advantages": g.advantages.tolist(),
        }
        for g in groups
    ]
