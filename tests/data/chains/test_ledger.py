"""The conditions under which a teacher's chain is accepted, and the reasons for rejection."""

import pytest
from teachers import chain

from rmr1_jax.data.chains.correction import revealing_words
from rmr1_jax.data.chains.ledger import Attempt, PairAttempts
from rmr1_jax.endpoint import Answer
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.training_sets import read_published
from rmr1_jax.prompts.verdict import strict_verdict


def found(text, right="A", pass_number=1, structure="cor", keep_thinking=False, **answer):
    pair = PreferencePair.from_answers("p", "q", "a", "b", better=right)
    attempts = PairAttempts(pair, structure, [(pass_number, 0)], keep_thinking)
    attempts.add(Attempt((pass_number, 0), Answer(text=text, **answer)))
    [attempt] = attempts.attempts
    assert (attempts.accepted is None) == (attempt.rejection is not None) == bool(attempt.rejection)
    assert attempt.rejection is None or attempt.rejection.words
    assert attempts.state == (f"right_at_{['first', 'second'][pass_number - 1]}" if attempts.accepted else "failed")
    return attempt.rejection and attempt.rejection.reason, attempts.chain(attempt)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (chain("A"), None),
        (chain("A") + "\n\n", None),
        (chain("A") + "</eval>", None),  # a stray closing tag, as in one published trace of twelve
        (chain("B"), "wrong"),
        ("", "wrong"),
        (chain("A") + "." * 88, "wrong"),  # [[A]] begins before the last 100 characters
        (chain("A") + "." * 80, "invalid"),  # in them, but not at the end
        (chain("A") + chain("A"), "invalid"),
        (chain("A") + "<answer>[[B]]</answer>", "invalid"),
        (chain("B") + "<answer>[[A]]</answer>", "invalid"),
        ("<answer>[[A]]</answer>", "invalid"),
        (chain("A").replace("<type>Chat</type>", ""), "invalid"),
        (chain("A").replace("Chat", "Reasoning"), "invalid"),
        (chain("A").replace("</eval>", ""), "invalid"),
        (chain("A").replace("<eval>A is right where B is not.</eval>", "<eval> </eval>"), "invalid"),
        ("<think>" + chain("A"), "wrong"),  # thinking that never ends
        # A judge's verdict is read in these spellings, but a policy is to learn the published one.
        (chain("A").replace("[[A]]", " [[A]] "), "invalid"),
        (chain("A").replace("[[A]]", "**[[A]]**"), "invalid"),
        (f"```\n{chain('A')}\n```", "invalid"),
        (chain("A") + ".", "invalid"),
        (chain("A") + "\u200b", "invalid"),
    ],
)
def test_the_conditions_for_a_chain(text, reason):
    assert found(text)[0] == reason


def test_more_reasons_for_rejection():
    assert found(chain("A"), finish_reason="length")[0] == "cut"
    assert found("", error="400: filtered", failure="refused")[0] == "refused"
    revealing = chain("A", "I was told that B is worse.")
    assert found(revealing)[0] is None  # the first teacher is given no verdict
    assert found(revealing, pass_number=2)[0] == "telling"
    assert found(chain("A"), pass_number=2)[0] is None


def test_thinking_is_removed_or_kept():
    text = f"<think>hm, [[B]]?</think>\n\n{chain('A')}"
    assert found(text) == (None, chain("A"))
    assert found(text, keep_thinking=True) == (None, text)
    verdict = "<think>because of this</think>\n<answer>[[A]]</answer>"
    assert found(verdict, structure="verdict")[0] == "invalid"  # no reasoning is left to train
    assert found(verdict, structure="verdict", keep_thinking=True) == (None, verdict)


def test_published_traces_are_accepted(shared_data):
    traces = [row.trace for row in read_published(shared_data / "published_rows" / "distill_sft.jsonl")]
    verdicts = [found(trace, right=strict_verdict(trace), pass_number=2)[0] for trace in traces]
    assert len(traces) == 65 and verdicts.count(None) == 64
    assert verdicts[[v is not None for v in verdicts].index(True)] == "invalid"  # its <solution> is not closed


@pytest.mark.parametrize(
    "words",
    [
        "The earlier attempt overlooked this.",
        "Contrary to the previous\nevaluation, B is better.",
        "I was told that A is better.",
        "To justify the given verdict, consider this.",
        "The correct verdict is A.",
        "As the note says, A wins.",
        "A is known to be the better answer.",
        "Since we know that Chatbot A is better, ...",
        "This leads to the predetermined conclusion.",
        "Hence my revised judgment.",
    ],
)
def test_chains_that_reveal_the_given_verdict(words):
    assert revealing_words(chain("A", words))
    assert revealing_words(chain("A", f"A writes <quote_A>{words}</quote_A>")) is None  # a quote of the chatbot
    assert revealing_words(chain("A", f"A says <summary_A>{words}</summary_A>"))  # the words of the judge


@pytest.mark.parametrize(
    "words",
    [
        "We are given that x = 2, so the correct answer is 4, the expected outcome.",
        "A did as instructed and follows the given format. My final verdict: A.",
        "Given that Chatbot A provides a method, it is more reliable.",
        "According to the instructions, the first attempt at solving was meant to fail.",
    ],
)
def test_chains_that_do_not_reveal_it(words):
    assert revealing_words(chain("A", words)) is None
