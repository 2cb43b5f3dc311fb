"""Rewards: the two of the paper, several with weights, and how a reward function of any form is called.

A reward function takes one text and its prompt, `reward(text, prompt)`, and returns a number, or None to abstain. One
whose first parameter is named `texts` takes all texts of a rollout at once, with as many prompts, `reward(texts,
prompts)`, and returns a list; use it for a model or a server that scores batches. Of several processes each passes its
own texts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
from jaxtyping import Float

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.verdict import format_reward, training_reward
from rmr1_jax.train.config import RewardKind

Reward = Callable[..., Any]  # see above


def make_reward(kind: RewardKind, structure: str) -> Reward:
    """The reward of the paper's main runs, "verdict": +1 for the right verdict at the end, else -1; or that of its cold
    start (arXiv 2505.02387), "cold_start": 1 for a complete trace (`Prompt.structure`), plus 1 for the right verdict,
    for a policy that has not learned the form from traces."""
    assert kind in get_args(RewardKind), kind

    def reward(text: str, prompt: Any) -> float:
        verdict = training_reward(text, prompt.better)
        return verdict if kind == "verdict" else format_reward(text, structure) + (verdict > 0)

    return reward


def weighted(*rewards: Reward, weights: Sequence[float]) -> Reward:
    """The sum of several rewards, each times its weight. One that abstains on a text is left out of that text's sum; if
    all abstain, so does the sum. Raises InputError if there are not as many weights as rewards."""
    if not rewards or len(rewards) != len(weights):
        raise InputError(f"{len(rewards)} rewards have {len(weights)} weights; give each reward one weight")
    return _Weighted(rewards, tuple(map(float, weights)))


class _Weighted:
    def __init__(self, rewards: tuple[Reward, ...], weights: tuple[float, ...]):
        self.rewards, self.weights = rewards, weights

    def __call__(self, texts: Sequence[str], prompts: Sequence[Any]) -> list[float | None]:
        each = np.stack([w * rewards_of(r, texts, prompts) for r, w in zip(self.rewards, self.weights, strict=True)])
        sums = np.where(np.isnan(each).all(axis=0), np.nan, np.nansum(each, axis=0))
        return [None if math.isnan(value) else float(value) for value in sums]


def rewards_of(reward: Reward, texts: Sequence[str], prompts: Sequence[Any]) -> Float[np.ndarray, " S"]:
    """The rewards of S texts, of which `prompts` are the prompts; NaN where the function abstains.

    Raises:
        InputError: the function returned anything but one finite number or None for each text.
    """
    if _takes_all(reward):
        values = reward(list(texts), list(prompts))
        if not hasattr(values, "__len__") or len(values) != len(texts):
            raise InputError(
                f"reward(texts, prompts) returned {_shown(values)} for {len(texts)} texts; it must return a list with "
                "one number, or None, for each text"
            )
    else:
        values = [reward(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
    return np.asarray([_as_number(value) for value in values], np.float64)


def _takes_all(reward: Reward) -> bool:
    """Whether a function takes all texts at once: its first parameter is named `texts`."""
    try:
        return next(iter(inspect.signature(reward).parameters), None) == "texts"
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def _as_number(value: Any) -> float:
    """A reward as a number, NaN for None."""
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if not math.isfinite(number):
        raise InputError(
            f"a reward is {_shown(value)}; reward(text, prompt) must return one finite number for one text, or None to "
            "abstain; name the parameters reward(texts, prompts) to get all texts at once and return a list"
        )
    return number


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
