"""Prompts x policy -> scored rollouts -> packed mini-batches: what GRPO trains on.

Prompts are drawn in an order that is a function of the seed, so the run's cursor is one number: how many prompts were
consumed. Of several processes each samples and scores its share of the prompts on its own devices; then all have all
groups, and each assembles its own rows of the mini-batches. Next: `grpo.py`, which trains on what comes out.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.distributed.exchange import all_shares, any_of, first, gather, own_share
from rmr1_jax.distributed.mesh import local_mesh, sampling_mesh
from rmr1_jax.distributed.preemption import Preempted
from rmr1_jax.model.qwen import with_params
from rmr1_jax.policy import DTYPES, Policy
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import eval_verdict, format_reward, training_reward
from rmr1_jax.sampler.engine import Engine
from rmr1_jax.sampler.sample import Sample, SampleStats, SamplingConfig
from rmr1_jax.sampler.weights import Weights, sampling_weights
from rmr1_jax.train.config import RewardKind
from rmr1_jax.train.losses import group_advantages

if TYPE_CHECKING:
    from rmr1_jax.train.config import GrpoConfig


@dataclasses.dataclass(frozen=True)
class RlPrompt:
    """A rendered prompt and what is known of it. tokens: [T] int32. better: "A" or "B". meta: what a reward reads."""

    id: str
    tokens: np.ndarray
    better: str
    meta: Any = None


Interruptible = Callable[[], AbstractContextManager[None]]


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


def next_prompts(prompts: Sequence[RlPrompt], count: int, consumed: int, seed: int) -> list[RlPrompt]:
    """The `count` prompts after the first `consumed` ones of the run; every epoch in an order of its own."""
    chosen = []
    for i in range(consumed, consumed + count):
        epoch, at = divmod(i, len(prompts))
        if not chosen or at == 0:
            order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[order[at]])
    return chosen


def roll_out(
    config: GrpoConfig,
    policy: Policy,
    params: Any,
    prompts: Sequence[RlPrompt],
    consumed: int,
    step: int,
    reward: Reward,
    interruptible: Interruptible = nullcontext,
) -> tuple[list[Group], int, dict[str, float]]:
    """One rollout batch from the current weights: its groups, the number of prompts it consumed, and counts.

    With dynamic sampling, rounds go on until there are `prompts_per_step` mixed groups or the rounds are used up; then
    other groups fill the rest, so that the batch has its size. interruptible: a context for what may be cut off with
    `Preempted`; then it is raised on all processes.
    """
    began = time.perf_counter()
    mesh = sampling_mesh(policy.mesh, config.sampling_tensor)
    model = with_params(policy.model, params)
    weights = jax.block_until_ready(sampling_weights(model, dtype=DTYPES[config.dtype], mesh=mesh))
    P = config.prompts_per_step
    mixed: list[Group] = []
    others: list[Group] = []
    facts = {"prompt_tokens": 0, "new_tokens": 0, "rounds": 0, "weights_seconds": time.perf_counter() - began}
    took: list[SampleStats] = []
    for round_number in range(config.dynamic_sampling):
        chosen = next_prompts(prompts, P, consumed + round_number * P, config.seed)
        seed = int(np.random.SeedSequence([config.seed, step, round_number]).generate_state(1)[0])
        sampling = dataclasses.replace(config.sampling, seed=seed)
        groups, stats = _sample_groups(
            config, policy, weights, chosen, sampling, local_mesh(mesh), reward, interruptible
        )
        if config.dynamic_sampling == 1:
            mixed = groups  # every group, in order
        else:
            mixed += [g for g in groups if g.mixed]
            others += [g for g in groups if not g.mixed]
        facts["prompt_tokens"] += sum(x.prompt_tokens for x in stats)
        facts["new_tokens"] += sum(x.new_tokens for x in stats)
        facts["rounds"] += 1
        took += stats
        if len(mixed) >= P:
            break
    facts["occupancy"] = float(np.mean([stats.occupancy for stats in took]))
    return (mixed + others)[:P], facts["rounds"] * P, facts


def _sample_groups(
    config: GrpoConfig,
    policy: Policy,
    weights: Weights,
    prompts: Sequence[RlPrompt],
    sampling: SamplingConfig,
    mesh: Mesh,
    reward: Reward,
    interruptible: Interruptible,
) -> tuple[list[Group], list[SampleStats]]:
    """The groups of all `prompts`, in order, on every process; each samples and scores its share of them on `mesh`, its
    own devices. And what it took each of them."""
    scored = None
    mine = own_share(prompts)
    processes = jax.process_count()
    sampling = dataclasses.replace(
        sampling,
        slots=-(-sampling.slots // processes),
        cache_gib=sampling.cache_gib and sampling.cache_gib / processes,
    )
    watched = first() and sys.stderr.isatty()
    # Out of the context of all processes' mesh: what one does by itself, a reward in JAX included, is none of theirs.
    with suppress(Preempted), jax.set_mesh(mesh), interruptible():
        token_ids = [p.tokens for p in mine]
        stops = policy.tokenizer.stop_ids
        engine = Engine.for_prompts(policy.model, weights, token_ids, sampling, mesh=mesh)
        samples, stats = engine.generate(weights, token_ids, stops, bar=watched)
        scored = score(mine, samples, policy.tokenizer.decode, reward, normalize_std=config.normalize_std)
    if any_of(scored is None):
        raise Preempted
    # A prompt's `meta` may be anything and is everywhere already.
    results = all_shares([(g.samples, g.texts, g.rewards, g.advantages) for g in scored])
    return [Group(p, *result) for p, result in zip(prompts, results, strict=True)], gather(stats)


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


def facts_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Ids, lengths, rewards and advantages, for somebody who looks for what went wrong with an update."""
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


def _by_group(values: Sequence, groups: Sequence[Group]) -> list[Sequence]:
    at, split = 0, []
    for g in groups:
        split.append(values[at : at + len(g.texts)])
        at += len(g.texts)
    return split


def make_reward(kind: RewardKind, structure: str) -> Reward:
    """The reward of the paper's main runs, or that of its cold start (arXiv 2505.02387).

    Args:
        kind: "verdict": +1 for the right verdict at the end, else -1. "cold_start": 1 for a whole trace in form, plus 1
            for the right verdict; for a policy that has not learned the form from traces.
        structure: what a whole trace is (`Prompt.structure`).
    """

    def verdict(text: str, prompt: RlPrompt) -> float:
        return training_reward(text, prompt.better)

    def cold_start(text: str, prompt: RlPrompt) -> float:
        return format_reward(text, structure) + (training_reward(text, prompt.better) > 0)

    rewards: dict[RewardKind, Callable[[str, RlPrompt], float]] = {"verdict": verdict, "cold_start": cold_start}
    return rewards[kind]
