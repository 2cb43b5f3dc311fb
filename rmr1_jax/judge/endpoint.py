"""A judge behind any endpoint of the OpenAI protocol: the same prompts, rules, rows and scores as for our policies.

    judge = EndpointJudge(Endpoint(EndpointConfig(model="gpt-4o", max_tokens=2048)), prompt="cor")
    judge.compare_many(pairs)

Next: `rmr1_jax/endpoint.py`, which sends the requests; `judgement.py`, which reads the texts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmr1_jax.endpoint import Endpoint, Request
from rmr1_jax.judge.judgement import (
    Judgement,
    JudgeSampling,
    Pending,
    Text,
    TextJudge,
    Voting,
    judgement_of,
    known_tie,
    not_asked,
)
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.prompts.prompt import Prompt
from rmr1_jax.reply import Answer, Unanswered
from rmr1_jax.sampler.sample import Truncation


class EndpointJudge(TextJudge):
    """Requests a trace on the two answers from `endpoint` and reads the verdict from it.

    The other arguments are those of `judge.Judge`. truncation: sent as top_p, top_k and min_p, those that are set; not
    every server takes the last two. The temperature in the endpoint's configuration is not used. Many servers read
    control tokens inside a message, so leave `escape_untrusted` on unless published numbers are to be reproduced.

    Raises:
        InputError: an unknown prompt or rule.
    """

    whole_batches = False  # each text has a request of its own

    def __init__(
        self,
        endpoint: Endpoint,
        prompt: str | Path | Prompt = "cor",
        *,
        rule: str = "strict",
        temperature: float | None = None,
        truncation: Truncation | None = None,
        escape_untrusted: bool = True,
    ):
        sampling = JudgeSampling(temperature=temperature, **(truncation.given() if truncation else {}))
        super().__init__(prompt, rule, sampling, escape_untrusted)
        self.endpoint = endpoint
        self._endpoints: dict[tuple[float, int | None], Endpoint] = {}

    def __repr__(self) -> str:
        return self.described(self.endpoint.name)

    def stream(self, pairs: Sequence[PreferencePair], voting: Voting) -> Iterator[tuple[int, Judgement]]:
        """Yield (index of the pair, its judgement), each as soon as the last of its answers has come.

        A prompt that the endpoint finds too long gives the status "too_long". A pair for which a request fails, or is
        refused for another reason (by a content filter, for example), gets no judgement: no row is better than a wrong
        one. With `accept_refusals` in the endpoint's configuration, a refused request is a text without a verdict, with
        the endpoint's error in the note.

        Raises:
            InputError: the endpoint takes no request of this kind. RunError: it fails again and again. Unanswered:
                after all other pairs, some pairs got no judgement.
        """
        asked: list[int] = []
        for number, pair in enumerate(pairs):
            if found := known_tie(pair):
                yield number, found
            else:
                asked.append(number)
        requests = (
            Request((number, order, vote), messages, vote)
            for number in asked
            for order, shown in enumerate(voting.shown(pairs[number]))
            for messages in [render_pair(self.prompt, shown)]
            for vote in range(voting.votes)
        )
        pending = Pending[Answer](voting)
        failures: dict[str, Answer] = {}
        for (number, order, vote), answer in self._sampling(voting).ask(requests):
            if not (answers := pending.add(number, order, vote, answer)):
                continue
            texts = list(itertools.chain(*answers))
            lost = [text for text in texts if not text.settles(self.endpoint.config.accept_refusals)]
            if lost and all(text.failure != "too_long" for text in texts):
                failures[pairs[number].id] = lost[0]
            else:
                yield number, self._judgement(answers)
        if failures:
            raise Unanswered(self.endpoint.name, failures)

    def settings(self, voting: Voting) -> dict[str, Any]:
        """Everything that decides a verdict besides the pairs, as plain values; the API key is not among them."""
        sampling = self._sampling(voting).settings()
        return {"kind": "endpoint", **sampling, **self.text_settings(), **dataclasses.asdict(voting)}

    def _sampling(self, voting: Voting) -> Endpoint:
        """The endpoint with the sampling for `voting`, and with the seed if something is drawn."""
        truncation = self.sampling.settled(voting)
        temperature = truncation.pop("temperature")
        seed = voting.seed if temperature else None
        if (temperature, seed) not in self._endpoints:  # kept over batches: it knows whether it ever got an answer
            config = self.endpoint.config
            sent = {"temperature": temperature, "seed": seed, "extra": {**config.extra, **truncation}}
            config = dataclasses.replace(config, **sent)
            self._endpoints[temperature, seed] = Endpoint(config)
        return self._endpoints[temperature, seed]

    def _judgement(self, answers: list[list[Answer]]) -> Judgement:
        """The judgement from the answers by order and vote."""
        errors = [answer.error for own in answers for answer in own if answer.error]
        if long := [a.error for own in answers for a in own if a.failure == "too_long"]:
            return not_asked("too_long", f"the endpoint refused it: {long[0]}")
        # A thought weighs both verdicts: only the answer after it counts, also by the published rule.
        texts = [
            [Text(a.full_text, a.completion_tokens, a.failure or a.finish_reason, a.text) for a in own]
            for own in answers
        ]
        found = judgement_of(texts, self.rule)
        if not any(itertools.chain(*found.tokens)):
            found = dataclasses.replace(found, tokens=())  # the endpoint does not report token counts
        if errors:
            found = dataclasses.replace(found, note=f"{len(errors)} texts were refused: {errors[0]}")
        return found
