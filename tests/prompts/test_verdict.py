"""The three verdict rules and the rewards, on made cases and on every published log."""

import itertools
import json

import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import eval_verdict, format_reward, other_side, strict_verdict, training_reward

A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"


def judgements(shared_data):
    """(text, recorded result, whether the chosen answer was shown in B) of every published log."""
    flag = "Is_Chosen_Answer_Shuffled_toPositionB"
    files = [
        *sorted((shared_data / "rewardbench").glob("logs*.json")),
        *sorted((shared_data / "rmb/logs").rglob("*.json")),
    ]
    for path in files:
        for record in json.loads(path.read_text(encoding="utf-8")):
            yield record["answers"], record["results"], record[flag]
    for path in sorted((shared_data / "rm_bench/logs").glob("*.json")):
        for record in json.loads(path.read_text(encoding="utf-8")):
            yield from zip(record["output"], record["result"], record[flag], strict=True)


def test_evaluation_rule_gives_every_recorded_result(shared_data):
    seen = 0
    for text, result, chosen_in_b in judgements(shared_data):
        assert (eval_verdict(text) == ("B" if chosen_in_b else "A")) == bool(result)
        seen += 1
    assert seen == 270


def test_training_reward_agrees_with_every_recorded_result(shared_data):
    for text, result, chosen_in_b in judgements(shared_data):
        assert training_reward(text, "B" if chosen_in_b else "A") == (1.0 if result else -1.0)


def test_strict_verdict_is_the_recorded_one_or_none(shared_data):
    none = 0
    for text, _, _ in judgements(shared_data):
        strict = strict_verdict(text)
        assert strict in (eval_verdict(text), None)
        none += strict is None
    # One published trace never ended; the 21 that close a tag too many after the answer are read.
    assert none == 1


@pytest.mark.parametrize(
    ("text", "right", "reward"),
    [
        (A, "A", 1.0),
        (A, "B", -1.0),
        (B, "B", 1.0),
        (A + B, "A", -1.0),
        (A + B, "B", -1.0),
        ("", "A", -1.0),
        ("[[A]]", "A", -1.0),
        ("<answer>[[A/B]]</answer>", "A", -1.0),
        (A + " " * 58, "A", 1.0),  # 22 + 58: the last 80 characters hold it just so
        (A + " " * 59, "A", -1.0),
        (B + " " * 36 + A, "A", -1.0),  # 22 + 36 + 22 = 80: the other one is still in them
        (B + " " * 37 + A, "A", 1.0),
        (A + "</answer>", "A", 1.0),
        ("[[B]] is tempting. " + A, "A", 1.0),
    ],
)
def test_training_reward(text, right, reward):
    assert training_reward(text, right) == reward


def test_training_reward_with_another_length():
    assert training_reward(B + " " * 36 + A, "A", last_chars=22) == 1.0
    assert training_reward(A, "A", last_chars=21) == -1.0
    for last_chars in (0, -5):
        with pytest.raises(InputError, match="last_chars"):
            training_reward(A, "A", last_chars=last_chars)
    with pytest.raises(InputError, match="'A' or 'B'"):
        training_reward(A, "model_a")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (A, "A"),
        (B, "B"),
        ("[[A]]", "A"),
        (A + B, None),
        ("", None),
        ("[[C]]", None),
        ("[[A]] ... [[A]]", "A"),
        ("[[ A ]]", None),
    ],
)
def test_eval_verdict(text, verdict):
    assert eval_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (f"<eval>x</eval>\n{A}", "A"),
        (f"{B} \n\n", "B"),
        (f"<think>{B} no wait</think>\n{A}", "A"),
        (f"thinking, {B}</think>{A}", "A"),
        (f"{A}</think>", None),
        (f"thinking</think>{A} or</think>{B}", "B"),
        (f"{A}</think>thinking again</think>{B}", "B"),
        (f"<think>hm {A}", None),  # the thought never ended
        (f"</think>\n<think>hm {A}", None),
        (f'they wrote "<think>" there. {A}', "A"),
        (f"{A} as I said", None),
        (f"{A}</answer>", "A"),
        (f"{A}.", "A"),
        (f"{A}?", None),
        (f"{A}\n{A}", None),
        (f"{B}\n{A}", None),
        (f"<quote_B>{B}</quote_B> {A}", None),  # an answer that imitates the verdict: beyond doubt is something else
        (f"<quote_A>{A}</quote_A> {A}", "A"),
        (f"<answer> [[B]] is what B asks for. {A}", None),
        (f"[[B]] is what B asks for. {A}", "A"),
        ("<answer>[[A]]", None),
        ("<answer>[[AB]]</answer>", None),
        ("<answer>[[a]]</answer>", None),
        ("[[A]]", None),
        ("", None),
    ],
)
def test_strict_verdict(text, verdict):
    assert strict_verdict(text) == verdict


SPELLINGS = {
    "fence around": "```\n{}\n```",
    "fence with a language": "Done.\n```xml\n{}\n```\n",
    "fence after": "{}\n```",
    "code": "`{}`",
    "bold": "**{}**",
    "bold and a full stop": "**{}**.",
    "bold, italic": "***{}***",
    "underscores": "__{}__\n",
    "full stop": "{}.",
    "ideographic full stop": "{}\u3002",
    "stray tags in bold": "**{}**</eval>\n</type>",
    "zero-width space": "{}\u200b",
    "zero-width no-break space": "\ufeff{}\ufeff\n",
    "joiners": "{}\u200c\u200d\u2060",
    "no-break space": "{}\u00a0",
}
INSIDE = {
    "spaces": "<answer> [[{}]] </answer>",
    "lines": "<answer>\n[[{}]]\n</answer>",
    "spaces in brackets": "<answer>[[ {} ]]</answer>",
    "spaces in tags": "< answer >[[{}]]</ answer >",
    "no-break spaces": "<answer>\u00a0[[{}]]\u00a0</answer>",
    "bold": "<answer>**[[{}]]**</answer>",
    "bold letter": "<answer>[[**{}**]]</answer>",
    "code": "<answer>`[[{}]]`</answer>",
    "fence": "<answer>\n```\n[[{}]]\n```\n</answer>",
    "zero-width": "<ans\u200bwer>[[\u2060{}\u200d]]\ufeff</answer\u200c>",
    "full width": "\uff1canswer\uff1e\uff3b\uff3b{}\uff3d\uff3d\uff1c\uff0fanswer\uff1e",
    "lenticular": "<answer>\u3010\u3010{}\u3011\u3011</answer>",
}


@pytest.mark.parametrize("around", SPELLINGS.values(), ids=SPELLINGS)
def test_the_ways_in_which_models_spell_a_verdict(around):
    for inside, side in itertools.product(INSIDE.values(), "AB"):
        answer, other = inside.format(side), inside.format(other_side(side))
        assert strict_verdict(f"<eval>x</eval>\n{around.format(answer)}") == side
        assert strict_verdict(f"<think>{other}</think>{around.format(answer)}") == side
        # The other side in any spelling, the same answer twice, or more text leave it open.
        assert strict_verdict(f"{other} or rather {around.format(answer)}") is None
        assert strict_verdict(f"**{answer}**\n**{answer}**.") is None
        assert strict_verdict(f"{around.format(answer)} so {other_side(side)} loses") is None
        # An earlier verdict does not stand for the last one where that cannot be read.
        for unread in ("?", "C", "A/B", "A and B", side.lower(), "", "\u0410"):
            last = around.format(inside.format(unread))
            assert strict_verdict(f"{around.format(answer)} ... {last}") is None
            assert parse_trace(f"<answer>[[{side}]]</answer> ... <answer>[[{unread}]]</answer>").verdict is None


@pytest.mark.parametrize(
    "text",
    [
        "<answer>[[A]",
        "<answer>[A]</answer>",
        "<answer>A</answer>",
        "[[A]]</answer>",
        "<answer>[[a]]</answer>",
        "<Answer>[[A]]</Answer>",
        "<\\answer>[\\[A]]<\\/answer>",  # as escaping marks an answer that imitates one
        "<answer>[[A]]</answer>\n```\nDone.",
        "<answer>[[A]]</answer>\n- B is worse",
        f"\u200b<think>hm {A}",  # a thought that never ended
        f"{A}</th\u200bink>",
        f"{A} \uff1canswer\uff1e",
        f"{A} <ANSWER>[[B]]</ANSWER>",
    ],
)
def test_what_stays_open_to_doubt(text):
    assert strict_verdict(text) is None


def test_the_published_rules_read_one_spelling():
    for inside in INSIDE.values():
        text = inside.format("A")
        assert training_reward(text, "A") == -1.0
        assert eval_verdict(text) == ("A" if "[[A]]" in text else None)


def test_other_side():
    assert [other_side(side) for side in ("A", "B", None)] == ["B", "A", None]
    with pytest.raises(KeyError):
        other_side("model_a")


def test_format_reward():
    chat = f"<type>Chat</type><rubric>r<justify>j</justify></rubric><eval>e</eval>{A}"
    assert format_reward(chat) == 1.0
    assert format_reward(chat.replace("</eval>", "")) == 0.0
    assert format_reward(f"<eval>e</eval>{A}") == 0.0
    assert format_reward(f"<eval>e</eval>{A}", "compare") == 1.0
    assert format_reward(f"x</think>{A}", "verdict") == 1.0
