"""What a judge found, from the texts it wrote or the scores it gave; free of JAX, for all who make or read judgements.

A judge of any kind is an `AnyJudge`: a policy of ours (`judge.py`), an endpoint, a scalar reward model (`eval/`).

Next: `judge_file.py`, which judges files with any of them; `prompts/verdict.py` for the rules that read a verdict.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.trace import Trace, parse_trace
from rmr1_jax.prompts.verdict import eval_verdict, strict_verdict

RULES = MappingProxyType({"strict": strict_verdict, "eval": eval_verdict})


Side = Literal["A", "B"]


Verdict = Literal["A", "B", None]  # of a text, or of a judgement; None: it names neither answer


Status = Literal["ok", "tie", "invalid", "too_long"]


STATUSES: tuple[Status, ...] = get_args(Status)


_SWAP = {"A": "B", "B": "A", None: None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the judge found.

    winner: "A", "B", or None unless `status` is "ok". status: "ok"; "tie": the votes or the two orders disagree, or
    both answers are empty; "invalid": no text has a verdict; "too_long": the prompt does not fit, nothing was asked.
    text: the first text that names the winner, else the first one; trace: its parts. votes: {"A", "B", "invalid"} ->
    count, over all texts. note: what there is to say beside that, such as why nothing was asked.

    texts, verdicts, tokens: of every text, by order and then by vote; the verdicts of the other order are in the
    letters of the pair as it was given; tokens counts what was generated. Empty where nothing was asked. scores: of
    answer A and answer B, where the judge gives scores and writes no texts.
    """

    winner: str | None
    status: str
    trace: Trace
    text: str
    votes: Mapping[str, int]
    note: str | None = None
    texts: tuple[tuple[str, ...], ...] = ()
    verdicts: tuple[tuple[str | None, ...], ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    scores: tuple[float, float] | None = None


class AnyJudge(Protocol):
    """What `judge_file` asks of a judge. whole_batches: whether a text's last bits depend on what was asked with it,
    so that a batch that was cut is to be judged whole again to give what an uninterrupted run gives."""

    whole_batches: bool

    def stream(
        self, pairs: Sequence[PreferencePair], votes: int = 1, both_orders: bool = False, seed: int = 0
    ) -> Iterator[tuple[int, Judgement]]:
        """(number of the pair, its judgement), as they are made."""

    def settings(self, votes: int = 1, both_orders: bool = False, seed: int = 0) -> dict[str, Any]:
        """All that decides a verdict beside the weights and the pairs, as plain values."""

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
            on_done: called with 1 for each pair that is finished (a progress bar).
        """
        shown = [as_pair(pair, number) for number, pair in enumerate(pairs)]
        return in_order(self.stream(shown, votes, both_orders, seed), on_done)


def temperature_for(votes: int, temperature: float | None) -> float:
    """The temperature of so many votes where `temperature` is what was asked for: by default 0 for one, 1 for several.

    Raises:
        InputError: less than one vote, or several of one and the same text.
    """
    if votes < 1:
        raise InputError(f"votes={votes} must be at least 1")
    if votes > 1 and temperature == 0:
        raise InputError(f"votes={votes} with temperature=0 would count one text {votes} times; raise it or drop it")
    return float(votes > 1) if temperature is None else float(temperature)


def check_rule(rule: str) -> str:
    """`rule`, if it is the name of one.

    Raises:
        InputError: it is not.
    """
    if rule not in RULES:
        raise InputError(f"rule={rule!r} is not known; give one of {', '.join(RULES)}")
    return rule


def judgement_of(texts: Sequence[Sequence[str]], tokens: Sequence[Sequence[int]], rule: str) -> Judgement:
    """From the texts by order, (A, B) and then (B, A) where it was asked for, and their lengths in tokens."""
    verdicts = read_verdicts(texts, rule)
    winner, status = settle(verdicts)
    flat = list(itertools.chain(*verdicts))
    shown = flat.index(winner) if winner else 0
    text = list(itertools.chain(*texts))[shown]
    return Judgement(
        winner=winner,
        status=status,
        trace=parse_trace(text),
        text=text,
        votes=count_votes(flat),
        note="the text saw the two answers in the other order" if shown >= len(texts[0]) else None,
        texts=tuple(map(tuple, texts)),
        verdicts=tuple(map(tuple, verdicts)),
        tokens=tuple(map(tuple, tokens)),
    )


def read_verdicts(texts: Sequence[Sequence[str]], rule: str) -> list[list[str | None]]:
    """The verdict of each text by order, in the letters of the first order. `rule` is one of `RULES`."""
    read = RULES[rule]
    return [[_SWAP[read(text)] if order else read(text) for text in own] for order, own in enumerate(texts)]


def settle(verdicts: Sequence[Sequence[str | None]]) -> tuple[str | None, str]:
    """Verdicts by order, in the caller's letters -> (winner, status)."""
    counts = [Counter(v for v in order if v) for order in verdicts]
    winners = {"A" if c["A"] > c["B"] else "B" for c in counts if c["A"] != c["B"]}
    if len(winners) == 1:
        return winners.pop(), "ok"
    return None, "tie" if any(counts) else "invalid"


def unasked(status: str, note: str) -> Judgement:
    """The judgement of a pair that is not shown to the judge."""
    return Judgement(winner=None, status=status, trace=Trace(), text="", votes=count_votes([]), note=note)


def nothing_to_judge(pair: PreferencePair) -> Judgement | None:
    """The judgement of a pair whose answers are both empty; None for any other."""
    return unasked("tie", "both answers are empty") if pair.meta.get("both_empty") else None


def count_votes(verdicts: Sequence[str | None]) -> dict[str, int]:
    """{"A", "B", "invalid"} -> how many."""
    return {"A": verdicts.count("A"), "B": verdicts.count("B"), "invalid": verdicts.count(None)}


def in_order(found: Iterable[tuple[int, Judgement]], on_done: Callable[[int], None] | None = None) -> list[Judgement]:
    """What a judge's `stream` gives, by number. on_done: called with 1 for each (a progress bar)."""
    judgements: dict[int, Judgement] = {}
    for number, judgement in found:
        judgements[number] = judgement
        if on_done:
            on_done(1)
    return [judgements[number] for number in range(len(judgements))]


def as_pair(pair: PreferencePair | Sequence[str], number: int) -> PreferencePair:
    """A pair as it is, or made of (question, response_a, response_b), with its number for an id."""
    if isinstance(pair, PreferencePair):
        return pair
    if isinstance(pair, Sequence) and len(pair) == 3 and all(isinstance(text, str) for text in pair):
        return PreferencePair.from_answers(str(number), *pair)
    raise InputError(f"pair {number} is {pair!r:.80}; expected a PreferencePair or (question, response_a, response_b)")
