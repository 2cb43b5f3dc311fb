"""The questions of the small world: tasks on three letters or three digits, and requests for a short message.

A `Case` is a question with a better and a worse response, before they get an opening and become A and B. All responses
to a question have the same number of tokens, so that length says nothing about which one is better.
Read next: `world.py` (splits, openings, the A/B order, traces).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Option = TypeVar("Option")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The lists are short because the slowest thing for a small policy to learn is, word by word, when two words are equal.
LETTERS = "abcdefghijklmn"
NAMES = _words("Amy Ben Dan Eva Gus Hal Ian Jim Joe Kay Lea Max Meg Ned Sam Tom")
ITEMS = _words("axe bag bed bell box cap coat cup fan hat jar key lamp map pen rope")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MANNERS = ("please", "pronto")  # polite and impolite, one token each
QUALITIES = {"name": NAMES, "item": ITEMS, "day": DAYS, "polite": MANNERS}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question with its better and its worse response, and the facts that a trace is written from.

    `key` identifies the content of the question, regardless of the order in which it names its parts. `found_better`
    and `found_worse` are what each response says: its answer, one string (Reasoning), or its word for every rubric item
    (Chat). `solution` is the worked answer (Reasoning), `rubric` the (quality, wanted word) pairs (Chat).
    """

    key: str
    question: str
    better: str
    worse: str
    found_better: tuple[str, ...]
    found_worse: tuple[str, ...]
    solution: str = ""
    rubric: tuple[tuple[str, str], ...] = ()


# Reasoning. Letters and digits are always separated by spaces, so that each is one token of one form. Every solution
# has three steps of three words and then the answer, and the question ends with the letters or digits: a small policy
# learns to copy from a fixed distance long before it learns to search.


def _reverse(rng: np.random.Generator) -> Case:
    word = _random_letters(rng)
    answer = word[::-1]
    return _reasoning("Reverse", word, answer, pick(rng, [word, _swapped(answer, 0), _swapped(answer, 1)]))


def _rotate(rng: np.random.Generator) -> Case:
    word = _random_letters(rng)
    answer = word[1:] + word[0]
    return _reasoning("Rotate", word, answer, pick(rng, [word, _swapped(answer, 0), _swapped(answer, 1)]))


def _swap(rng: np.random.Generator) -> Case:
    word = _random_letters(rng)
    return _reasoning("Swap", word, _swapped(word, 0), pick(rng, [word, _swapped(word, 1), word[::-1]]))


def _increase(rng: np.random.Generator) -> Case:
    digits = rng.integers(0, 10, size=3).tolist()
    answer = "".join(str((d + 1) % 10) for d in digits)
    at = int(rng.integers(3))  # the digit that the worse response gets wrong, by one up or down
    slip = answer[:at] + str((digits[at] + pick(rng, (0, 2))) % 10) + answer[at + 1 :]
    return _reasoning("Increase", "".join(map(str, digits)), answer, slip)


def _reasoning(verb: str, given: str, answer: str, slip: str) -> Case:
    steps = ", ".join(f"{before} to {after}" for before, after in zip(given, answer, strict=True))
    question, right, wrong = f"{verb} {' '.join(given)}.", " ".join(answer), " ".join(slip)
    return Case(
        key=question,
        question=question,
        better=f"It is {right}.",
        worse=f"It is {wrong}.",
        found_better=(right,),
        found_worse=(wrong,),
        solution=f"{steps} gives {right}",
    )


# Chat: a message that must have three of four qualities.


def _request(missed: str) -> Callable[[np.random.Generator], Case]:
    """Returns a generator of requests whose worse response lacks the quality `missed`."""

    def make(rng: np.random.Generator) -> Case:
        wanted = {"name": pick(rng, NAMES), "item": pick(rng, ITEMS), "day": pick(rng, DAYS), "polite": MANNERS[0]}
        unasked = pick(rng, [q for q in QUALITIES if q != missed])  # either response may lack this one
        required = [q for q in QUALITIES if q != unasked]
        required = [required[i] for i in rng.permutation(3)]
        better, worse = dict(wanted), dict(wanted)
        worse[missed] = _other_word(wanted[missed], missed, rng)
        for words in (better, worse):
            if rng.random() < 0.5:
                words[unasked] = _other_word(wanted[unasked], unasked, rng)
        facts = f"Ask {wanted['name']} for the {wanted['item']} by {wanted['day']}"
        return Case(
            key=f"{facts} {sorted(required)}",
            question=f"{facts}: {', '.join(required)}",
            better=_message(better),
            worse=_message(worse),
            found_better=tuple(better[q] for q in required),
            found_worse=tuple(worse[q] for q in required),
            rubric=tuple((q, wanted[q]) for q in required),
        )

    return make


def _message(words: dict[str, str]) -> str:
    return f"Hi {words['name']}, send the {words['item']} by {words['day']} {words['polite']}."


# The generators of cases, by task.
REASONING = {"reverse": _reverse, "rotate": _rotate, "swap": _swap, "increase": _increase}
CHAT = {quality: _request(quality) for quality in QUALITIES}


def pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """Returns one of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def _random_letters(rng: np.random.Generator) -> str:
    return "".join(LETTERS[i] for i in rng.choice(len(LETTERS), size=3, replace=False))


def _swapped(word: str, at: int) -> str:
    """Exchanges the characters at `at` and `at + 1`."""
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _other_word(word: str, quality: str, rng: np.random.Generator) -> str:
    return pick(rng, [w for w in QUALITIES[quality] if w != word])
