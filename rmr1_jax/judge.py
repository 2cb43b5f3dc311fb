"""The judge: a policy and a prompt, asked which of two answers is better, once or several times, in one order or both.

    judge = Judge(load("runs/grpo/model"), prompt="cor")
    judge.compare("What is 2 + 3?", "It is 5.", "It is 6.").winner

Next: `judge_file.py`, which judges files and survives being killed; `prompts/verdict.py` for the rules that read a
verdict; `sampler/engine.py` for the sampling.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rmr1_jax.data.preferences import PreferencePair, render_pair
from rmr1_jax.errors import InputError
from rmr1_jax.policy import Policy
from rmr1_jax.prompts.cor import Prompt, get_prompt
from rmr1_jax.prompts.trace import Trace, parse_trace
from rmr1_jax.prompts.verdict import eval_verdict, strict_verdict
from rmr1_jax.sampler.config import SamplingConfig

RULES = MappingProxyType({"strict": strict_verdict, "eval": eval_verdict})
STATUSES = ("ok", "tie", "invalid", "too_long")
LONGEST = 8192  # new tokens, the published response length
_SWAP = {"A": "B", "B": "A", None: None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the judge found.

    winner: "A", "B", or None unless `status` is "ok". status: "ok"; "tie": the votes or the two orders disagree, or
    both answers are empty; "invalid": no text has a verdict; "too_long": the prompt does not fit, nothing was asked.
    text: the first text that names the winner, else the first one; trace: its parts. votes: {"A", "B", "invalid"} ->
    count, over all texts. note: what there is to say beside that, such as why nothing was asked.
    """

    winner: str | None
    status: str
    trace: Trace
    text: str
    votes: Mapping[str, int]
    note: str | None = None


class Judge:
    """Asks `policy` for a trace on two answers and reads its verdict.

    Args:
        prompt: "cor", "reasoning", "compare", "rubric", a prompt file, or a `Prompt`.
        rule: how a verdict is read, "strict" or "eval" (the published one); see `prompts/verdict.py`.
        max_new_tokens: of one text. Default 8192, or half of the model's positions where that is less.
        max_prompt_tokens: longer prompts are not asked (status "too_long"), never cut. Default, and upper bound: what
            the model's positions leave beside `max_new_tokens`.
        temperature: default 0 (greedy) for one vote, 1.0 for several.
        slots: texts that are written at once, at most. It bounds memory and changes no text.

    Raises:
        InputError: an unknown prompt or rule, or limits that cannot be.
    """

    def __init__(
        self,
        policy: Policy,
        prompt: str | Path | Prompt = "cor",
        *,
        rule: str = "strict",
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        temperature: float | None = None,
        slots: int = 64,
    ):
        if rule not in RULES:
            raise InputError(f"rule={rule!r} is not known; give one of {', '.join(RULES)}")
        positions = policy.config.max_position_embeddings
        positions = min(positions, policy.config.sliding_window or positions)
        self.max_new_tokens = min(LONGEST, positions // 2) if max_new_tokens is None else max_new_tokens
        if not 1 <= self.max_new_tokens < positions:
            raise InputError(
                f"max_new_tokens={self.max_new_tokens} must be from 1 to {positions - 1}: "
                f"the model has {positions} positions, and the prompt needs some of them"
            )
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise InputError(f"max_prompt_tokens={max_prompt_tokens} must be at least 1")
        self.max_prompt_tokens = min(positions - self.max_new_tokens, max_prompt_tokens or positions)
        self.policy, self.prompt, self.rule = policy, get_prompt(prompt), rule
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

    def compare_many(
        self,
        pairs: Sequence[PreferencePair | tuple[str, str, str]],
        votes: int = 1,
        both_orders: bool = False,
        seed: int = 0,
        *,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Judgement]:
        """A judgement of each pair, in order.

        Args:
            pairs: `PreferencePair`s, or (question, response_a, response_b).
            votes: texts for each order. The majority of the valid verdicts wins; equally many are a tie.
            both_orders: ask about (A, B) and about (B, A). Both orders must name the same winner, else it is a tie; an
                order that has none (its votes are split, or none is valid) leaves it to the other.
            seed: of the sampling. A text depends on the seed, its prompt and its number, not on the other pairs.
            on_done: called with the number of pairs that were finished since the last call (a progress bar).
        """
        sampling = self._sampling(votes, seed)
        orders = 2 if both_orders else 1
        shown = [_as_pair(pair, number) for number, pair in enumerate(pairs)]
        prompts = [self._prompts(pair, orders) for pair in shown]
        settled = [self._unasked(pair, own) for pair, own in zip(shown, prompts, strict=True)]
        flat = [ids for own, known in zip(prompts, settled, strict=True) if known is None for ids in own]
        tell = on_done or (lambda count: None)
        tell(len(pairs) - len(flat) // orders)
        if not flat:
            return [known for known in settled if known]
        groups, _ = self.policy.generate(flat, sampling, on_done=_per_pair(tell, orders))
        texts = [[self._text(ids, s.token_ids) for s in group] for ids, group in zip(flat, groups, strict=True)]
        asked = (self._judgement(texts[first : first + orders]) for first in range(0, len(texts), orders))
        return [known or next(asked) for known in settled]

    def settings(self, votes: int = 1, both_orders: bool = False, seed: int = 0) -> dict[str, Any]:
        """All that decides a verdict beside the policy and the pairs, as plain values."""
        sampling = self._sampling(votes, seed)
        told = json.dumps([self.prompt.system, self.prompt.single_turn, self.prompt.multi_turn])
        return {
            "prompt": f"{self.prompt.name} (sha256 {hashlib.sha256(told.encode()).hexdigest()[:16]})",
            "rule": self.rule,
            "votes": votes,
            "both_orders": both_orders,
            "seed": seed,
            "temperature": sampling.temperature,
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
        }

    def _sampling(self, votes: int, seed: int) -> SamplingConfig:
        if votes < 1:
            raise InputError(f"votes={votes} must be at least 1")
        if votes > 1 and self.temperature == 0:
            raise InputError(
                f"votes={votes} with temperature=0 would count one text {votes} times; raise it or drop it"
            )
        temperature = float(votes > 1) if self.temperature is None else float(self.temperature)
        return SamplingConfig(
            n=votes, max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed, slots=self.slots
        )

    def _prompts(self, pair: PreferencePair, orders: int) -> list[list[int]]:
        shown = (pair, pair.swapped())[:orders]
        return [self.policy.tokenizer.render(render_pair(self.prompt, p)) for p in shown]

    def _unasked(self, pair: PreferencePair, prompts: list[list[int]]) -> Judgement | None:
        """The judgement of a pair that is not shown to the policy; None for one that is."""
        longest = max(map(len, prompts))
        if pair.meta.get("both_empty"):
            status, note = "tie", "both answers are empty"
        elif longest > self.max_prompt_tokens:
            status, note = "too_long", f"the prompt has {longest} tokens, the limit is {self.max_prompt_tokens}"
        else:
            return None
        return Judgement(winner=None, status=status, trace=Trace(), text="", votes=_counts([]), note=note)

    def _text(self, prompt: list[int], token_ids: list[int]) -> str:
        text = self.policy.tokenizer.decode(token_ids)
        # A thought that the chat template opens belongs to the text: one that never ends must not pass for a judgement.
        opened = self.policy.tokenizer.decode(prompt[-16:]).rstrip().endswith("<think>")
        return f"<think>\n{text}" if opened else text

    def _judgement(self, texts: list[list[str]]) -> Judgement:
        """From the texts of the order (A, B) and, where it was asked for, of the order (B, A)."""
        read = RULES[self.rule]
        verdicts = [[read(text) for text in texts[0]], *([_SWAP[read(t)] for t in order] for order in texts[1:])]
        winner, status = settle(verdicts)
        flat = list(itertools.chain(*verdicts))
        shown = flat.index(winner) if winner else 0
        note = "the text saw the two answers in the other order" if shown >= len(texts[0]) else None
        text = list(itertools.chain(*texts))[shown]
        return Judgement(
            winner=winner, status=status, trace=parse_trace(text), text=text, votes=_counts(flat), note=note
        )


def settle(verdicts: Sequence[Sequence[str | None]]) -> tuple[str | None, str]:
    """Verdicts by order, in the caller's letters -> (winner, status)."""
    counts = [Counter(v for v in order if v) for order in verdicts]
    winners = {"A" if c["A"] > c["B"] else "B" for c in counts if c["A"] != c["B"]}
    if len(winners) == 1:
        return winners.pop(), "ok"
    return None, "tie" if any(counts) else "invalid"


def _counts(verdicts: Sequence[str | None]) -> dict[str, int]:
    return {"A": verdicts.count("A"), "B": verdicts.count("B"), "invalid": verdicts.count(None)}


def _as_pair(pair: PreferencePair | Sequence[str], number: int) -> PreferencePair:
    if isinstance(pair, PreferencePair):
        return pair
    if isinstance(pair, Sequence) and len(pair) == 3 and all(isinstance(text, str) for text in pair):
        return PreferencePair.from_answers(str(number), *pair)
    raise InputError(f"pair {number} is {pair!r:.80}; expected a PreferencePair or (question, response_a, response_b)")


def _per_pair(tell: Callable[[int], None], orders: int) -> Callable[[int], None]:
    """A callback that counts prompts and tells pairs."""
    prompts = 0

    def on_done(count: int) -> None:
        nonlocal prompts
        before, prompts = prompts, prompts + count
        tell(prompts // orders - before // orders)

    return on_done
