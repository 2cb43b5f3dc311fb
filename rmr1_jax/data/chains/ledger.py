"""The attempts at each pair, why a chain was rejected, and the counts of a run.

A chain is accepted if it is right, valid and does not reveal that the verdict was given. It is rejected as

| reason | condition |
|---|---|
| refused | the prompt is too long, or the endpoint refuses it and its config has accept_refusals |
| cut | the text ends at its limit of length |
| wrong | `[[X]]` for the better answer X is not in the last 100 characters, the published rule |
| invalid | it does not have the form that the prompt asks for, does not end with its one answer, or has no reasoning |
| telling | second pass: it reveals that the verdict was given (`correction.py`) |

Next: `chains.py`, which asks the teachers; `prompts/trace.py`, which parses the form of a chain.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rmr1_jax.config import build_config
from rmr1_jax.data.chains.correction import revealing_words
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.thought import after_thinking
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import strict_verdict
from rmr1_jax.reply import Answer

LAST_CHARS = 100  # at the end of a chain, where the published rule looks for the verdict
REASONS = ("refused", "cut", "wrong", "invalid", "telling")
STATES = ("right_at_first", "right_at_second", "failed", "open")

Turn = tuple[int, int]  # the pass, 1 or 2, and the number of the try in it, from 0


class Rejection(NamedTuple):
    """Why a chain is rejected: one of `REASONS`, and the words that the second teacher reads."""

    reason: str
    words: str


class Attempt(NamedTuple):
    """One answer about one pair, its turn, and why its chain was rejected; None: it was not checked, or accepted."""

    turn: Turn
    answer: Answer
    rejection: Rejection | None = None


class PairAttempts:
    """A pair and all attempts at it, in order.

    Args:
        structure: the structure of a valid chain, a key of `trace.STRUCTURES`. turns: the attempts that a pair gets
            until one is accepted. keep_thinking: whether the text before `</think>` belongs to the chain.
    """

    def __init__(self, pair: PreferencePair, structure: str, turns: Sequence[Turn], keep_thinking: bool = False):
        self.pair, self.structure, self.turns, self.keep_thinking = pair, structure, turns, keep_thinking
        self.attempts: list[Attempt] = []

    @property
    def accepted(self) -> Attempt | None:
        """The accepted attempt, which is always the last one."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].rejection is None else None

    @property
    def state(self) -> str:
        """One of `STATES`; "open" while there is an attempt left."""
        if self.accepted:
            return "right_at_first" if self.accepted.turn[0] == 1 else "right_at_second"
        nothing_to_judge = self.pair.identical or "both_empty" in self.pair.meta
        return "failed" if nothing_to_judge or len(self.attempts) == len(self.turns) else "open"

    @property
    def next_turn(self) -> Turn | None:
        return self.turns[len(self.attempts)] if self.state == "open" else None

    def add(self, attempt: Attempt) -> None:
        """Check the next attempt and append it. ValueError if its turn is not `next_turn`."""
        if attempt.turn != self.next_turn:
            raise ValueError(f"pair {self.pair.id!r}: pass, try {attempt.turn}, expected {self.next_turn}")
        self.attempts.append(attempt._replace(rejection=self._check(attempt)))

    def chain(self, attempt: Attempt) -> str:
        """The chain in an answer."""
        text = attempt.answer.text
        return (attempt.answer.full_text if self.keep_thinking else text[after_thinking(text) :]).strip()

    def _check(self, attempt: Attempt) -> Rejection | None:
        answer, right, chain = attempt.answer, self.pair.better, self.chain(attempt)
        if answer.error:
            return Rejection("refused", "there was no answer")
        if answer.finish_reason == "length":
            return Rejection("cut", "it was too long and was cut off")
        if f"[[{right}]]" not in chain[-LAST_CHARS:]:
            return Rejection("wrong", f"its verdict is not the right one, [[{right}]]")
        trace = parse_trace(chain)
        missing = ", ".join(trace.missing(self.structure))
        if flaws := f"it lacks: {missing}" if missing else "; ".join(trace.flaws):
            return Rejection("invalid", f"its form is not the one asked for ({flaws})")
        # A policy learns from chains, and the reward of training reads the published spelling only.
        spelled = f"<answer>[[{right}]]</answer>" in chain[-LAST_CHARS:] and chain.endswith(">")
        if strict_verdict(chain) != right or not spelled:
            return Rejection("invalid", "it does not end with one clear verdict")
        if not chain[: chain.rfind("<answer>")].strip():
            return Rejection("invalid", "it has a verdict and no reasoning")
        if attempt.turn[0] == 2 and (words := revealing_words(chain)):
            return Rejection("telling", f"it speaks of what it was told ({words!r})")
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """The content of ledger.json: read = right_at_first + right_at_second + failed + open.

    requests: answers that the teachers gave; retries: further requests that it took. attempts: for each turn {"pass",
    "try", "asked", "right"} and the counts of `REASONS`. refusal: the message of the first refusal, "" without any.
    sources: the five counts by source.
    """

    read: int
    right_at_first: int
    right_at_second: int
    failed: int
    open: int
    requests: int
    retries: int
    prompt_tokens: int
    completion_tokens: int
    attempts: list[dict[str, int]]
    refusal: str
    sources: dict[str, dict[str, int]]

    @property
    def accepted(self) -> int:
        """The number of chains."""
        return self.right_at_first + self.right_at_second

    def __str__(self) -> str:
        counts = {state.replace("_", " "): getattr(self, state) for state in STATES}
        shares = [f"{count:,} ({count / self.read:.1%}) {state}" for state, count in counts.items()]
        lines = [
            f"{self.read:,} pairs: {', '.join(shares)}",
            f"{self.requests:,} requests and {self.retries:,} retries, "
            f"{self.prompt_tokens + self.completion_tokens:,} tokens ({self.completion_tokens:,} of them in answers)",
        ]
        for row in self.attempts:
            counts = ", ".join(f"{row[name]:,} {name}" for name in ("right", *REASONS) if row[name])
            lines.append(f"pass {row['pass']}, try {row['try'] + 1}: {row['asked']:,} asked: {counts}")
        if self.refusal:
            lines.append(f"refused, for example: {self.refusal}")
        return "\n".join(lines)


def make_ledger(all_attempts: Iterable[PairAttempts]) -> Ledger:
    """Count the attempts at all pairs."""
    by_turn, sources = defaultdict(Counter), defaultdict(Counter)
    answers: list[Answer] = []
    for each in all_attempts:
        sources[str(each.pair.meta.get("source", ""))][each.state] += 1
        for attempt in each.attempts:
            by_turn[attempt.turn][attempt.rejection.reason if attempt.rejection else "right"] += 1
            answers.append(attempt.answer)
    total = sum(sources.values(), Counter())
    return Ledger(
        read=total.total(),
        **{state: total[state] for state in STATES},
        requests=len(answers),
        retries=sum(answer.tries - 1 for answer in answers),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
        attempts=[
            {"pass": pass_, "try": try_, "asked": counts.total()} | {k: counts[k] for k in ("right", *REASONS)}
            for (pass_, try_), counts in sorted(by_turn.items())
        ],
        refusal=next((answer.error for answer in answers if answer.error), ""),
        sources={
            name: {"read": counts.total()} | {state: counts[state] for state in STATES}
            for name, counts in sorted(sources.items())
        },
    )


def attempt_row(id: str, attempt: Attempt) -> dict[str, Any]:
    """The row of an attempt in answers.jsonl; `read_attempt` reads it back."""
    answer = {name: value for name, value in dataclasses.asdict(attempt.answer).items() if value is not None}
    return {"id": id, "pass": attempt.turn[0], "try": attempt.turn[1], **answer}


def read_attempt(row: Mapping[str, Any]) -> tuple[str, Attempt]:
    """Return the pair's id and the attempt. KeyError, TypeError or ValueError for a row of another form."""
    answer = {name: value for name, value in row.items() if name not in ("id", "pass", "try")}
    return row["id"], Attempt((row["pass"], row["try"]), build_config(Answer, answer, source="answer"))
