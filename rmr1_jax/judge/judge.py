"""The judge: a policy and a prompt, asked which of two answers is better, once or several times, in one order or both.

    judge = Judge(load("runs/grpo/model"), prompt="cor")
    judge.compare("What is 2 + 3?", "It is 5.", "It is 6.").winner

Next: `file.py`, which judges whole files and continues after a kill; `sampler/engine.py` for the sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmr1_jax.errors import RunError
from rmr1_jax.judge.judgement import (
    Judgement,
    JudgeSampling,
    Pending,
    Text,
    TextJudge,
    Voting,
    judgement_of,
    known_tie,
    too_long,
)
from rmr1_jax.model.tokenizer import completion_text
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.prompts.prompt import Prompt, own_prompt
from rmr1_jax.sampler.layout import default_slots
from rmr1_jax.sampler.sample import Sample, SamplingConfig, token_limits

if TYPE_CHECKING:
    from rmr1_jax.policy import Policy


class Judge(TextJudge):
    """Samples a trace on the two answers from `policy` and reads the verdict from it.

    Args:
        prompt: "cor", "reasoning", "compare", "rubric", a prompt file, or a `Prompt`. Default: prompt.yaml beside the
            loaded model, which training writes, or "cor" if there is none.
        rule: how a verdict is read, "strict" or "eval" (the published rule); see `prompts/verdict.py`.
        max_new_tokens: limit of one text. Default: 8192, or half of the model's positions if that is less.
        max_prompt_tokens: pairs with a longer prompt get the status "too_long"; a prompt is never cut. Default and
            upper bound: the positions that `max_new_tokens` leaves.
        temperature: default 0 (greedy) for one vote and 1 for several.
        top_p, top_k, min_p: which tokens can be drawn, see `sampler.sample.Truncation`; they need a temperature.
        escape_untrusted: whether imitated delimiters, verdicts and control tokens in the question and the answers are
            escaped (`prompts/escape.py`). Off: they are shown unchanged, as in the published evaluations.
        slots: how many texts each process samples at once, at most. It bounds memory and changes no text. Default: 64
            for each copy of the weights.

    Raises:
        InputError: an unknown prompt or rule, or limits that do not fit the model.
    """

    # Texts that are sampled together share the shapes of their matrix products, and so the last bits of their logits.
    whole_batches = True

    def __init__(
        self,
        policy: Policy,
        prompt: str | Path | Prompt | None = None,
        *,
        rule: str = "strict",
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        escape_untrusted: bool = True,
        slots: int | None = None,
    ):
        limits = token_limits(policy.config, max_new_tokens, max_prompt_tokens)
        self.max_new_tokens, self.max_prompt_tokens = limits
        sampling = JudgeSampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
        if prompt is None:
            prompt = own_prompt(policy.tokenizer.directory) or "cor"
        super().__init__(prompt, rule, sampling, escape_untrusted)
        self.policy, self.slots = policy, default_slots(policy.mesh) if slots is None else slots

    def __repr__(self) -> str:
        return self.described(f"{self.policy}")

    def stream(self, pairs: Sequence[PreferencePair], voting: Voting) -> Iterator[tuple[int, Judgement]]:
        """Yield (index of the pair, its judgement), each as soon as the last of its texts is sampled."""
        sampling = self._sampling(voting)
        prompts: list[list[int]] = []
        places: list[tuple[int, int]] = []  # of each prompt: the index of its pair, and the order
        for number, pair in enumerate(pairs):
            rows = [self.policy.tokenizer.render(render_pair(self.prompt, shown)) for shown in voting.shown(pair)]
            if found := known_tie(pair) or too_long("the prompt", rows, self.max_prompt_tokens):
                yield number, found
            else:
                prompts += rows
                places += [(number, order) for order in range(len(rows))]
        if not prompts:
            return
        pending = Pending[Text](voting)
        for index, vote, sample in self._samples(prompts, sampling):
            text = completion_text(self.policy.tokenizer, prompts[index], sample.token_ids)
            if texts := pending.add(*places[index], vote, Text(text, len(sample.token_ids), sample.finish_reason)):
                yield places[index][0], judgement_of(texts, self.rule)

    def settings(self, voting: Voting) -> dict[str, Any]:
        limits = {"max_new_tokens": self.max_new_tokens, "max_prompt_tokens": self.max_prompt_tokens}
        found = {**self.text_settings(), **dataclasses.asdict(voting), **self.sampling.settled(voting), **limits}
        arguments = dict(self.policy.tokenizer.chat_template_kwargs)
        return found | ({"chat_template_kwargs": arguments} if arguments else {})

    def _samples(self, prompts: list[list[int]], sampling: SamplingConfig) -> Iterator[tuple[int, int, Sample]]:
        """(index of the prompt, vote, sample) in the order in which samples are finished."""
        from jax.errors import JaxRuntimeError

        try:
            yield from self.policy.stream(prompts, sampling)
        except JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            raise RunError(
                f"the devices' memory is too small for {self.slots} texts of up to {self.max_new_tokens} tokens, on "
                f"prompts of up to {max(map(len, prompts))}; lower slots, max_new_tokens or max_prompt_tokens, or load "
                f"the model in bfloat16 or over more devices ({str(e).splitlines()[0]:.200})"
            ) from e

    def _sampling(self, voting: Voting) -> SamplingConfig:
        return SamplingConfig(
            n=voting.votes,
            max_new_tokens=self.max_new_tokens,
            seed=voting.seed,
            slots=self.slots,
            **self.sampling.settled(voting),
        )
