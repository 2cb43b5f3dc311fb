"""Counts of the judgements in a file, and for those without a verdict the reasons with their remedies.

Next: `rows.py`, the rows that are counted; `file.py`, which counts them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rmr1_jax.judge.judgement import REASONS, STATUSES, Reason
from rmr1_jax.prompts.verdict import RULES


class Outcome(NamedTuple):
    """The parts of a row that are counted. correct: whether the winner is right; None if that is not known. reason: why
    there is no verdict; None where there is one, and in rows of earlier versions. prompt_tokens: of a prompt that is
    too long; 0 if that is not known."""

    status: str
    correct: bool | None = None
    reason: Reason | None = None
    prompt_tokens: int = 0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Outcome:
        """Read a row. Raises ValueError or KeyError if it is not one."""
        found = cls(row["status"], row.get("correct"), row.get("reason"), row.get("prompt_tokens") or 0)
        if found.status not in STATUSES:
            raise ValueError(f"status {found.status!r}")
        if found.reason not in (None, *REASONS):
            raise ValueError(f"reason {found.reason!r}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts over all rows of a file, by status. known: rows whose better answer is known; correct: those of them whose
    winner is that answer. Pairs without a winner are not correct. reasons: the invalid pairs by reason. longest: the
    tokens of the longest prompt that does not fit; 0 if that is not known."""

    ok: int
    tie: int
    invalid: int
    too_long: int
    known: int
    correct: int
    reasons: Mapping[Reason, int] = dataclasses.field(default_factory=dict)
    longest: int = 0

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Summary:
        """Count outcomes."""
        counts = Counter(outcomes)
        status, reasons, known = Counter(), Counter(), Counter()
        for found, count in counts.items():
            status[found.status] += count
            reasons[found.reason] += count
            known[found.correct] += count
        return cls(
            **{name: status[name] for name in STATUSES},
            known=known[True] + known[False],
            correct=known[True],
            reasons={name: reasons[name] for name in REASONS if reasons[name]},
            longest=max((found.prompt_tokens for found in counts), default=0),
        )

    @property
    def pairs(self) -> int:
        return self.ok + self.tie + self.invalid + self.too_long

    def __str__(self) -> str:
        if not self.pairs:
            return "no pairs"
        shares = [f"{getattr(self, s) / self.pairs:.1%} {s.replace('_', ' ')}" for s in STATUSES]
        known = f"{self.correct / self.known:.1%} of {self.known}" if self.known else "not known"
        return f"{self.pairs} pair{'s' * (self.pairs > 1)}: {', '.join(shares)}; accuracy {known}"

    def remedies(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield a line for each reason why pairs have no verdict, with their number and what helps. settings: those of
        the judge, which name its rule and its limits; empty if they are not known."""
        limit = settings.get("max_new_tokens") or settings.get("max_tokens")
        rule = settings.get("rule", "strict")
        other = next(name for name in RULES if name != rule)
        lines: dict[Reason, str] = {
            "cut_off": f"cut off{f' at {limit} tokens' if limit else ''}: raise --max-new-tokens",
            "other_form": f"{'bare [[A]] or [[B]]' if rule == 'strict' else 'in another form'}, which the rule {rule} "
            f"does not read: --rule {other} reads them (finished texts too: rmr1 judge --reread FILE --rule {other})",
            "several_verdicts": "with verdicts for both answers: look at the texts in the report, or try another "
            "--prompt",
            "no_verdict": "without a verdict: look at the texts in the report, and give the --prompt that the model "
            "was trained with",
            "refused": "refused by the endpoint: the notes of their rows have its messages",
        }
        for reason, count in self.reasons.items():
            yield f"{count} {lines[reason]}"
        if self.too_long:
            limit = settings.get("max_prompt_tokens")
            facts = f" (up to {self.longest} tokens" * bool(self.longest)
            facts += f", the limit is {limit})" if facts and limit else ")" * bool(facts)
            yield (
                f"{self.too_long} too long{facts}: raise --max-prompt-tokens, lower --max-new-tokens if the model has "
                "no more positions, or give a --prompt with a shorter instruction"
            )

    @property
    def warning(self) -> str:
        """A warning if no pair has a verdict, otherwise ""."""
        if not self.pairs or self.invalid + self.too_long < self.pairs:
            return ""
        without = f"none of the {self.pairs} pairs has a" if self.pairs > 1 else "the pair has no"
        return f"warning: {without} verdict, so nothing is measured"
