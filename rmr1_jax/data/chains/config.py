"""The settings of `rmr1 data chains`.

Next: `chains.py`, which runs with them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from rmr1_jax.config import config_dataclass
from rmr1_jax.endpoint import EndpointConfig
from rmr1_jax.errors import InputError


@config_dataclass
class PolicyConfig:
    """A model of this package as the teacher. model: a directory or a hub id. temperature: 0 is greedy. max_new_tokens:
    of one text; None: 8192, or half of the model's positions if that is less. batch_size: the pairs that are handed to
    the sampler at a time. slots: the most texts that are sampled at the same time."""

    model: str
    dtype: str = "bfloat16"
    temperature: NonNegativeFloat = 1.0
    max_new_tokens: PositiveInt | None = None
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 256
    slots: PositiveInt = 64


@config_dataclass
class ChainsConfig:
    """One run of `rmr1 data chains`.

    pairs: a file or folder of pairs whose better answer is known, such as a mixture's pairs.jsonl. prompt: by name or
    file. escape_untrusted: whether the texts of the pairs are escaped (`prompts/escape.py`); by default they are shown
    unchanged, like all other training rows. teacher or policy: the model of the first pass. second: the model of the
    second pass; None: no second pass. tries: attempts of the first pass at a pair. keep_thinking: whether the text
    before `</think>` belongs to the chain. budget_requests, budget_tokens: no request begins when `out` has used that
    many, over all runs; tokens of prompts and answers count, retries after an error do not. on_bad_row: "error", or
    "quarantine" bad rows into OUT/rejects.jsonl. seed: decides the order of chosen and rejected answers, where the rows
    fix none.
    """

    pairs: str
    out: str
    prompt: str = "cor"
    escape_untrusted: bool = False
    teacher: EndpointConfig | None = None
    policy: PolicyConfig | None = None
    second: EndpointConfig | None = None
    tries: PositiveInt = 1
    keep_thinking: bool = False
    budget_requests: PositiveInt | None = None
    budget_tokens: PositiveInt | None = None
    on_bad_row: Literal["error", "quarantine"] = "error"
    seed: NonNegativeInt = 0

    def __post_init__(self):
        if (self.teacher is None) == (self.policy is None):
            raise InputError("give either teacher (an endpoint) or policy (a model of this package), and not both")
        if self.tries > 1 and (self.teacher or self.policy).temperature == 0:
            raise InputError(f"tries={self.tries} with temperature=0 would ask for the same text {self.tries} times")
