"""Judgements of pairs, and the interface of all judges. Needs no JAX.

A judge is a policy of ours (`judge.py`), a model behind an endpoint (`endpoint.py`) or a scalar reward model
(`scalar.py`). All derive from `AnyJudge`, so that `file.py` and the benchmarks take any of them.

Next: `judge.py`; `prompts/verdict.py` for the rules that read a verdict.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

from pydantic import NonNegativeFloat, PositiveInt

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.prompt import Prompt, get_prompt
from rmr1_jax.prompts.trace import Trace, parse_trace
from rmr1_jax.prompts.verdict import RULES, Side, Verdict, other_side, why_unread
from rmr1_jax.sampler.sample import Truncation

Item = TypeVar("Item")
Status = Literal["ok", "tie", "invalid", "too_long"]
STATUSES: tuple[Status, ...] = get_args(Status)
Reason = Literal["cut_off", "other_form", "several_verdicts", "no_verdict", "refused"]
REASONS: tuple[Reason, ...] = get_args(Reason)
CUT = ("length", "max_tokens")  # finish reasons of a text that ends at the limit of tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """The result of comparing the two answers of a pair.

    winner: "A", "B", or None unless `status` is "ok". status: "ok"; "tie": the votes or the two orders disagree, or
    both answers are empty or the same; "invalid": no text has a verdict; "too_long": the prompt does not fit, so the
    model was not asked. text: the first text that names the winner, otherwise the first one. trace: the parts of
    `text`. votes: the counts of "A", "B" and "invalid" over all texts. note: a remark, such as the reason why the model
    was not asked.

    texts, verdicts, tokens, finish_reasons: all texts, their verdicts, their lengths in generated tokens and why they
    end ("stop", or "length" at the limit), by order and then by vote; empty where the model was not asked. Verdicts of
    the second order are given in the letters of the pair. reasons: why a text has no verdict, None where it has one;
    see `why_no_verdict`. scores: those of answer A and answer B, from a judge that gives scores and writes no texts.
    prompt_tokens: the length of a prompt that does not fit.
    """

    winner: Verdict
    status: Status
    trace: Trace = Trace()
    text: str = ""
    votes: Mapping[str, int]
    note: str | None = None
    texts: tuple[tuple[str, ...], ...] = ()
    verdicts: tuple[tuple[Verdict, ...], ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    finish_reasons: tuple[tuple[str, ...], ...] = ()
    reasons: tuple[tuple[Reason | None, ...], ...] = ()
    scores: tuple[float, float] | None = None
    prompt_tokens: int | None = None

    @property
    def reason(self) -> Reason | None:
        """The most frequent of `reasons` where the status is "invalid", otherwise None."""
        return main_reason(self.status, self.reasons)

    def __repr__(self) -> str:
        """A line for a notebook; the texts are in the fields."""
        facts = {"winner": self.winner, "status": self.status, "votes": dict(self.votes)}
        facts |= {"text": textwrap.shorten(self.text, 80, placeholder=" ...")}
        facts |= {name: value for name in ("note", "scores") if (value := getattr(self, name)) is not None}
        return f"Judgement({', '.join(f'{name}={value!r}' for name, value in facts.items())})"


@config_dataclass
class Voting:
    """How often a judge compares a pair.

    votes: texts for each order. The majority of the valid verdicts wins; equal counts are a tie. both_orders: compare
    (A, B) and (B, A). Both orders must name the same winner, otherwise the pair is a tie; an order without a winner
    (its votes are split, or none is valid) leaves the decision to the other one. seed: of the sampling. A text depends
    on the seed, its prompt and its number, and not on the other pairs. Raises InputError for less than one vote.
    """

    votes: PositiveInt = 1
    both_orders: bool = False
    seed: int = 0

    @property
    def orders(self) -> int:
        """The number of orders, 1 or 2."""
        return 2 if self.both_orders else 1

    def shown(self, pair: PreferencePair) -> tuple[PreferencePair, ...]:
        """The pair as each order shows it."""
        return (pair, pair.swapped())[: self.orders]


@config_dataclass
class JudgeSampling(Truncation):
    """How a judge samples its texts. temperature: None is 0 (greedy) for one vote, and 1 for several. The others: see
    `Truncation`; they need a temperature above 0."""

    temperature: NonNegativeFloat | None = None

    def settled(self, voting: Voting) -> dict[str, Any]:
        """The temperature for `voting`, and the other settings that differ from their defaults, by name.

        Raises:
            InputError: several votes at temperature 0, which would all be the same text; or truncation at temperature
                0, which changes nothing.
        """
        temperature = float(voting.votes > 1) if self.temperature is None else self.temperature
        if voting.votes > 1 and not temperature:
            raise InputError(
                f"votes={voting.votes} with temperature=0 would count one text {voting.votes} times; "
                "raise the temperature or leave it out"
            )
        if (truncation := self.given()) and not temperature:
            listed = ", ".join(f"{name}={value}" for name, value in truncation.items())
            raise InputError(
                f"{listed} changes nothing at temperature 0 (greedy), the default for one vote; set temperature=1 "
                f"(--temperature 1), say, or leave {' and '.join(truncation)} out"
            )
        return {"temperature": temperature, **truncation}


class Text(NamedTuple):
    """One text of a judge, and how many tokens were generated for it (0: not known). finish_reason: "stop", "length",
    another one that an endpoint reports, or "" if it reports none. answer: the part from which the verdict is read,
    where that is known; None: the rule finds it in the text."""

    text: str
    tokens: int
    finish_reason: str = ""
    answer: str | None = None


class AnyJudge(Protocol):
    """The interface of a judge: a subclass defines `stream` and `settings`.

    whole_batches: whether the last bits of a text depend on the texts that were sampled with it. If so, a batch that
    was interrupted must be judged again as a whole to give what an uninterrupted run gives.
    """

    whole_batches: bool

    def stream(self, pairs: Sequence[PreferencePair], voting: Voting) -> Iterator[tuple[int, Judgement]]:
        """Yield (index of the pair, its judgement), each as soon as it is made. Raises `reply.Unanswered` at the end if
        some pairs have none."""

    def settings(self, voting: Voting) -> dict[str, Any]:
        """Everything that decides a verdict besides the weights and the pairs, as plain values."""

    def compare(
        self, question: str, response_a: str, response_b: str, votes: int = 1, both_orders: bool = False, seed: int = 0
    ) -> Judgement:
        """Decide which of two answers to a question is better; see `Voting` for the other arguments."""
        return self.compare_many([(question, response_a, response_b)], votes, both_orders, seed)[0]

    def compare_many(
        self,
        pairs: Sequence[PreferencePair | tuple[str, str, str]],
        votes: int = 1,
        both_orders: bool = False,
        seed: int = 0,
    ) -> list[Judgement]:
        """Judge many pairs at once: `PreferencePair`s, or tuples (question, response_a, response_b).

        See `Voting` for the other arguments. Returns one judgement for each pair, in the order of the pairs.

        Raises:
            InputError: a pair of another form, or a vote count that the judge does not take.
        """
        voting = Voting(votes=votes, both_orders=both_orders, seed=seed)
        judgements = dict(self.stream([_as_pair(pair, number) for number, pair in enumerate(pairs)], voting))
        return [judgements[number] for number in range(len(pairs))]


class TextJudge(AnyJudge):
    """A judge that reads its verdicts from texts. See `judge.Judge` for the arguments."""

    def __init__(self, prompt: str | Path | Prompt, rule: str, sampling: JudgeSampling, escape_untrusted: bool):
        self.prompt = dataclasses.replace(get_prompt(prompt), escape_untrusted=escape_untrusted)
        if rule not in RULES:
            raise InputError(f"rule={rule!r} is not known; give one of {', '.join(RULES)}")
        self.rule, self.sampling = rule, sampling

    def described(self, model: str) -> str:
        """The judge in a line, as its `repr`."""
        return f"{type(self).__name__}({model}, prompt={self.prompt.name!r}, rule={self.rule!r})"

    def text_settings(self) -> dict[str, Any]:
        """The settings that decide how a pair is shown and a text is read."""
        return {"prompt": self.prompt.identity, "escape_untrusted": self.prompt.escape_untrusted, "rule": self.rule}


class Pending(Generic[Item]):
    """Collects the texts of pairs, which arrive in any order, until all of a pair's texts are there."""

    def __init__(self, voting: Voting):
        self._voting = voting
        self._items: dict[int, dict[tuple[int, int], Item]] = {}

    def add(self, number: int, order: int, vote: int, item: Item) -> list[list[Item]] | None:
        """Add an item of pair `number`. Returns all its items by order and then by vote, if this was the last one."""
        own = self._items.setdefault(number, {})
        own[order, vote] = item
        if len(own) < self._voting.orders * self._voting.votes:
            return None
        del self._items[number]  # memory holds incomplete pairs only
        return [[own[order, vote] for vote in range(self._voting.votes)] for order in range(self._voting.orders)]


def judgement_of(texts: Sequence[Sequence[Text]], rule: str) -> Judgement:
    """The judgement from a pair's texts by order, first (A, B) and then (B, A), and by vote."""
    read = [[t.text if t.answer is None else t.answer for t in own] for own in texts]
    finish_reasons = [[t.finish_reason for t in own] for own in texts]
    verdicts = read_verdicts(read, rule)
    found = outcome(verdicts)
    winner = found["winner"]
    shown = list(itertools.chain(*verdicts)).index(winner) if winner else 0
    text = list(itertools.chain(*texts))[shown].text
    return Judgement(
        **found,
        trace=parse_trace(text),
        text=text,
        note="the text saw the two answers in the other order" if shown >= len(texts[0]) else None,
        texts=tuple(tuple(t.text for t in own) for own in texts),
        verdicts=tuple(map(tuple, verdicts)),
        tokens=tuple(tuple(t.tokens for t in own) for own in texts),
        finish_reasons=tuple(map(tuple, finish_reasons)),
        reasons=tuple(map(tuple, why_no_verdict(read, verdicts, finish_reasons, rule))),
    )


def read_verdicts(texts: Sequence[Sequence[str]], rule: str) -> list[list[Verdict]]:
    """The verdict of each text, by order and vote, in the letters of the first order. `rule` is a key of `RULES`."""
    read = RULES[rule]
    return [[other_side(read(text)) if order else read(text) for text in own] for order, own in enumerate(texts)]


def why_no_verdict(
    texts: Sequence[Sequence[str]],
    verdicts: Sequence[Sequence[Verdict]],
    finish_reasons: Sequence[Sequence[str]],
    rule: str,
) -> list[list[Reason | None]]:
    """The reason why each text has no verdict by `rule`, by order and vote; None for a text with one.

    "cut_off": the text ends at the limit of tokens; "refused": the endpoint refused the request; the others are those
    of `why_unread`. finish_reasons: may be empty, if they are not known.
    """

    def reason(text: str, verdict: Verdict, finish: str) -> Reason | None:
        if verdict:
            return None
        return "cut_off" if finish in CUT else "refused" if finish == "refused" else why_unread(text, rule)

    known = finish_reasons or [[""] * len(own) for own in texts]
    return [[reason(*each) for each in zip(*own, strict=True)] for own in zip(texts, verdicts, known, strict=True)]


def main_reason(status: Status, reasons: Sequence[Sequence[Reason | None]]) -> Reason | None:
    """The most frequent reason of a pair's texts where its status is "invalid", otherwise None."""
    given = Counter(filter(None, itertools.chain(*reasons))) if status == "invalid" else None
    return given.most_common(1)[0][0] if given else None


def outcome(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """`winner`, `status` and `votes` of the judgement with these verdicts, as `settle` takes them."""
    winner, status = settle(verdicts)
    return {"winner": winner, "status": status, "votes": count_votes(list(itertools.chain(*verdicts)))}


def settle(verdicts: Sequence[Sequence[Verdict]]) -> tuple[Verdict, Status]:
    """(winner, status) from verdicts by order and vote, all in the letters of the first order; see `Voting`."""
    counts = [Counter(v for v in order if v) for order in verdicts]
    winners: set[Side] = {"A" if c["A"] > c["B"] else "B" for c in counts if c["A"] != c["B"]}
    if len(winners) == 1:
        return winners.pop(), "ok"
    return None, "tie" if any(counts) else "invalid"


def count_votes(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """The counts of "A", "B" and "invalid"."""
    return {"A": verdicts.count("A"), "B": verdicts.count("B"), "invalid": verdicts.count(None)}


def not_asked(status: Status, note: str, prompt_tokens: int | None = None) -> Judgement:
    """The judgement of a pair that the model is not asked about."""
    return Judgement(winner=None, status=status, votes=count_votes([]), note=note, prompt_tokens=prompt_tokens)


def both_empty(pair: PreferencePair) -> Judgement | None:
    """The judgement of a pair whose answers are both empty; None for any other pair."""
    return not_asked("tie", "both answers are empty") if pair.meta.get("both_empty") else None


def no_right_side(pair: PreferencePair) -> bool:
    """Whether both answers are the same and not empty, so that neither is better. A pair of a benchmark has a right
    side all the same: its published evaluation asks about each one."""
    return pair.identical and not ({"benchmark", "both_empty"} & pair.meta.keys())


def known_tie(pair: PreferencePair) -> Judgement | None:
    """The judgement of a pair whose answers are both empty, or that has no right side; None for any other pair."""
    return both_empty(pair) or (not_asked("tie", "the two answers are the same") if no_right_side(pair) else None)


def too_long(name: str, rows: Sequence[Sequence[int]], limit: int) -> Judgement | None:
    """The judgement of a pair one of whose token rows is longer than `limit`; None for any other pair. `name` is what
    a row is called in the note."""
    longest = max(map(len, rows))
    if longest <= limit:
        return None
    return not_asked("too_long", f"{name} has {longest} tokens, the limit is {limit}", longest)


def _as_pair(pair: PreferencePair | Sequence[str], number: int) -> PreferencePair:
    """`pair` itself, or the pair made of (question, response_a, response_b), with its number as its id."""
    if isinstance(pair, PreferencePair):
        return pair
    if isinstance(pair, Sequence) and len(pair) == 3 and all(isinstance(text, str) for text in pair):
        return PreferencePair.from_answers(str(number), *pair)
    raise InputError(f"pair {number} is {pair!r:.80}; expected a PreferencePair or (question, response_a, response_b)")
