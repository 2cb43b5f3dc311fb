"""A model of this package as the teacher of its own chains (rejection sampling), for `rmr1 data chains`.

Next: `chains.py`, which calls this; `judge/judge.py`, which has the same limits of length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from rmr1_jax.data.chains.chains import PolicyConfig
from rmr1_jax.distributed.exchange import this_process
from rmr1_jax.endpoint import Request
from rmr1_jax.files.append import model_digest
from rmr1_jax.model.tokenizer import completion_text
from rmr1_jax.policy import Policy
from rmr1_jax.prompts.prompt import Prompt, own_prompt
from rmr1_jax.reply import Answer
from rmr1_jax.sampler.layout import default_slots
from rmr1_jax.sampler.sample import SamplingConfig, token_limits


class PolicyTeacher:
    """Answers with `policy`. A text depends only on its prompt, the seed and the try."""

    def __init__(self, config: PolicyConfig, policy: Policy):
        self.config, self.policy = config, policy
        self._max_new_tokens, self._max_prompt_tokens = token_limits(policy.config, config.max_new_tokens)

    @property
    def own_prompt(self) -> Prompt | None:
        """The policy's own prompt, which training writes into a model's directory; None without one."""
        return own_prompt(self.policy.tokenizer.directory)

    def settings(self) -> dict[str, Any]:
        """Everything that decides an answer, as plain values."""
        directory = self.policy.tokenizer.directory
        sampling = {name: getattr(self.config, name) for name in ("dtype", "temperature", "seed")}
        model = f"{directory.name} (sha256 {model_digest(directory)})"
        arguments = dict(self.policy.tokenizer.chat_template_kwargs)
        more = {"chat_template_kwargs": arguments} if arguments else {}
        return {"model": model, "max_new_tokens": self._max_new_tokens, **sampling, **more}

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        """Yield (key, answer) for each request, batch by batch, as they finish. A request whose prompt leaves no room
        for the answer is refused."""
        for number, same in itertools.groupby(requests, key=lambda request: request.number):
            while batch := list(itertools.islice(same, -(-self.config.batch_size // this_process()[1]))):
                yield from self._ask(batch, number)

    def _ask(self, requests: list[Request], number: int) -> Iterator[tuple[Any, Answer]]:
        asked = []
        for request in requests:
            prompt = self.policy.tokenizer.render(request.messages)
            if len(prompt) > self._max_prompt_tokens:
                limit = f"policy.max_new_tokens={self._max_new_tokens} leaves {self._max_prompt_tokens}"
                error = f"the prompt has {len(prompt)} tokens, and {limit}"
                yield request.key, Answer(error=error, failure="too_long")
            else:
                asked.append((request.key, prompt))
        if not asked:
            return
        sampling = SamplingConfig(
            max_new_tokens=self._max_new_tokens,
            temperature=self.config.temperature,
            seed=self.config.seed + number,
            slots=self.config.slots or default_slots(self.policy.mesh),
        )
        for k, _, sample in self.policy.stream([prompt for _, prompt in asked], sampling):
            key, prompt = asked[k]
            answer = Answer(
                text=completion_text(self.policy.tokenizer, prompt, sample.token_ids),
                finish_reason=sample.finish_reason,
                prompt_tokens=len(prompt),
                completion_tokens=len(sample.token_ids),
            )
            yield key, answer
