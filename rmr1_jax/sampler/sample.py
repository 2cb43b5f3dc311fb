"""The settings of the sampler, one sample, and the statistics of a call."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig

LONGEST = 8192  # new tokens, the published response length


@config_dataclass
class Truncation:
    """Which tokens can be drawn, after the temperature, in this order, as in Transformers: the top_k most probable
    tokens; of these the smallest set whose probability reaches top_p; of these the tokens with at least min_p times the
    probability of the most probable token. The defaults keep all tokens.

    Raises:
        InputError: a value is out of its range.
    """

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw only from the smallest set of tokens whose probability reaches this."""
    top_k: PositiveInt | None = None
    """Draw only from this many of the most probable tokens. null: from all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Draw only tokens with at least this share of the most probable token's probability."""

    def given(self) -> dict[str, Any]:
        """The settings of `Truncation` that differ from their defaults, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Truncation)}
        return {name: value for name, value in values.items() if value != getattr(Truncation, name)}


@config_dataclass
class SamplingConfig(Truncation):
    """The settings of the sampler. Temperature, truncation, seed and the stop ids are arguments of the compiled
    programs, so that a change recompiles nothing.

    Raises:
        InputError: a value is out of its range.
    """

    n: PositiveInt = 1
    """Samples of each prompt (R)."""
    max_new_tokens: PositiveInt = 256
    """Maximum length of a sample."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature. 0 is greedy."""
    seed: int = 0
    """Seed of the sampling."""
    slots: PositiveInt = 256
    """Most samples in flight. It decides speed and memory, and changes no token."""
    cache_gib: PositiveFloat | None = None
    """Most memory for keys and values, on all devices together. null: four fifths of what is free on a GPU or TPU, and
    no bound on a CPU. It changes no token."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion in tokens, the stop token included.

    logprobs: under the model itself; sampled_logprobs: under the distribution drawn from (tempered, truncated).
    Both float32, one a token. finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    logprobs: np.ndarray
    sampled_logprobs: np.ndarray
    finish_reason: str


@dataclasses.dataclass
class SampleStats:
    """Counts of one call, or of several (`add`).

    samples: those that are finished. prompt_tokens: of the prompts, each counted once. prefill_tokens: positions that
    prefill computed, padding included; a prefix that all prompts share is computed once. new_tokens: drawn, up to and
    with the stop. row_steps: slots x decode steps, `busy_row_steps` and `busy_new_tokens` the same and the tokens drawn
    while prompts were still waiting. compiles: programs that were compiled during the call.
    """

    samples: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    row_steps: int = 0
    busy_row_steps: int = 0
    busy_new_tokens: int = 0
    dispatches: int = 0
    compiles: int = 0
    slots: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """The share of slot steps that drew a token, until the last prompt was taken from the queue. Where all fit in
        the slots at once nothing waits, and it is that of the whole call."""
        if self.busy_row_steps:
            return self.busy_new_tokens / self.busy_row_steps
        return self.new_tokens / max(1, self.row_steps)

    def add(self, other: SampleStats) -> None:
        """Count another call too. Of the slots and the bytes of the cache, the larger number stays."""
        for name, value in dataclasses.asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name in ("slots", "cache_bytes") else mine + value)


def token_limits(
    config: QwenConfig, max_new_tokens: int | None = None, max_prompt_tokens: int | None = None
) -> tuple[int, int]:
    """The most new tokens and the most prompt tokens of one text, so that both fit in the model's positions.

    Args:
        max_new_tokens: default 8192, or half of the model's positions where that is less. max_prompt_tokens: default,
            and upper bound: what the model's positions leave beside `max_new_tokens`.

    Raises:
        InputError: a limit is below 1, or the new tokens leave no position for the prompt.
    """
    positions = config.max_length
    new = min(LONGEST, positions // 2) if max_new_tokens is None else max_new_tokens
    if not 1 <= new < positions:
        raise InputError(
            f"max_new_tokens={new} must be from 1 to {positions - 1}: "
            f"the model has {positions} positions, and the prompt needs some of them"
        )
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise InputError(f"max_prompt_tokens={max_prompt_tokens} must be at least 1")
    return new, min(positions - new, max_prompt_tokens or positions)
