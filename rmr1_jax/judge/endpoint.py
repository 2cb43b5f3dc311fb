"""A judge behind any endpoint of the OpenAI protocol: the same prompts, rules, rows and scores as for a policy of ours.

    judge = EndpointJudge(Endpoint(EndpointConfig(model="gpt-4o", max_tokens=2048)), prompt="cor")
    judge.compare_many(pairs)

Next: `data/endpoint.py`, which asks; `judge_result.py`, which reads the texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmr1_jax.endpoint import Answer, Endpoint, Request
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
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.prompts.cor import get_prompt
from rmr1_jax.prompts.prompt import Prompt

# What endpoints say of a prompt that does not fit: OpenAI's code, and the words of OpenAI, vLLM, SGLang and others.
_TOO_LONG = ("context_length_exceeded", "context length", "context window", "too long", "too many tokens")


class EndpointJudge(AnyJudge):
    """Asks `endpoint` for a trace on two answers and reads its verdict; see `judge.Judge` for prompt and rule.

    temperature: default 0 for one vote, 1.0 for several. The endpoint's own setting is not used.
    escape_untrusted: whether the question and the answers are escaped (`prompts/escape.py`); off, they are shown
    unchanged, as in the published evaluations. Many servers read control tokens inside a message, so leave it on unless
    published numbers are to be reproduced.

    Raises:
        InputError: an unknown prompt or rule.
    """

    whole_batches = False  # each text is asked for on its own

    def __init__(
        self,
        endpoint: Endpoint,
        prompt: str | Path | Prompt = "cor",
        *,
        rule: str = "strict",
        temperature: float | None = None,
        escape_untrusted: bool = True,
    ):
        self.prompt = dataclasses.replace(get_prompt(prompt), escape_untrusted=escape_untrusted)
        self.endpoint, self.rule, self.temperature = endpoint, check_rule(rule), temperature
        self._endpoints: dict[tuple[float, int | None], Endpoint] = {}

    def stream(
        self, pairs: Sequence[PreferencePair], votes: int = 1, both_orders: bool = False, seed: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """(number of the pair, judgement), each as soon as the last of its answers is there.

        A prompt that the endpoint finds too long gives the status "too_long"; another request that it refuses for good
        (a content filter, say) is a text without a verdict, with its words in the note.

        Raises:
            InputError: the endpoint takes no request of this kind. RunError: it fails again and again; or, after all
                other pairs, some got no answer.
        """
        orders = 2 if both_orders else 1
        asked: list[int] = []
        for number, pair in enumerate(pairs):
            if known := nothing_to_judge(pair):
                yield number, known
            else:
                asked.append(number)
        answers: dict[int, dict[tuple[int, int], Answer]] = {}
        given_up: dict[int, str | None] = {}  # the pairs without a row, and why
        requests = (
            Request((number, order, vote), messages, vote)
            for number in asked
            for order, shown in enumerate((pairs[number], pairs[number].swapped())[:orders])
            for messages in [render_pair(self.prompt, shown)]
            for vote in range(votes)
        )
        for (number, order, vote), answer in self._sampling(votes, seed).ask(requests):
            if answer.failure == "gave_up":  # better no row of the pair than a wrong one
                given_up[number] = answer.error
            own = answers.setdefault(number, {})
            own[order, vote] = answer
            if len(own) == orders * votes:
                if number not in given_up:
                    yield number, self._judgement([[own[o, v] for v in range(votes)] for o in range(orders)])
                del answers[number]
        if given_up:
            raise RunError(
                f"{self.endpoint.name}: no answer for {len(given_up)} pairs, for one of them: "
                f"{next(iter(given_up.values()))}; run the same command again"
            )

    def settings(self, votes: int = 1, both_orders: bool = False, seed: int = 0) -> dict[str, Any]:
        """All that decides a verdict beside the pairs, as plain values; no key among them."""
        told = self._sampling(votes, seed).settings()
        own = {"prompt": self.prompt.identity, "escape_untrusted": self.prompt.escape_untrusted, "rule": self.rule}
        return {"kind": "endpoint", **told, **own, "votes": votes, "both_orders": both_orders, "seed": seed}

    def _sampling(self, votes: int, seed: int) -> Endpoint:
        """The endpoint with this call's temperature, and with a seed where there is something to draw."""
        temperature = temperature_for(votes, self.temperature)
        drawn = seed if temperature else None
        if (temperature, drawn) not in self._endpoints:  # one for all batches: it knows whether it ever answered
            config = dataclasses.replace(self.endpoint.config, temperature=temperature, seed=drawn)
            self._endpoints[temperature, drawn] = Endpoint(config)
        return self._endpoints[temperature, drawn]

    def _judgement(self, answers: list[list[Answer]]) -> Judgement:
        """From the answers by order and vote."""
        errors = [answer.error for own in answers for answer in own if answer.error]
        if any(words in error.lower() for error in errors for words in _TOO_LONG):
            return unasked("too_long", f"the endpoint refused it: {errors[0]}")
        texts = [[answer.text for answer in own] for own in answers]
        found = judgement_of(texts, [[answer.completion_tokens for answer in own] for own in answers], self.rule)
        if not any(count for own in found.tokens for count in own):
            found = dataclasses.replace(found, tokens=())  # the endpoint does not say
        if errors:
            found = dataclasses.replace(found, note=f"{len(errors)} texts were refused: {errors[0]}")
        return found
