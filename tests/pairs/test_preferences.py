"""Preference rows as other tools write them: read rightly, or refused with the nearest format and what is missing."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.judge.judgement import known_tie
from rmr1_jax.pairs.pair import Message, PreferencePair, render_pair
from rmr1_jax.pairs.read import read_pairs, source_format
from rmr1_jax.pairs.rows import BadRow, ReadReport
from rmr1_jax.prompts.prompt import get_prompt

ASKED = "Which river runs through Cairo?"
GOOD, BAD = "The Nile does.", "The Danube, I think."
PARTS = [{"type": "text", "text": "Which river "}, {"type": "text", "text": "runs through Cairo?"}]


def said(*texts: str) -> list[dict]:
    """Messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def reply(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def system(text: str) -> list[dict]:
    return [{"role": "system", "content": text}]


def read(tmp_path, *rows, **options) -> list[PreferencePair]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_pairs(path, **options))


def error(tmp_path, row) -> str:
    with pytest.raises(BadRow, match=r"rows\.jsonl:1: ") as caught:
        read(tmp_path, row)
    return str(caught.value).split("rows.jsonl:1: ")[1]


def ranked(pair: PreferencePair) -> list[list[tuple[str, str]]]:
    """The better conversation and the other one."""
    sides = [list(map(tuple, pair.conversation_a)), list(map(tuple, pair.conversation_b))]
    return sides if pair.better == "A" else sides[::-1]


USER, RIGHT, WRONG = ("user", ASKED), ("assistant", GOOD), ("assistant", BAD)
MORE = [("user", "Hi."), ("assistant", "Hello."), USER]
SINGLE = [[USER, RIGHT], [USER, WRONG]]
SEVERAL = [[*MORE, RIGHT], [*MORE, WRONG]]
BRIEF = ("system", "Be brief.")
WITH_SYSTEM = [[BRIEF, *side] for side in SINGLE]

RANKED_ROWS = {  # format -> a row, the better conversation and the other one
    "TRL, standard": ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, SINGLE),
    "TRL, conversational": ({"prompt": said(ASKED), "chosen": reply(GOOD), "rejected": reply(BAD)}, SINGLE),
    "TRL, several turns": (
        {"prompt": said("Hi.", "Hello.", ASKED), "chosen": reply(GOOD), "rejected": reply(BAD)},
        SEVERAL,
    ),
    "TRL, conversational with texts": ({"prompt": said(ASKED), "chosen": GOOD, "rejected": BAD}, SINGLE),
    "TRL, implicit prompt": ({"chosen": said(ASKED, GOOD), "rejected": said(ASKED, BAD)}, SINGLE),
    "TRL, system in the prompt": (
        {"prompt": system("Be brief.") + said(ASKED), "chosen": reply(GOOD), "rejected": reply(BAD)},
        WITH_SYSTEM,
    ),
    "TRL, implicit prompt with system": (
        {"chosen": system("Be brief.") + said(ASKED, GOOD), "rejected": system("Be brief.") + said(ASKED, BAD)},
        WITH_SYSTEM,
    ),
    "content as parts": (
        {
            "prompt": [{"role": "user", "content": PARTS}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "output_text", "text": BAD}]}],
        },
        SINGLE,
    ),
    "OpenRLHF": (
        {"chosen": said(ASKED, GOOD), "rejected": said(ASKED, BAD), "chosen_score": 4.0, "rejected_score": 1.5},
        SINGLE,
    ),
    "OpenRLHF, other keys": ({"input": ASKED, "chosen_response": GOOD, "rejected_response": BAD}, SINGLE),
    "UltraFeedback": (
        {"prompt": ASKED, "prompt_id": "77f0", "chosen": said(ASKED, GOOD), "rejected": said(ASKED, BAD), "score": 8},
        SINGLE,
    ),
    "UltraFeedback, several turns": (
        {"prompt": "Hi.", "chosen": said("Hi.", "Hello.", ASKED, GOOD), "rejected": said("Hi.", "Hello.", ASKED, BAD)},
        SEVERAL,
    ),
    "hh-rlhf": (
        {
            "chosen": f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: {ASKED}\n\nAssistant: {BAD}",
        },
        SEVERAL,
    ),
    "hh-rlhf with a prompt": (
        {"prompt": f"\n\nHuman: {ASKED}\n\nAssistant:", "chosen": GOOD, "rejected": BAD},
        SINGLE,
    ),
    "orca": ({"system": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": BAD}, WITH_SYSTEM),
    "LLaMA-Factory": (
        {"instruction": "Which river", "input": "runs through Cairo?", "chosen": GOOD, "rejected": BAD},
        [[("user", "Which river\nruns through Cairo?"), it] for it in (RIGHT, WRONG)],
    ),
    "one message a side": (
        {"prompt": ASKED, "chosen": reply(GOOD)[0], "rejected": reply(BAD)[0], "source": "s"},
        SINGLE,
    ),
}


@pytest.mark.parametrize("name", RANKED_ROWS)
def test_chosen_and_rejected(tmp_path, name):
    row, expected = RANKED_ROWS[name]
    [first, second] = read(tmp_path, row, {**row, "id": "x"})
    assert ranked(first) == ranked(second) == expected
    assert (first.id, second.id) == ("0", "x")
    assert "question" not in first.meta and "prompt" not in first.meta and "system" not in first.meta
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert list(read_pairs(tmp_path / "rows.parquet")) == [first]


def arena(**label) -> dict:
    return {"conversation_a": said(ASKED, GOOD), "conversation_b": said(ASKED, BAD), **label}


def ppe(**label) -> dict:
    return {"question_id": "e1", "prompt": ASKED, "response_1": GOOD, "response_2": BAD, **label}


@pytest.mark.parametrize(
    ("row", "better", "tie"),
    [
        ({"instruction": ASKED, "response_a": GOOD, "response_b": BAD, "rubric": "1. ...", "winner": "A"}, "A", False),
        (
            {"instruction": ASKED, "response_a": GOOD, "response_b": BAD, "rubric": "", "winner": "Response B"},
            "B",
            False,
        ),
        (ppe(winner="model_b"), "B", False),
        (ppe(winner="ties"), None, True),
        (ppe(preference_strength=-2), "A", False),
        (ppe(preference_strength="3"), "B", False),
        (ppe(), None, False),
        ({"context": said(ASKED), "response1": GOOD, "response2": BAD, "overall_preference": -1}, "A", False),
        ({"context": said(ASKED), "response1": GOOD, "response2": BAD, "overall_preference": 0}, None, True),
        (arena(winner="model_a", model_a="m", model_b="n"), "A", False),
        (arena(winner="tie (bothbad)"), None, True),
        (arena(winner="some-model"), None, False),
        (arena(better="tie", winner="model_a"), None, True),
        (arena(better=None, winner="model_a"), "A", False),
        ({**ppe(winner="model_b"), "chosen": None, "rejected": None, "subset": None, "question": None}, "B", False),
        ({"question": ASKED, "response_a": GOOD, "response_b": BAD, "better": "tie"}, None, True),
    ],
)
def test_a_and_b_with_their_labels(tmp_path, row, better, tie):
    [pair] = read(tmp_path, row)
    assert [list(pair.conversation_a), list(pair.conversation_b)] == SINGLE
    assert (pair.id, pair.better, pair.tie) == ("0", better, tie)


def test_a_chosen_answer_can_be_a_tie(tmp_path):
    [pair] = read(tmp_path, {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "better": "tie"})
    assert (pair.better, pair.tie, "better" in pair.meta) == (None, True, False)
    assert pair.swapped().swapped() == pair
    with pytest.raises(InputError, match="expected None for a tie"):
        PreferencePair(
            id="1", conversation_a=pair.conversation_a, conversation_b=pair.conversation_b, better="A", tie=True
        )


def test_texts_that_begin_with_the_same_question(tmp_path):
    """The question is what TRL's `extract_prompt` gives (frozen here), but never ends within a word."""
    as_trl = [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("Q: 1 + 1?\nA: 2", "Q: 1 + 1?\nA: 3", "Q: 1 + 1?\nA:"),
        ("Say: yes", "Say:\nno", "Say:"),
    ]
    own = [
        ("The sky is blue.", "The sky is black.", "The sky is"),  # TRL: "The sky is bl"
        ("He is here", "He isn't", "He"),  # TRL: "He is"
    ]
    for chosen, rejected, question in as_trl + own:
        for better, worse in ((chosen, rejected), (rejected, chosen)):
            [pair] = read(tmp_path, {"chosen": better, "rejected": worse})
            assert ranked(pair) == [
                [("user", question), ("assistant", text.removeprefix(question))] for text in (better, worse)
            ]


def test_rewardbench_2(tmp_path):
    texts = {"chosen": [GOOD], "rejected": [BAD, "None.", "The Rhine."]}
    row = {"id": "7", "prompt": ASKED, **texts, "subset": "Factuality", "num_correct": 1, "num_incorrect": 3}
    tied = {**row, "id": "tied:7", "chosen": [GOOD, "Nile."], "rejected": [BAD], "subset": "Ties", "num_correct": 2}
    pairs = read(tmp_path, row, tied)
    assert source_format(tmp_path / "rows.jsonl") == "rewardbench-2"
    assert [pair.id for pair in pairs] == [
        *("Factuality/7#0-0", "Factuality/7#0-1", "Factuality/7#0-2", "Ties/tied:7#0-0", "Ties/tied:7#1-0"),
    ]
    assert [[side[-1][1] for side in ranked(pair)] for pair in pairs] == [
        *([GOOD, BAD], [GOOD, "None."], [GOOD, "The Rhine."], [GOOD, BAD], ["Nile.", BAD]),
    ]
    assert {pair.meta["item"] for pair in pairs} == {"Factuality/7", "Ties/tied:7"}
    [pair] = read(tmp_path, {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]})
    assert pair.id == "0#0-0" and ranked(pair) == SINGLE
    assert "'num_correct' is 2 (int), and chosen has 1 answers" in error(tmp_path, {**row, "num_correct": 2})
    assert "field 'rejected' is empty" in error(tmp_path, {**row, "rejected": []})


def test_the_format_is_that_of_most_rows(tmp_path):
    rows = [{"prompt": "q", "chosen": "c", "rejected": "r", "subset": "hep-cpp", "id": k} for k in range(5)]
    del rows[0]["subset"]
    report = ReadReport()
    pairs = read(tmp_path, *rows, rejects=tmp_path / "rejects.jsonl", report=report)
    assert [pair.id for pair in pairs] == [f"hep-cpp/{k}" for k in range(1, 5)] and report.rejected == 1
    [reject] = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert (reject["row"], reject["field"]) == (0, "subset")


TRL = {"prompt": said(ASKED), "chosen": reply(GOOD), "rejected": reply(BAD)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": ASKED, "chosen": GOOD},
            "field 'rejected' is missing; the row looks like TRL's and OpenRLHF's format (prompt, chosen, rejected) "
            "without 'rejected'; it has 'prompt', 'chosen'",
        ),
        ({"prompt": ASKED, "chosen": GOOD, "Rejected": BAD}, "without 'rejected' (is it 'Rejected'?); it has"),
        ({"chosen": GOOD, "rejected": BAD[1:]}, "field 'chosen' and 'rejected' do not begin with the same question"),
        ({"chosen": GOOD, "rejected": GOOD + " Yes."}, "or 'rejected' is the beginning of the other"),
        ({"question": ASKED, "response_a": GOOD}, "(question, response_a, response_b) without 'response_b'; it has"),
        ({"response_a": GOOD, "response_b": BAD}, "field 'question' is missing; the row looks like this project's"),
        ({"text": GOOD, "label": 1}, "got none of them. It has 'text', 'label', and looks like no format"),
        ({"input": ASKED, "accepted": GOOD}, "looks like Code-Preference-Pairs' format (input, accepted, rejected)"),
        ({"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}", "rejected": BAD}, "'rejected' is no dialogue from"),
        ({"chosen": f"Human: {ASKED}", "rejected": f"Human: {ASKED}"}, "'chosen' is no dialogue from 'Human:' to"),
        ({**TRL, "prompt": None}, "field 'prompt' is null, expected a text"),
        ({"chosen": reply(GOOD), "rejected": reply(BAD)}, "field 'chosen' holds no message of a user, and there is no"),
        ({**TRL, "prompt": said(ASKED, "a")}, "'prompt' is a list of 2 and must end with a message whose role is 'us"),
        ({**TRL, "prompt": []}, "field 'prompt' is a list of 0 and must end with"),
        ({**TRL, "chosen": said("Another question?", GOOD)}, "is a whole conversation, in which 'prompt' does not occ"),
        ({**TRL, "chosen": 3}, "field 'chosen' is 3 (int), expected a text"),
        ({**TRL, "prompt": None, "chosen": GOOD}, "field 'prompt' is null, expected a text"),
        ({"prompt": float("nan"), "chosen": GOOD, "rejected": BAD}, "field 'prompt' is NaN (float), expected a text"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": float("nan")}, "field 'rejected' is NaN (float), expected a t"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "id": float("nan")}, "field 'id' is NaN (float)"),
        ({**TRL, "system": 5}, "field 'system' is 5 (int), expected a text"),
        (
            {**TRL, "prompt": system("x") + said(ASKED), "system": "y"},
            "field 'system' is not the system message that 'chosen' begins with",
        ),
        ({**TRL, "prompt": said("a", "b", ASKED)[:2] + system("x") + said(ASKED)}, "'prompt[2].role' is 'system'"),
        ({**TRL, "chosen": [{"role": "tool", "content": "x"}]}, "field 'chosen[0].role' is \"tool\" (str), expected"),
        (
            {**TRL, "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "field 'chosen[0].tool_calls' calls a tool",
        ),
        (
            {**TRL, "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "field 'prompt[0].content[0].type' is \"image_url\" (str), expected 'text'; only text can be judged",
        ),
        (
            {**TRL, "prompt": [{"role": "user", "content": [{"type": "text"}]}]},
            "'prompt[0].content[0].text' is missing",
        ),
        (ppe(preference_strength=4), "field 'preference_strength' is 4 (int), expected -3 to 3"),
        (arena(better="C"), "field 'better' is 'C', expected 'A', 'B', 'tie' or null"),
    ],
)
def test_what_is_refused(tmp_path, row, message):
    assert message in error(tmp_path, row)


def test_a_system_message_is_shown_to_the_judge(tmp_path):
    prompt = get_prompt("cor")
    [pair] = read(tmp_path, {"system": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": BAD})
    assert not pair.single_turn and pair.conversation_a[0] == Message("system", "Be brief.")
    assert render_pair(prompt, pair) == prompt.render(f"Be brief.\n\n{ASKED}", pair.response_a, pair.response_b)
    [pair] = read(
        tmp_path, {"chosen": system("Be brief.") + said("Hi.", "Yes?", "Go.", "x"), "rejected": said("Hi.", "y")}
    )
    shown = [[("user", "Be brief.\n\nHi."), ("assistant", "Yes?"), ("user", "Go."), ("assistant", "x")]]
    shown += [[("user", "Hi."), ("assistant", "y")]]
    assert render_pair(prompt, pair) == prompt.render_conversations(*(shown if pair.better == "A" else shown[::-1]))
    empty = PreferencePair(
        id="1", conversation_a=(("system", " "), USER, RIGHT), conversation_b=(("system", " "), USER, WRONG)
    )
    assert render_pair(prompt, empty) == prompt.render(ASKED, GOOD, BAD)


@pytest.mark.parametrize(
    "roles", [("user", "system", "assistant"), ("system", "assistant"), ("system",), ("system",) * 2]
)
def test_a_system_message_comes_first(roles):
    with pytest.raises(InputError, match="perhaps after a 'system' message"):
        PreferencePair(
            id="1",
            conversation_a=tuple((role, "x") for role in roles),
            conversation_b=(("user", "q"), ("assistant", "a")),
        )


def test_identical_answers(tmp_path):
    [single, several, other] = read(
        tmp_path,
        {"prompt": ASKED, "chosen": GOOD, "rejected": f" {GOOD}\n"},
        {"prompt": said("Hi.", "Hello.", ASKED), "chosen": reply(GOOD), "rejected": reply(GOOD)},
        {"chosen": said("Hi.", "Hello.", ASKED, GOOD), "rejected": said(ASKED, GOOD)},
    )
    assert (single.identical, several.identical, other.identical) == (True, True, False)
    assert known_tie(single).status == "tie" and known_tie(single).note == "the two answers are the same"
    assert known_tie(several) and known_tie(other) is None
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": GOOD, "subset": "hep-cpp", "id": 1}
    [benchmark] = read(tmp_path, row)
    assert benchmark.identical and known_tie(benchmark) is None  # as the published evaluation, which asks
    [empty] = read(tmp_path, {**row, "chosen": "", "rejected": " "})
    assert known_tie(empty).note == "both answers are empty"


def test_pairs_to_train_on_name_their_better_answer(tmp_path):
    row = {"question": ASKED, "response_a": GOOD, "response_b": BAD}
    with pytest.raises(BadRow, match="names no better answer"):
        read(tmp_path, row, labelled=True)
    [tie, known] = read(tmp_path, {**row, "better": "tie"}, {**row, "winner": "model_b"}, labelled=True)
    assert tie.tie and known.better == "B"
