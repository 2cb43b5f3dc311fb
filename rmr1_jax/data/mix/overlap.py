"""Overlap of training questions with evaluation sets: a benchmark cannot measure a judge that trained on its questions.

A question is all that the client wrote, as lower-case words. A training question overlaps with a benchmark's question
**exactly** if all words are the same in the same order, and **nearly** if the two share `ngram` consecutive words;
shorter questions can only overlap exactly. The default of 13 words is that of GPT-3 (arXiv 2005.14165, appendix C).
A near overlap may be no more than a common phrase: look at the examples in `mixture.json` before removing.

Next: `mixture.py`, which calls this.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from pydantic import PositiveInt

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import PreferencePair

_WORD = re.compile(r"\w+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplying by it modulo 2**64 loses no bits


@config_dataclass
class OverlapConfig:
    """How overlaps with evaluation sets are found and treated."""

    benchmarks: tuple[str, ...] = ()
    """Paths or hub ids of evaluation sets, in any format that `rmr1 judge` reads."""
    ngram: PositiveInt = 13
    """Number of consecutive words that make a near overlap."""
    action: Literal["report", "remove"] = "report"
    """Report rows that overlap and keep them, or remove them."""

    def __post_init__(self):
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise InputError(f"overlap.benchmarks={list(self.benchmarks)} names one of them twice")


class Overlap(NamedTuple):
    """kind: "exact" or "near". id: of the benchmark's pair. words: the shared words; for "near" the first `ngram`."""

    kind: str
    id: str
    words: str


def hash_ngrams(words: Sequence[str], ngram: int) -> np.ndarray:
    """Return polynomial hashes of all n-grams, in order: uint64 [len(words) - ngram + 1], empty if that is negative."""
    if len(words) < ngram:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(_hash_word, words), np.uint64, len(words))
    powers = np.array([pow(_MULTIPLIER, k, 2**64) for k in range(ngram)], np.uint64)
    return np.lib.stride_tricks.sliding_window_view(hashes, ngram) @ powers


@lru_cache(maxsize=2**17)  # about 20 MB
def _hash_word(word: str) -> int:
    digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Benchmark:
    """An index of an evaluation set's questions, of about 20 bytes a word. Raises InputError if there are none."""

    def __init__(self, name: str, pairs: Iterable[PreferencePair], ngram: int):
        self.name, self._ngram = name, ngram
        self._ids: dict[str, str] = {}  # the words of each distinct question, joined by spaces -> the first pair's id
        for pair in pairs:
            self._ids.setdefault(" ".join(question_words(pair)), pair.id)
        self._ids.pop("", None)
        if not self._ids:
            raise InputError(f"overlap.benchmarks: {name} holds no questions")
        self.questions = list(self._ids)
        hashes = [hash_ngrams(question.split(" "), ngram) for question in self.questions]
        # All n-gram hashes, sorted and unique; and for each the number of the first question that has it.
        self.hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self.owners = np.repeat(np.arange(len(hashes), dtype=np.int32), [len(each) for each in hashes])[first]

    def find(self, words: Sequence[str], hashes: np.ndarray) -> Overlap | None:
        """Find the overlap of a question, given its words and their n-gram hashes (`hash_ngrams`)."""
        text = " ".join(words)
        if text in self._ids:
            return Overlap("exact", self._ids[text], text[:200])
        if not len(hashes) or not len(self.hashes):
            return None
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        for start in np.flatnonzero(self.hashes[places] == hashes).tolist():
            question = self.questions[self.owners[places[start]]]
            shared = " ".join(words[start : start + self._ngram])
            if f" {shared} " in f" {question} ":  # hashes may collide
                return Overlap("near", self._ids[question], shared)
        return None


def question_words(pair: PreferencePair) -> list[str]:
    """Return the lower-case words of all client turns of a pair; a turn that both conversations have counts once."""
    turns = dict.fromkeys(m.content for m in (*pair.conversation_a, *pair.conversation_b) if m.role == "user")
    return _WORD.findall(unicodedata.normalize("NFKC", "\n".join(turns)).lower())
