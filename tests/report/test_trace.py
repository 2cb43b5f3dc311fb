"""A trace cut for display loses nothing and agrees with the parsed trace; quotations are found in the answers."""

import time

import numpy as np
import pytest
from run_directories import CHAT, REASONING

from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.report.trace import QuoteFinder, split_trace


@pytest.mark.parametrize(
    "text",
    [
        CHAT,
        REASONING,
        "",
        "no tags at all",
        "<think>hm <answer>[[B]]</answer></think>\n" + CHAT,
        "hm</think>" + REASONING,
        "<think>never closed <eval>",
        "<rubric>open <eval>open <quote_A>open <quote_B>b</quote_B> </nothing></answer> <answer>[[A]]",
        "<eval><rubric></eval></rubric></justify><justify>",
        "</eval></eval><eval>",
    ],
)
def test_cutting_a_trace_loses_nothing(text):
    assert "".join(span.text for span in split_trace(text)) == text


def test_random_tags_lose_nothing_and_a_long_hostile_trace_takes_no_time():
    names = ("type", "rubric", "justify", "solution", "eval", "answer", "quote_A", "summary_B", "think")
    rng = np.random.default_rng(0)
    for _ in range(300):
        pieces = [f"<{'/' * int(rng.integers(2))}{rng.choice(names)}>" for _ in range(int(rng.integers(1, 12)))]
        text = " x ".join(pieces)
        assert "".join(span.text for span in split_trace(text)) == text
    begun = time.perf_counter()
    for text in (
        "<rubric>" * 8000 + "</rubric>" * 8000,
        "<eval><rubric>" * 8000 + "</eval>" * 8000,
        "<quote_A>" * 16000,
    ):
        assert "".join(span.text for span in split_trace(text)) == text
    assert time.perf_counter() - begun < 5


def test_the_colours_are_those_of_the_parsed_trace():
    for text in (CHAT, REASONING, "let me see</think>" + CHAT):
        trace, spans = parse_trace(text), split_trace(text)
        said: dict[str, str] = {}
        for span in spans:
            part = f"{span.kind}_{span.side}" if span.side else span.block
            said[part] = said.get(part, "") + ("" if span.kind == "tag" else span.text)
        said = {part: words.strip() for part, words in said.items()}
        assert said["type"].lower() == trace.kind
        assert said["answer"] == f"[[{trace.verdict}]]"
        assert said.get("solution") == trace.solution and said.get("rubric") == trace.rubric
        assert said.get("justify") == trace.justify
        for quote in trace.quotes:
            assert said[f"{quote.kind}_{quote.side}"] == quote.text
        assert {s.block for s in spans if s.kind in ("quote", "summary")} == {"eval"}
    assert split_trace("let me see</think>" + CHAT)[0].block == "think"


@pytest.mark.parametrize(
    ("quote", "found", "pieces"),
    [
        ("Some words.", "found", ["Some words."]),
        ('"some  words"', "found", ["Some words"]),
        ("words they *said* were", "found", ["words. They **said** were"]),
        ("Some ... good", "found", ["Some", "good"]),
        ('"good" and "Some words"', "found", ["Some words", "good"]),
        ("Some words [...] never written", "partly found", ["Some words"]),
        ("never written", "not found", []),
        ("... -- !", "not found", []),
        ("oo", "found", ["oo"]),
    ],
)
def test_a_quote_is_found_by_its_words(quote, found, pieces):
    answer = QuoteFinder("Some words. They **said** were good,\nÄpfel 🙂 too.")
    state, places = answer.find(quote)
    assert state == found
    assert [answer.text[start:end] for start, end in places] == pieces
