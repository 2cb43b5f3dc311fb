"""What a training mixture shares with evaluation sets: a judge that has trained on a benchmark's questions is not
measured by it.

A question is what the client wrote, all turns of it, lower-cased, as words. A training question overlaps with one of a
benchmark **exactly** where all their words are the same in the same order, and **nearly** where some `ngram` words in a
row stand in both; shorter questions can only overlap exactly. 13 words is what GPT-3's authors took (arXiv 2005.14165,
appendix C). A near overlap may be no more than a common form of words: look at the examples in `mixture.json` before
removing.

Next: `data/mixture.py`, which asks here.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import locate
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.read import read_pairs

ACTIONS = ("report", "remove")


_WORD = re.compile(r"\w+")


_STEP = 0x9E3779B97F4A7C15  # odd, so that no step of the window hash loses bits


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """benchmarks: paths or hub ids of evaluation sets, in any format that `read_pairs` reads. ngram: words in a row
    that make a near overlap. action: what becomes of rows that overlap, "report" (they stay) or "remove"."""

    benchmarks: tuple[str, ...] = ()
    ngram: int = 13
    action: str = "report"

    def __post_init__(self):
        if self.ngram < 1:
            raise InputError(f"overlap.ngram={self.ngram} must be at least 1")
        if self.action not in ACTIONS:
            raise InputError(f"overlap.action={self.action!r} must be one of {', '.join(ACTIONS)}")
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise InputError(f"overlap.benchmarks={list(self.benchmarks)} names one of them twice")


class Overlap(NamedTuple):
    """One overlap: kind "exact" or "near", the benchmark's pair, and the words shared (of a near one: the first
    `ngram` of them)."""

    kind: str
    id: str
    words: str


@dataclass
class Benchmark:
    """An evaluation set's questions, for `find`. Made by `read_benchmark`; about 20 bytes for a word of theirs."""

    name: str
    ngram: int
    ids: list[str] = field(default_factory=list)  # of the first pair that asks each question
    texts: list[str] = field(default_factory=list)  # the questions' words, joined by spaces
    numbers: dict[str, int] = field(default_factory=dict)  # a question's words -> its number
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # of all n-grams, sorted, each once
    owners: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # the first question with that n-gram

    def find(self, words: Sequence[str], windows: np.ndarray) -> Overlap | None:
        """The overlap of a question with this benchmark. `windows`: the hashes of its n-grams, in order."""
        text = " ".join(words)
        if (same := self.numbers.get(text)) is not None:
            return Overlap("exact", self.ids[same], text[:200])
        if not len(windows) or not len(self.hashes):
            return None
        places = np.minimum(np.searchsorted(self.hashes, windows), len(self.hashes) - 1)
        for start in np.flatnonzero(self.hashes[places] == windows).tolist():
            owner = int(self.owners[places[start]])
            shared = " ".join(words[start : start + self.ngram])
            if f" {shared} " in f" {self.texts[owner]} ":  # equal hashes alone prove nothing
                return Overlap("near", self.ids[owner], shared)
        return None


def question_words(pair: PreferencePair) -> list[str]:
    """The words of all that the client wrote in a pair, lower-cased; what stands on both sides once."""
    turns = dict.fromkeys(m.content for m in (*pair.conversation_a, *pair.conversation_b) if m.role == "user")
    return _WORD.findall(unicodedata.normalize("NFKC", "\n".join(turns)).lower())


class Hasher:
    """Hashes of the n-grams of questions: weighted sums of the words' numbers, one product a text."""

    def __init__(self, ngram: int):
        self.ngram = ngram
        self._known: dict[str, int] = {}
        self._powers = np.array([pow(_STEP, k, 2**64) for k in range(ngram)], np.uint64)

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        """[number of n-grams] uint64, in order; empty where there are fewer words than n."""
        if len(words) < self.ngram:
            return np.empty(0, np.uint64)
        numbers = np.fromiter(map(self._number, words), np.uint64, len(words))
        return np.lib.stride_tricks.sliding_window_view(numbers, self.ngram) @ self._powers

    def _number(self, word: str) -> int:
        number = self._known.get(word)
        if number is None:
            digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
            number = self._known[word] = int.from_bytes(digest, "little")
        return number


def read_benchmark(source: str, hasher: Hasher) -> Benchmark:
    """The questions of an evaluation set. InputError where it cannot be read, or has none."""
    return make_benchmark(source, read_pairs(locate(source)), hasher)


def make_benchmark(name: str, pairs: Iterable[PreferencePair], hasher: Hasher) -> Benchmark:
    """A benchmark of these pairs' questions."""
    found = Benchmark(name, hasher.ngram)
    windows: list[np.ndarray] = []
    for pair in pairs:
        words = question_words(pair)
        text = " ".join(words)
        if words and text not in found.numbers:
            found.numbers[text] = len(found.ids)
            found.ids.append(pair.id)
            found.texts.append(text)
            windows.append(hasher(words))
    if not windows:
        raise InputError(f"overlap.benchmarks: {name} holds no questions")
    owners = np.repeat(np.arange(len(windows), dtype=np.int32), [len(each) for each in windows])
    found.hashes, first = np.unique(np.concatenate(windows), return_index=True)
    found.owners = owners[first]
    return found
