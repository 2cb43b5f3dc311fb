"""Accuracy of the same judgements with fewer tokens, in each order, or with fewer votes.

Each class takes rows one at a time (`add`) and keeps counts. Everything is computed from one run: a token budget cuts
the texts of the run, and k votes are the first k of each order.

Next: `summary.py`, which adds the rows; `forced.py`, which continues cut texts with a policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rmr1_jax.eval.logs import whole_rows
from rmr1_jax.eval.scores import Place, Scoring, Statistic, score
from rmr1_jax.judge.judgement import CUT, RULES, settle
from rmr1_jax.prompts.verdict import other_side

BUDGETS = (512, 1024, 2048, 4096, 8192)  # tokens, as the paper plots
FORCED = "forced.jsonl"
Cut = Callable[[str, int], str]  # (text, tokens) -> its first tokens
Forced = Mapping[str, Mapping[str, list[list[str | None]]]]  # id -> budget -> verdicts by order and vote


def budgets_under(limit: int | None) -> tuple[int, ...]:
    """The budgets of a run whose texts were cut at `limit` tokens: the last is that limit."""
    return BUDGETS if limit is None else (*(budget for budget in BUDGETS if budget < limit), limit)


def longest_text(row: Mapping[str, Any]) -> int:
    """The number of tokens of a judgement's longest text; 0 if it is not known."""
    return max((count for order in row.get("tokens") or () for count in order), default=0)


def read_forced(out_dir: Path) -> Forced | None:
    """The forced verdicts of a run, which `forced.py` wrote; None if there are none."""
    path = out_dir / FORCED
    if not path.is_file():
        return None
    found: dict[str, Any] = {}
    for row in whole_rows(path):
        found[row.identifier("id")] = row.mapping(row.get("verdicts"), "verdicts", tuple(map(str, BUDGETS)))
    return found


class Budgets:
    """The inference-compute curve: the accuracy under a limit on the new tokens of a text.

    A text of more tokens than the budget is cut there and read by the run's rule. Without `cut` (a tokenizer) it counts
    as a text without a verdict. This is exact for the strict rule, whose verdict ends the text, and for the published
    rule unless the text names its winner before it ends. A pair without a winner counts as wrong. `forced` verdicts, if
    they are given, count for the texts that were cut. The last budget is the run's own `limit`, where every text counts
    as it was judged.
    """

    def __init__(
        self,
        rule: str,
        scoring: Scoring,
        cut: Cut | None = None,
        forced: Forced | None = None,
        limit: int | None = None,
    ):
        self.read, self.rule, self.cut, self.forced, self.limit = RULES[rule], rule, cut, forced, limit
        self.items = {budget: scoring.items() for budget in budgets_under(limit)}
        self.right, self.invalid, self.truncated = Counter[int](), Counter[int](), Counter[int]()
        self.n = self.unforced = 0
        self.counted = False  # whether any row has the token counts of its texts

    def add(self, row: Mapping[str, Any], place: Place) -> None:
        """Count a row under every budget."""
        self.n += 1
        tokens = row.get("tokens") or []
        self.counted |= any(tokens)
        longest = longest_text(row)
        self.unforced += self.forced is not None and longest > BUDGETS[0] and row["id"] not in self.forced
        for budget, items in self.items.items():
            status, correct = row["status"], bool(row["correct"])
            if longest > budget:
                winner, status = settle(self._verdicts(row, tokens, budget))
                correct = winner is not None and winner == row["better"]
            self.truncated[budget] += _truncated(row, budget, at_limit=budget == self.limit)
            items.add(place, correct)
            self.right[budget] += correct
            self.invalid[budget] += status == "invalid"

    def _verdicts(self, row: Mapping[str, Any], tokens: list[list[int]], budget: int) -> list[list[str | None]]:
        """The verdicts under a budget, in the letters of the first order."""
        if self.forced is not None and row["id"] in self.forced:
            return self.forced[row["id"]][str(budget)]

        def read_cut(text: str, order: int) -> str | None:
            verdict = self.read(self.cut(text, budget)) if self.cut else None
            return other_side(verdict) if order else verdict

        return [
            [
                verdict if count <= budget else read_cut(row["texts"][order][vote], order)
                for vote, (verdict, count) in enumerate(zip(verdicts, counts, strict=True))
            ]
            for order, (verdicts, counts) in enumerate(zip(row["verdicts"], tokens, strict=True))
        ]

    def listed(self, headline: Statistic) -> list[dict[str, Any]]:
        """{tokens, n (pairs), accuracy (of pairs), score (the benchmark's), invalid (pairs), truncated (texts)} of each
        budget."""
        if not self.counted:
            return []
        return [
            {
                "tokens": budget,
                "n": self.n,
                "accuracy": 100 * self.right[budget] / self.n,
                "score": 100 * score(items.strata_of(headline)),
                "invalid": self.invalid[budget],
                "truncated": self.truncated[budget],
            }
            for budget, items in self.items.items()
        ]

    def notes(self) -> list[str]:
        """Remarks on how the curve was made."""
        if not self.counted:
            return ["No curve by token budget: the judgements do not say how many tokens their texts have"]
        if self.forced is not None:
            rest = (
                f"; {self.unforced} judgements have no forced verdicts and count as in budget" if self.unforced else ""
            )
            return [f"budget_forced: a text of more tokens is cut there and continued with the likelier verdict{rest}"]
        how = "is cut there and read again" if self.cut else "counts as one without a verdict"
        ends = "" if self.limit is None else f"; the last budget is the run's own limit of {self.limit:,} tokens"
        return [f"budget: by truncation, a text of more tokens {how} (rule: {self.rule}){ends}"]


class Orders:
    """Consistency: whether the judge names the same answer in both orders."""

    def __init__(self):
        self.asked = self.both = self.same = self.valid = self.first = 0
        self.right = [0, 0]

    def add(self, row: Mapping[str, Any], place: Place) -> None:
        """Count a row that was judged in both orders."""
        verdicts = row.get("verdicts") or []
        if len(verdicts) != 2:
            return
        self.asked += 1
        winners = [settle([order])[0] for order in verdicts]
        self.both += None not in winners
        self.same += None not in winners and winners[0] == winners[1]
        for order, (votes, shown_first) in enumerate(zip(verdicts, "AB", strict=True)):
            self.right[order] += winners[order] is not None and winners[order] == row["better"]
            self.valid += sum(vote is not None for vote in votes)
            self.first += votes.count(shown_first)

    def numbers(self) -> dict[str, Any] | None:
        """Percentages. consistency: of the pairs with a winner in both orders (`n`); first_position_share: of the valid
        texts, where 50 is no bias; accuracy_ab, accuracy_ba: of each order of all `pairs` by itself."""
        if not self.asked:
            return None
        return {
            "pairs": self.asked,
            "n": self.both,
            "consistency": 100 * self.same / self.both if self.both else None,
            "first_position_share": 100 * self.first / self.valid if self.valid else None,
            "accuracy_ab": 100 * self.right[0] / self.asked,
            "accuracy_ba": 100 * self.right[1] / self.asked,
        }


class Votes:
    """Accuracy of the majority of the first k votes, and by the size of the majority."""

    def __init__(self):
        self.n = self.k = 0
        self.right = Counter[int]()
        self.shares: dict[int, list[float]] = {}  # tenth -> [sum of shares, n, right]

    def add(self, row: Mapping[str, Any], place: Place) -> None:
        """Count a row by its first 1, 3, 5, .. votes of each order."""
        verdicts = row.get("verdicts") or []
        self.n += 1
        self.k = max(self.k, max(map(len, verdicts), default=0))
        for k in _sizes(self.k):
            winner = settle([order[:k] for order in verdicts])[0]
            self.right[k] += winner is not None and winner == row["better"]
        valid = [vote for order in verdicts for vote in order if vote]
        if row.get("winner") and valid:
            share = valid.count(row["winner"]) / len(valid)
            bin_ = self.shares.setdefault(min(int(share * 10 + 1e-9), 10), [0.0, 0, 0])
            for i, x in enumerate((share, 1, bool(row["correct"]))):
                bin_[i] += x

    def numbers(self) -> dict[str, Any] | None:
        """n: pairs. k: votes for each order. by_k: accuracy of the first k. confidence: pairs with a winner, by its
        share of the valid votes in steps of ten points. Percentages."""
        if self.k < 2:
            return None
        return {
            "n": self.n,
            "k": self.k,
            "by_k": [{"k": k, "accuracy": 100 * self.right[k] / self.n} for k in _sizes(self.k)],
            "confidence": [
                {"share": 100 * total / n, "n": int(n), "accuracy": 100 * right / n}
                for _, (total, n, right) in sorted(self.shares.items())
            ],
        }


def _truncated(row: Mapping[str, Any], budget: int, *, at_limit: bool) -> int:
    """How many texts of a row a budget cuts; at the run's own limit, how many ended there: by their finish reasons or,
    if these are not known, those that fill the limit."""
    counts = [count for order in row.get("tokens") or () for count in order]
    if not at_limit:
        return sum(count > budget for count in counts)
    reasons = [reason for order in row.get("finish_reasons") or () for reason in order] or [""] * len(counts)
    return sum(r in CUT if r else count >= budget for r, count in zip(reasons, counts, strict=True))


def _sizes(k: int) -> list[int]:
    """1, 3, 5, .. and k itself."""
    return sorted({*range(1, k + 1, 2), k})
