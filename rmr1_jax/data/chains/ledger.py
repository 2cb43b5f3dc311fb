"""What became of each pair that a teacher was asked about: its attempts, why a chain was turned down, and the counts.

A chain is taken where it is right, valid and tells nothing:

| turned down as | where |
|---|---|
| refused | the endpoint would not answer (a prompt that is too long, its own filter) |
| cut | the text ends at the limit of its length |
| wrong | `[[X]]` for the better answer X is not in the last 100 characters, the published rule |
| invalid | it is not, in form, what the prompt asks for; does not end with its one answer; or has no reasoning in it |
| telling | second pass: it says that the verdict was given (`prompts/teacher.py`) |

Next: `data/teacher.py`, which asks; `prompts/trace.py` for what is in form.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rmr1_jax.data.chains.correction import tells
from rmr1_jax.endpoint import Answer
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.trace import after_thinking, parse_trace
from rmr1_jax.prompts.verdict import strict_verdict

LAST_CHARS = 100  # of a chain, in which the published rule looks for the verdict


TURNED_DOWN = ("refused", "cut", "wrong", "invalid", "telling")


class Attempt(NamedTuple):
    """One answer on one pair. stage: the pass, 1 or 2. number: the try, from 0."""

    stage: int
    number: int
    answer: Answer


class Case:
    """A pair and all attempts at it, in order.

    Args:
        structure: of a valid chain, a key of `trace.STRUCTURES`. rounds: the (stage, number) of the attempts that a
            pair gets, until one is accepted. keep_thinking: whether what stands before `</think>` belongs to the chain.
    """

    def __init__(
        self, pair: PreferencePair, structure: str, rounds: Sequence[tuple[int, int]], keep_thinking: bool = False
    ):
        self.pair, self.structure, self.rounds, self.keep_thinking = pair, structure, rounds, keep_thinking
        self.attempts: list[Attempt] = []
        self.found: list[str | None] = []  # for each attempt: why it was turned down

    @property
    def accepted(self) -> Attempt | None:
        """The attempt that is right, valid and tells nothing."""
        return self.attempts[-1] if self.found and self.found[-1] is None else None

    @property
    def state(self) -> str:
        """ "right_at_first", "right_at_second", "failed", or "open" while there is something left to try."""
        if self.accepted:
            return "right_at_first" if self.accepted.stage == 1 else "right_at_second"
        nothing_to_judge = self.pair.meta.get("both_empty")
        return "failed" if nothing_to_judge or len(self.attempts) == len(self.rounds) else "open"

    def waits_for(self, round_number: int) -> bool:
        """Whether the attempt of this round is the next one."""
        return self.state == "open" and len(self.attempts) == round_number

    def add(self, attempt: Attempt) -> None:
        """The next attempt. ValueError where another one is due."""
        due = self.rounds[len(self.attempts)] if self.state == "open" else None
        if (attempt.stage, attempt.number) != due:
            raise ValueError(f"pair {self.pair.id!r}: pass {attempt.stage}, try {attempt.number}, where {due} is due")
        self.attempts.append(attempt)
        self.found.append(self._turned_down(attempt)[0])

    def chain(self, attempt: Attempt) -> str:
        """The chain in an answer."""
        text = attempt.answer.text
        return (text if self.keep_thinking else text[after_thinking(text) :]).strip()

    def reason(self, attempt: Attempt) -> str:
        """Why an attempt was turned down, in words."""
        return self._turned_down(attempt)[1]

    def _turned_down(self, attempt: Attempt) -> tuple[str | None, str]:
        """One of `TURNED_DOWN` and the words for it; None and "" for a chain that is accepted."""
        answer, right, chain = attempt.answer, self.pair.better, self.chain(attempt)
        if answer.error:
            return "refused", "there was no answer"
        if answer.finish_reason == "length":
            return "cut", "it was too long and was cut off"
        if f"[[{right}]]" not in chain[-LAST_CHARS:]:
            return "wrong", f"its verdict is not the right one, [[{right}]]"
        trace = parse_trace(chain)
        if missing := trace.missing(self.structure):
            return "invalid", f"its form is not the one asked for (it lacks: {', '.join(missing)})"
        if trace.flaws:
            return "invalid", f"its form is not the one asked for ({'; '.join(trace.flaws)})"
        if strict_verdict(chain) != right:
            return "invalid", "it does not end with one clear verdict"
        if not chain[: chain.rfind("<answer>")].strip():
            return "invalid", "it has a verdict and no reasoning"
        if attempt.stage == 2 and (words := tells(chain)):
            return "telling", f"it speaks of what it was told ({words!r})"
        return None, ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """read = right_at_first + right_at_second + failed + open.

    attempts: by pass and try, {"pass", "try", "asked", "right", and the reasons of `TURNED_DOWN`}. requests: answers
    that were asked for; retries: what it took beyond that. sources: by source, the five counts.
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
    sources: dict[str, dict[str, int]]

    def __str__(self) -> str:
        def share(count: int) -> str:
            return f"{count:,} ({count / self.read:.1%})"

        lines = [
            f"{self.read:,} pairs: {share(self.right_at_first)} right at first, {share(self.right_at_second)} right at "
            f"second, {share(self.failed)} failed, {share(self.open)} open",
            f"{self.requests:,} requests and {self.retries:,} retries, "
            f"{self.prompt_tokens + self.completion_tokens:,} tokens ({self.completion_tokens:,} of them in answers)",
        ]
        for row in self.attempts:
            counts = ", ".join(f"{row[name]:,} {name}" for name in ("right", *TURNED_DOWN) if row[name])
            lines.append(f"pass {row['pass']}, try {row['try'] + 1}: {row['asked']:,} asked: {counts}")
        return "\n".join(lines)


def as_ledger(cases: Iterable[Case]) -> Ledger:
    """The counts of all cases."""
    cases = list(cases)
    answers = [attempt.answer for case in cases for attempt in case.attempts]
    by_attempt: dict[tuple[int, int], Counter[str]] = {}
    sources: dict[str, Counter[str]] = {}
    for case in cases:
        for attempt, found in zip(case.attempts, case.found, strict=True):
            by_attempt.setdefault((attempt.stage, attempt.number), Counter())[found or "right"] += 1
        sources.setdefault(str(case.pair.meta.get("source", "")), Counter())[case.state] += 1
    states = ("right_at_first", "right_at_second", "failed", "open")
    total = sum(sources.values(), Counter())
    return Ledger(
        read=len(cases),
        **{state: total[state] for state in states},
        requests=len(answers),
        retries=sum(answer.tries - 1 for answer in answers),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
        attempts=[
            {"pass": stage, "try": number, "asked": counts.total()} | {k: counts[k] for k in ("right", *TURNED_DOWN)}
            for (stage, number), counts in sorted(by_attempt.items())
        ],
        sources={
            name: {"read": counts.total()} | {state: counts[state] for state in states}
            for name, counts in sorted(sources.items())
        },
    )


def attempt_row(id: str, attempt: Attempt) -> dict[str, Any]:
    """The row of an attempt in answers.jsonl; `read_attempt` reads it back."""
    answer = dataclasses.asdict(attempt.answer)
    row = {"id": id, "pass": attempt.stage, "try": attempt.number, "text": answer.pop("text")}
    return row | {name: value for name, value in answer.items() if value is not None}


def read_attempt(row: Mapping[str, Any]) -> tuple[str, Attempt]:
    """(id, attempt). KeyError, TypeError or ValueError for what `attempt_row` did not make."""
    row = dict(row)
    name, stage, number = row.pop("id"), row.pop("pass"), row.pop("try")
    answer = Answer(**row)
    kinds = [(name, str), (answer.text, str), (answer.finish_reason, str), (answer.error, str | None)]
    kinds += [(count, int) for count in (stage, number, answer.prompt_tokens, answer.completion_tokens, answer.tries)]
    for value, kind in kinds:
        if not isinstance(value, kind):
            raise ValueError(f"{value!r:.40} in the place of a value of another type")
    return name, Attempt(stage, number, answer)
