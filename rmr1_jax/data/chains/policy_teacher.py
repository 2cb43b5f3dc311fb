"""A policy of ours as the teacher of its own kind: rejection sampling, for `rmr1 data chains`.

It writes one text on each pair that is still open; what is right and valid is kept (`data/teacher.py`), and the rest is
asked again with another draw.

Next: `data/teacher.py`, which calls this; `judge.py`, whose limits it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rmr1_jax.data.chains.chains import PolicyConfig
from rmr1_jax.endpoint import Answer, Request
from rmr1_jax.files.append import model_digest
from rmr1_jax.model.tokenizer import completion_text
from rmr1_jax.sampler.sample import SamplingConfig, token_limits

if TYPE_CHECKING:
    from rmr1_jax.policy import Policy


class PolicyTeacher:
    """Answers with `policy`. A text depends on its prompt, the seed and the try; batches are its requests' order."""

    def __init__(self, config: PolicyConfig, policy: Policy):
        self.config, self.policy = config, policy
        self._max_new_tokens, self._max_prompt_tokens = token_limits(policy.config, config.max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """All that decides an answer, as plain values."""
        directory = self.policy.tokenizer.directory
        weights = model_digest(directory)
        told = {name: getattr(self.config, name) for name in ("dtype", "temperature", "seed")}
        return {"model": f"{directory.name} (sha256 {weights})", "max_new_tokens": self._max_new_tokens, **told}

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        """(key, answer) for each request, batch by batch, as they are finished. One that is too long for the model
        beside its answer is refused."""
        requests = iter(requests)
        while batch := list(itertools.islice(requests, self.config.batch_size)):
            for number, same in itertools.groupby(batch, key=lambda request: request.number):
                yield from self._ask(list(same), number)

    def _ask(self, requests: list[Request], number: int) -> Iterator[tuple[Any, Answer]]:
        longest = self._max_prompt_tokens
        fitting, prompts = [], []
        for request in requests:
            prompt = self.policy.tokenizer.render(request.messages)
            if len(prompt) > longest:
                error = f"the prompt has {len(prompt)} tokens, the limit is {longest}"
                yield request.key, Answer(error=error, failure="refused")
            else:
                fitting.append(request)
                prompts.append(prompt)
        if not fitting:
            return
        sampling = SamplingConfig(
            max_new_tokens=self._max_new_tokens,
            temperature=self.config.temperature,
            seed=self.config.seed + number,
            slots=self.config.slots,
        )
        for k, _, sample in self.policy.stream(prompts, sampling):
            yield (
                fitting[k].key,
                Answer(
                    text=completion_text(self.policy.tokenizer, prompts[k], sample.token_ids),
                    finish_reason=sample.finish_reason,
                    prompt_tokens=len(prompts[k]),
                    completion_tokens=len(sample.token_ids),
                ),
            )
