"""The rewards that a config names. Any other is a function `(text, prompt) -> float`, handed to `grpo`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from rmr1_jax.prompts.verdict import format_reward, training_reward
from rmr1_jax.train.rollout import Reward, RlPrompt

RewardKind = Literal["verdict", "cold_start"]


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
