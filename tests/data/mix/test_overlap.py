"""Overlap with evaluation sets: exact, near, the boundaries of both, and a comparison with a plain search."""

import json
import random

import numpy as np
import pytest

from rmr1_jax.data.mix.overlap import Benchmark, OverlapConfig, hash_ngrams, question_words
from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.read import read_pairs

WORDS = [f"w{k}" for k in range(1, 16)]


def ask(question: str, id: str = "x") -> PreferencePair:
    return PreferencePair.from_answers(id, question, "a", "b")


def overlap(question: str, benchmark: list[str], ngram: int = 13):
    made = Benchmark("bench", [ask(text, f"id {k}") for k, text in enumerate(benchmark)], ngram)
    words = question_words(ask(question))
    return made.find(words, hash_ngrams(words, ngram))


def test_words_are_those_of_the_client():
    talk = [("user", "Ünder-Score_d, 3.5\nﬁne?"), ("assistant", "no"), ("user", "IT'S Über")]
    other = [*talk[:2], ("user", "else"), ("assistant", "z")]
    pair = PreferencePair(id="x", conversation_a=(*talk, ("assistant", "y")), conversation_b=tuple(other))
    words = ["ünder", "score_d", "3", "5", "fine", "it", "s", "über", "else"]
    assert question_words(pair) == words


def test_exact():
    found = overlap("  what is RUST?!", ["What is C?", "What is -- Rust", "what is rust"])
    assert found == ("exact", "id 1", "what is rust")
    assert overlap("what is rust today", ["what is rust"]) is None
    assert overlap("?", ["what is rust"]) is None  # without words nothing overlaps


@pytest.mark.parametrize("before", [0, 1, 5])
def test_near_needs_n_consecutive_words(before):
    unlike = [f"a{k}" for k in range(before)]
    question = " ".join([*unlike, *WORDS[:13], "z"])
    assert overlap(question, ["x y", " ".join(["b", *WORDS])]) == ("near", "id 1", " ".join(WORDS[:13]))
    question = " ".join([*unlike, *WORDS[:12], "z", *WORDS[12:]])
    assert overlap(question, [" ".join(WORDS)]) is None
    assert overlap(question, [" ".join(WORDS)], ngram=12) == ("near", "id 0", " ".join(WORDS[:12]))


def test_short_questions_overlap_only_exactly():
    assert overlap(" ".join(WORDS[:12]), [" ".join(WORDS)]) is None
    assert overlap(" ".join(WORDS), [" ".join(WORDS[:12])]) is None
    assert overlap(" ".join(WORDS[:12]), [" ".join(WORDS[:12])]).kind == "exact"


def test_a_hash_collision_is_no_overlap():
    made = Benchmark("bench", [ask(" ".join(WORDS))], 13)
    made.hashes, made.owners = np.zeros(1, np.uint64), made.owners[:1]  # every n-gram gets the same hash
    for words, kind in (([f"v{k}" for k in range(15)], None), (WORDS[:14], "near")):
        found = made.find(words, np.zeros(len(words) - 12, np.uint64))
        assert (found and found.kind) == kind


def test_against_a_plain_search():
    random_ = random.Random(0)
    texts = [" ".join(random_.choices("abcd", k=random_.randrange(1, 30))) for _ in range(300)]
    benchmark, questions = texts[:100], texts[100:]
    kinds = []
    for question in questions:
        words = question.split()
        near = any(
            " " + " ".join(words[k : k + 5]) + " " in f" {text} " for k in range(len(words) - 4) for text in benchmark
        )
        kinds.append("exact" if question in benchmark else "near" if near else None)
    found = [overlap(question, benchmark, ngram=5) for question in questions]
    assert [each and each.kind for each in found] == kinds
    assert {"exact", "near", None} == set(kinds)


def test_the_real_benchmarks(shared_data):
    paths = ["rewardbench/filtered_sample.jsonl", "rm_bench/dataset_sample.json", "rmb/Pairwise_set"]
    made = [Benchmark(path, read_pairs(shared_data / path), 13) for path in paths]
    rows = [json.loads(line) for line in (shared_data / paths[0]).read_text().splitlines()]
    assert len(made[0].questions) == len({" ".join(question_words(ask(row["prompt"]))) for row in rows})
    for row in rows:
        words = question_words(ask(row["prompt"]))
        assert made[0].find(words, hash_ngrams(words, 13)).kind == "exact"
        longer = question_words(ask(f"Please tell me: {row['prompt']} Thanks."))
        if len(words) >= 13:
            assert made[0].find(longer, hash_ngrams(longer, 13)).kind == "near"
        assert made[2].find(words, hash_ngrams(words, 13)) is None


def test_what_is_refused():
    for wrong, message in [
        ({"ngram": 0}, "ngram: Input should be greater than 0 .got 0."),
        ({"action": "drop"}, "action: Input should be 'report' or 'remove' .got 'drop'."),
        ({"benchmarks": ("a", "a")}, "names one of them twice"),
    ]:
        with pytest.raises(InputError, match=message):
            OverlapConfig(**wrong)
    with pytest.raises(InputError, match="bench holds no questions"):
        Benchmark("bench", [], 13)
