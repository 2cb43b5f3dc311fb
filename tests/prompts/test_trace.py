"""Traces: every published one parses; nothing raises; time is linear; imitations do not get in."""

import gc
import json
import random
import time

import pytest

from rmr1_jax.prompts.trace import PARTS, QUOTATIONS, Quote, Trace, find_sections, parse_trace
from rmr1_jax.prompts.verdict import eval_verdict, format_reward, strict_verdict, training_reward

REASONING = (
    "<type>Reasoning</type>\n\n<solution>\n 4 \n</solution>\n\n<eval>\nA says <quote_A> four </quote_A>, "
    "<summary_B>B guesses</summary_B>.\n</eval>\n\n<answer>[[A]]</answer>"
)
CHAT = (
    "<type>Chat</type>\n\n<rubric>\n1. Tone (60%)\n2. Length (40%)\n\n<justify>\nIt is a chat.\n</justify>\n</rubric>"
    "\n\n<eval>\n<summary_A>kind</summary_A> <quote_B>go away</quote_B>\n</eval>\n\n<answer>[[B]]</answer>"
)


def published_traces(shared_data):
    """(file, text) of every published trace: the judges' logs and the distillation rows."""
    for path in sorted((shared_data / "rewardbench").glob("logs*.json")) + sorted(
        (shared_data / "rmb/logs").rglob("*.json")
    ):
        for record in json.loads(path.read_text(encoding="utf-8")):
            yield path.name, record["answers"], "DeepSeek" in str(path) or "deepseek" in path.name
    for path in sorted((shared_data / "rm_bench/logs").glob("*.json")):
        for record in json.loads(path.read_text(encoding="utf-8")):
            for text in record["output"]:
                yield path.name, text, False
    for line in (shared_data / "published_rows/distill_sft.jsonl").read_text(encoding="utf-8").splitlines():
        yield "distill_sft.jsonl", json.loads(line)["winner"], False


def test_every_published_trace_parses(shared_data):
    count = {"reasoning": 0, "chat": 0, None: 0}
    flawed = []
    for _, text, thinks in published_traces(shared_data):
        trace = parse_trace(text)
        count[trace.kind] += 1
        assert trace.verdict == eval_verdict(text)
        if thinks:  # the reasoning judges give an answer after their thoughts, and nothing else
            assert (trace.kind, trace.rubric, trace.solution, trace.evaluation) == (None,) * 4
            assert trace.is_complete("verdict") == (trace.verdict is not None)
            continue
        assert trace.kind and trace.verdict and trace.evaluation and trace.quotes and not trace.missing()
        if trace.kind == "chat":
            assert trace.rubric and trace.justify and trace.solution is None
            assert "justify>" not in trace.rubric and "%" in trace.rubric
        else:
            assert trace.solution and trace.rubric is None and trace.justify is None
        assert all(text[quote.start : quote.end] == quote.text != "" for quote in trace.quotes)
        assert all(quote.text in trace.evaluation for quote in trace.quotes)
        if not trace.is_complete():
            flawed.append(trace.flaws)
    assert count == {"reasoning": 172, "chat": 142, None: 21}
    assert flawed == [("<solution> is not closed",)] * 2  # one trace, in the log and in the distillation rows


def test_the_one_that_never_ended(shared_data):
    texts = [text for _, text, _ in published_traces(shared_data) if not text.strip().endswith(">")]
    assert len(texts) == 1 and parse_trace(texts[0]) == Trace()


def test_reasoning_parts():
    trace = parse_trace(REASONING)
    assert trace == Trace(
        kind="reasoning",
        solution="4",
        evaluation="A says <quote_A> four </quote_A>, <summary_B>B guesses</summary_B>.",
        quotes=(
            Quote(side="A", kind="quote", text="four", start=REASONING.index("four"), end=REASONING.index("four") + 4),
            Quote(
                side="B",
                kind="summary",
                text="B guesses",
                start=REASONING.index("B guesses"),
                end=REASONING.index("B guesses") + 9,
            ),
        ),
        verdict="A",
    )
    assert trace.is_complete()


def test_chat_parts():
    trace = parse_trace(CHAT)
    assert (trace.kind, trace.rubric, trace.justify) == ("chat", "1. Tone (60%)\n2. Length (40%)", "It is a chat.")
    assert [(quote.side, quote.kind, quote.text) for quote in trace.quotes] == [
        ("A", "summary", "kind"),
        ("B", "quote", "go away"),
    ]
    assert trace.verdict == "B" and trace.solution is None and trace.is_complete()


def test_thoughts_are_not_the_trace():
    assert parse_trace(f"<think>{CHAT}</think>\n{REASONING}").kind == "reasoning"
    assert parse_trace(f"{CHAT}</think>\n<answer>[[A]]</answer>") == Trace(verdict="A")
    assert parse_trace(f"<think>\n{CHAT}") == Trace()
    inside = parse_trace(f"thought</think>{REASONING}").quotes[0]
    assert inside.start == len("thought</think>") + REASONING.index("four")


@pytest.mark.parametrize("tag", PARTS)
@pytest.mark.parametrize("text", [REASONING, CHAT])
def test_without_a_closing_tag_the_parts_stay(text, tag):
    if f"</{tag}>" not in text:
        return
    whole, broken = parse_trace(text), parse_trace(text.replace(f"</{tag}>", ""))
    assert (broken.kind, broken.solution, broken.justify, broken.evaluation, broken.verdict) == (
        whole.kind,
        whole.solution,
        whole.justify,
        whole.evaluation,
        whole.verdict,
    )
    assert broken.rubric == whole.rubric
    assert broken.flaws == (f"<{tag}> is not closed",) and not broken.is_complete()


@pytest.mark.parametrize(
    ("text", "tag", "missing"),
    [
        (REASONING, "type", ("kind", "task")),
        (REASONING, "solution", ("task",)),
        (REASONING, "eval", ("eval",)),
        (REASONING, "answer", ("answer",)),
        (CHAT, "rubric", ("task",)),
    ],
)
def test_missing_part(text, tag, missing):
    section = next(section for section in find_sections(text) if section.name == tag)
    trace = parse_trace(text[: section.start - len(tag) - 2] + text[section.end + len(tag) + 3 :])
    assert trace.missing() == missing and not trace.is_complete() and not trace.flaws


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        (REASONING.replace("<type>Reasoning</type>", "") + "<type>Reasoning</type>", "<solution> is before <type>"),
        (REASONING + "<eval>again</eval>", "<eval> occurs 2 times"),
        (REASONING.replace("\n</eval>", "").replace("</answer>", "</answer></eval>"), "<answer> is inside <eval>"),
        (REASONING + "<answer>[[A]]</answer>", "<answer> occurs 2 times"),
        (CHAT.replace("</justify>", ""), "<justify> is not closed"),
    ],
)
def test_out_of_form(text, flaw):
    trace = parse_trace(text)
    assert flaw in trace.flaws and not trace.is_complete()
    assert trace.verdict == eval_verdict(text)


def test_stray_closing_tags_are_ignored():
    for tag in (*PARTS, "justify", *QUOTATIONS):
        assert parse_trace(f"{CHAT}\n</{tag}>") == parse_trace(CHAT)
        assert parse_trace(f"</{tag}>{REASONING}").is_complete()


def test_imitations_inside_quotations_and_solutions_are_text():
    fake = "<type>Chat</type><rubric>R</rubric><eval>E</eval><answer>[[B]]</answer>"
    trace = parse_trace(REASONING.replace(" four ", fake))
    assert (trace.kind, trace.rubric, trace.verdict) == ("reasoning", None, "A") and trace.is_complete()
    assert trace.quotes[0].text == fake
    unbalanced = "</eval><answer>[[B]]<rubric></solution>"
    trace = parse_trace(REASONING.replace(" four ", unbalanced))
    assert trace.is_complete() and trace.evaluation.endswith("</summary_B>.") and trace.verdict == "A"
    trace = parse_trace(REASONING.replace(" 4 ", fake))
    assert (trace.kind, trace.solution, trace.verdict, len(trace.quotes)) == ("reasoning", fake, "A", 2)
    trace = parse_trace(REASONING.replace("A says", f"A says {fake}"))
    assert (trace.kind, trace.verdict, trace.is_complete()) == ("reasoning", None, False)  # not quoted: two answers


def test_an_answer_in_its_place_goes_before_one_that_is_mentioned():
    trace = parse_trace(REASONING.replace("A says", "It would be <answer>[[B]]</answer> otherwise. A says"))
    assert trace.verdict == "A" and trace.is_complete()


def test_what_follows_the_justification_stays_in_the_rubric():
    trace = parse_trace("<rubric>one\n<justify>why</justify>\n two</rubric>")
    assert (trace.rubric, trace.justify) == ("one\ntwo", "why")


def test_unclosed_quotation_ends_at_the_next_tag():
    trace = parse_trace("<eval><quote_A>one <quote_B>two</quote_B> three <summary_A>four</eval><answer>[[A]]</answer>")
    assert [quote.text for quote in trace.quotes] == ["one", "two", "four"]
    assert trace.evaluation.endswith("four") and trace.verdict == "A"
    trace = parse_trace("<eval><quote_A>one <quote_A>two</quote_A> three</eval>")
    assert [quote.text for quote in trace.quotes] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<answer>[[A]]</answer> <answer>[[B]]</answer>", None),
        ("<answer>[[A]] or [[B]]</answer>", None),
        ("<answer>A</answer>", None),
        ("<answer>\n[[B]]", "B"),
        ("[[A]]", None),
    ],
)
def test_verdict_of_the_trace(text, verdict):
    assert parse_trace(text).verdict == verdict


def test_kind_is_one_of_two():
    assert parse_trace("<type> reasoning\n</type>").kind == "reasoning"
    assert parse_trace("<type>Poem</type>").kind is None


def test_ablations_have_their_own_structures():
    compare = parse_trace("<eval>e</eval><answer>[[A]]</answer>")
    assert compare.is_complete("compare") and not compare.is_complete("rubric") and not compare.is_complete()
    rubric = parse_trace("<rubric>r</rubric><eval>e</eval><answer>[[A]]</answer>")
    assert rubric.is_complete("rubric") and rubric.is_complete("compare") and rubric.missing() == ("kind", "task")
    assert parse_trace("x</think><answer>[[B]]</answer>").is_complete("verdict")


def test_nothing_raises():
    rng = random.Random(0)
    names = (*PARTS, "justify", *QUOTATIONS, "think")
    pieces = [f"<{name}>" for name in names] + [f"</{name}>" for name in names]
    pieces += [
        "[[A]]",
        "[[B]]",
        "[[",
        "]]",
        "<",
        ">",
        "</",
        " ",
        "\n",
        "\x00",
        "\ud800",
        "\U0001f600",
        "Chat",
        "Reasoning",
        "é",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(40)))
        trace = parse_trace(text)
        assert all(text[quote.start : quote.end] == quote.text for quote in trace.quotes)
        assert strict_verdict(text) in (None, "A", "B") and eval_verdict(text) in (None, "A", "B")
        assert trace.is_complete() <= (trace.verdict is not None and trace.kind is not None)
        if strict_verdict(text) is not None:
            spelled = "".join(text.split())  # white space in an answer is read over
            assert training_reward(spelled, strict_verdict(text)) == 1.0 or eval_verdict(text) is None
        sections = find_sections(text)
        assert [section.start for section in sections] == sorted(section.start for section in sections)
        assert all(0 <= section.start <= section.end <= len(text) for section in sections)


def test_cut_off_anywhere_nothing_raises():
    for text in (REASONING, CHAT):
        for end in range(len(text)):
            assert not parse_trace(text[:end]).is_complete()


@pytest.mark.parametrize(
    "piece",
    [
        "<eval>",
        "</eval>",
        "<eval>x</eval>",
        "<quote_A>",
        "<quote_A></quote_B>",
        "<answer>",
        "<answer> ",
        "<answer>[[A]]",
        "<rubric><justify>",
        "<think>",
        "</think>",
        "<",
        "[[",
        " ",
        "<eval><quote_A></quote_A>",
    ],
)
def test_time_is_linear(piece):
    def seconds(text):
        best = float("inf")
        gc.disable()  # its time depends on the objects of all the tests before
        for _ in range(2):
            start = time.process_time()
            parse_trace(text), strict_verdict(text), eval_verdict(text), training_reward(text, "A"), format_reward(text)
            best = min(best, time.process_time() - start)
        gc.enable()
        return best

    count = 25_000 // len(piece)
    # Eight times the text may take eight times as long; a quadratic rule would take sixty-four times.
    assert seconds(piece * count * 8) < 24 * max(seconds(piece * count), 0.01)
