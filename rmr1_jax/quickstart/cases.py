"""The questions of the small world: tasks on three letters or three digits, and requests for a short message.

A `Case` is a question with one better and one worse response, undressed and not yet placed as A or B, and with what the
oracle knows of it. Every response to a question has the same number of tokens, so length says nothing about which is
better. Read next: `world.py` (splits, dress, place, traces).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Option = TypeVar("Option")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Few words of each sort: what takes a small policy longest is to learn, word by word, when two are the same.
LETTERS = "abcdefghijklmn"


NAMES = _words("Amy Ben Dan Eva Gus Hal Ian Jim Joe Kay Lea Max Meg Ned Sam Tom")


ITEMS = _words("axe bag bed bell box cap coat cup fan hat jar key lamp map pen rope")


DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


MANNERS = ("please", "pronto")  # polite and not, of one length


QUALITIES = {"name": NAMES, "item": ITEMS, "day": DAYS, "polite": MANNERS}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question before its responses are dressed and placed; `key` is its content, whatever the order of its parts."""

    key: str
    question: str
    better: str
    worse: str
    found_better: tuple[str, ...]
    found_worse: tuple[str, ...]
    solution: str = ""
    rubric: tuple[tuple[str, str], ...] = ()


# Reasoning: letters and digits are always spaced, so that each is one token in one form. Every solution has three steps
# of three words and then the answer, and the question ends with what it is about: a small policy learns to copy from a
# fixed distance long before it learns to search.


def _reverse(rng: np.random.Generator) -> Case:
    word = _letters(rng)
    answer = word[::-1]
    slip = pick(rng, [word, _swapped(answer, 0), _swapped(answer, 1)])
    return _reasoning(f"Reverse {_sp(word)}.", _turned(word, answer), answer, slip)


def _rotate(rng: np.random.Generator) -> Case:
    word = _letters(rng)
    answer = word[1:] + word[0]
    slip = pick(rng, [word, _swapped(answer, 0), _swapped(answer, 1)])
    return _reasoning(f"Rotate {_sp(word)}.", _turned(word, answer), answer, slip)


def _swap(rng: np.random.Generator) -> Case:
    word = _letters(rng)
    answer = _swapped(word, 0)
    slip = pick(rng, [word, _swapped(word, 1), word[::-1]])
    return _reasoning(f"Swap {_sp(word)}.", _turned(word, answer), answer, slip)


def _increase(rng: np.random.Generator) -> Case:
    digits = rng.integers(0, 10, size=3).tolist()
    answer, at = "".join(str((d + 1) % 10) for d in digits), int(rng.integers(3))
    slip = _replaced(answer, at, str((digits[at] + pick(rng, (0, 2))) % 10))
    return _reasoning(f"Increase {_sp(digits)}.", _turned("".join(map(str, digits)), answer), answer, slip)


def _turned(word: str, answer: str) -> str:
    return ", ".join(f"{c} to {d}" for c, d in zip(word, answer, strict=True))


def _reasoning(question: str, steps: str, answer: str, slip: str) -> Case:
    return Case(
        key=question,
        question=question,
        better=f"It is {_sp(answer)}.",
        worse=f"It is {_sp(slip)}.",
        found_better=(_sp(answer),),
        found_worse=(_sp(slip),),
        solution=f"{steps} gives {_sp(answer)}",
    )


# Chat: a message that must have three of four qualities.


def _message(missed: str) -> Callable[[np.random.Generator], Case]:
    """A maker of requests whose worse response misses the quality `missed`."""

    def make(rng: np.random.Generator) -> Case:
        wanted = {"name": pick(rng, NAMES), "item": pick(rng, ITEMS), "day": pick(rng, DAYS), "polite": MANNERS[0]}
        spare = pick(rng, [q for q in QUALITIES if q != missed])  # not asked for, so neither response need have it
        required = [q for q in QUALITIES if q != spare]
        required = [required[i] for i in rng.permutation(3)]
        better, worse = dict(wanted), dict(wanted)
        worse[missed] = _not(wanted[missed], missed, rng)
        for words in (better, worse):
            if rng.random() < 0.5:
                words[spare] = _not(wanted[spare], spare, rng)
        facts = f"Ask {wanted['name']} for the {wanted['item']} by {wanted['day']}"
        return Case(
            key=f"{facts} {sorted(required)}",
            question=f"{facts}: {', '.join(required)}",
            better=_say(better),
            worse=_say(worse),
            found_better=tuple(better[q] for q in required),
            found_worse=tuple(worse[q] for q in required),
            rubric=tuple((q, wanted[q]) for q in required),
        )

    return make


def _say(words: dict[str, str]) -> str:
    return f"Hi {words['name']}, send the {words['item']} by {words['day']} {words['polite']}."


def _not(word: str, quality: str, rng: np.random.Generator) -> str:
    return pick(rng, [w for w in QUALITIES[quality] if w != word])


REASONING = {"reverse": _reverse, "rotate": _rotate, "swap": _swap, "increase": _increase}


CHAT = {quality: _message(quality) for quality in QUALITIES}


# Small words.


def pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def _letters(rng: np.random.Generator) -> str:
    return "".join(LETTERS[i] for i in rng.choice(len(LETTERS), size=3, replace=False))


def _sp(parts) -> str:
    return " ".join(map(str, parts))


def _swapped(word: str, at: int) -> str:
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _replaced(word: str, at: int, char: str) -> str:
    return word[:at] + char + word[at + 1 :]
