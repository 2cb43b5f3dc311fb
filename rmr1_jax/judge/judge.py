"""The judge: a policy and a prompt, asked which of two answers is better, once or several times, in one order or both.

    judge = Judge(load("runs/grpo/model"), prompt="cor")
    judge.compare("What is 2 + 3?", "It is 5.", "It is 6.").winner

Next: `judge_result.py` for what comes out; `judge_file.py`, which judges files and survives being killed;
`sampler/engine.py` for the sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmr1_jax.errors import RunError
from rmr1_jax.judge.judgement import (
    AnyJudge,
    Judgement,
    check_rule,
    judgement_of,
    nothing_to_judge,
    temperature_for,
    unasked,
)
from rmr1_jax.model.tokenizer import completion_text
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.prompts.cor import get_prompt
from rmr1_jax.prompts.prompt import Prompt
from rmr1_jax.sampler.sample import Sample, SamplingConfig, token_limits

if TYPE_CHECKING:
    from rmr1_jax.policy import Policy


class Judge(AnyJudge):
    """Asks `policy` for a trace on two answers and reads its verdict.

    Args:
        prompt: "cor", "reasoning", "compare", "rubric", a prompt file, or a `Prompt`.
        rule: how a verdict is read, "strict" or "eval" (the published one); see `prompts/verdict.py`.
        max_new_tokens: of one text. Default 8192, or half of the model's positions where that is less.
        max_prompt_tokens: longer prompts are not asked (status "too_long"), never cut. Default, and upper bound: what
            the model's positions leave beside `max_new_tokens`.
        temperature: default 0 (greedy) for one vote, 1.0 for several.
        escape_untrusted: whether imitated delimiters, verdicts and control tokens in the question and the answers are
            escaped (`prompts/escape.py`). Off: they are shown unchanged, as in the published evaluations.
        slots: texts that are written at once, at most. It bounds memory and changes no text.

    Raises:
        InputError: an unknown prompt or rule, or limits that cannot be.
    """

    # What is sampled together shares the shapes of its matrix products, and so the last bits of its logits.
    whole_batches = True

    def __init__(
        self,
        policy: Policy,
        prompt: str | Path | Prompt = "cor",
        *,
        rule: str = "strict",
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        temperature: float | None = None,
        escape_untrusted: bool = True,
        slots: int = 64,
    ):
        limits = token_limits(policy.config, max_new_tokens, max_prompt_tokens)
        self.max_new_tokens, self.max_prompt_tokens = limits
        self.prompt = dataclasses.replace(get_prompt(prompt), escape_untrusted=escape_untrusted)
        self.policy, self.rule = policy, check_rule(rule)
        self.temperature, self.slots = temperature, slots

    def compare(
        self,
        question: str,
        response_a: str,
        response_b: str,
        votes: int = 1,
        both_orders: bool = False,
        seed: int = 0,
    ) -> Judgement:
        """Which of two answers to a question is better; see `compare_many`."""
        return self.compare_many([(question, response_a, response_b)], votes, both_orders, seed)[0]

    def stream(
        self, pairs: Sequence[PreferencePair], votes: int = 1, both_orders: bool = False, seed: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """As `compare_many`: (number of the pair, judgement), each as soon as the last of its texts is there."""
        sampling = self._sampling(votes, seed)
        orders = 2 if both_orders else 1
        asked: list[int] = []  # the pairs that are shown, and below their prompts, one for each order
        prompts: list[list[int]] = []
        for number, pair in enumerate(pairs):
            own = self._prompts(pair, orders)
            if known := nothing_to_judge(pair) or self._too_long(own):
                yield number, known
            else:
                asked.append(number)
                prompts += own
        if not asked:
            return
        texts = [[[""] * votes for _ in range(orders)] for _ in asked]
        tokens = [[[0] * votes for _ in range(orders)] for _ in asked]
        left = [orders * votes] * len(asked)
        for prompt, vote, sample in self._samples(prompts, sampling):
            place, order = divmod(prompt, orders)
            texts[place][order][vote] = completion_text(self.policy.tokenizer, prompts[prompt], sample.token_ids)
            tokens[place][order][vote] = len(sample.token_ids)
            left[place] -= 1
            if not left[place]:
                yield asked[place], judgement_of(texts[place], tokens[place], self.rule)
                texts[place], tokens[place] = [], []  # handed over: memory is for what is in flight

    def _samples(self, prompts: list[list[int]], sampling: SamplingConfig) -> Iterator[tuple[int, int, Sample]]:
        from jax.errors import JaxRuntimeError

        try:
            yield from self.policy.stream(prompts, sampling)
        except JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            raise RunError(
                f"the devices' memory does not do for {self.slots} texts of up to {self.max_new_tokens} tokens, on "
                f"prompts of up to {max(map(len, prompts))}; lower slots, max_new_tokens or max_prompt_tokens, or load "
                f"the model in bfloat16 or over more devices ({str(e).splitlines()[0]:.200})"
            ) from e

    def settings(self, votes: int = 1, both_orders: bool = False, seed: int = 0) -> dict[str, Any]:
        """All that decides a verdict beside the policy and the pairs, as plain values."""
        sampling = self._sampling(votes, seed)
        return {
            "prompt": self.prompt.identity,
            "escape_untrusted": self.prompt.escape_untrusted,
            "rule": self.rule,
            "votes": votes,
            "both_orders": both_orders,
            "seed": seed,
            "temperature": sampling.temperature,
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
        }

    def _sampling(self, votes: int, seed: int) -> SamplingConfig:
        temperature = temperature_for(votes, self.temperature)
        return SamplingConfig(
            n=votes, max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed, slots=self.slots
        )

    def _prompts(self, pair: PreferencePair, orders: int) -> list[list[int]]:
        shown = (pair, pair.swapped())[:orders]
        return [self.policy.tokenizer.render(render_pair(self.prompt, p)) for p in shown]

    def _too_long(self, prompts: list[list[int]]) -> Judgement | None:
        """The judgement of a pair with a prompt that does not fit; None for any other."""
        longest = max(map(len, prompts))
        if longest <= self.max_prompt_tokens:
            return None
        return unasked("too_long", f"the prompt has {longest} tokens, the limit is {self.max_prompt_tokens}")
