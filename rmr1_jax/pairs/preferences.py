"""Makes preference pairs of our own rows and of those that other tools write, by the fields that a row has.

A row has two answers and, unless they are whole conversations, a question:

    question      text or messages in `question`, `prompt`, `instruction` (with a further `input`), `input`, `context`;
                  a text may be a dialogue "Human: ... Assistant:". `system`: the text of a system message before it
    two answers   texts, messages, or one message: chosen and rejected (TRL, OpenRLHF, UltraFeedback, Anthropic's
                  hh-rlhf), chosen_response and rejected_response; shown in an order drawn from (seed, id)
    or A and B    response_a and response_b (ours, OpenRubrics), response_1 and response_2 (PPE, HelpSteer2), response1
                  and response2 (HelpSteer3), conversation_a and conversation_b (ours, arenas); shown in this order
    better side   `better`: "A", "B", "tie" or null. Where it is null, a `winner` such as "model_a", "Response B" or
                  "tie (bothbad)", or a preference from -3 (the first one is better) to 3

Without a question, chosen and rejected texts are dialogues or, as in TRL, begin with the same words, the question. A
row without an `id` gets its number in the source. All other fields go into `meta`.

Next: `pairs/read.py`, which tells these rows from those of benchmarks and training sets.
"""

from __future__ import annotations

import difflib
import math
import re
from types import MappingProxyType

from rmr1_jax.pairs.order import Order
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.rows import Row, describe

Conversation = list[tuple[str, str]]  # (role, content)

QUESTIONS = ("question", "prompt", "instruction", "input", "context")
CONVERSATIONS = ("conversation_a", "conversation_b")
RANKED = (("chosen", "rejected"), ("chosen_response", "rejected_response"))  # the others are shown in their order
OWN_SIDES = (("response_a", "response_b"), ("chosen", "rejected"), CONVERSATIONS)
SIDES = (*OWN_SIDES, ("chosen_response", "rejected_response"), ("response_1", "response_2"), ("response1", "response2"))

_SHAPES = MappingProxyType(  # for errors: the fields of the formats
    {
        "this project's format": ("question", "response_a", "response_b"),
        "this project's format of conversations": CONVERSATIONS,
        "TRL's and OpenRLHF's format": ("prompt", "chosen", "rejected"),
        "OpenRubrics' format": ("instruction", "response_a", "response_b"),
        "HelpSteer2's format": ("prompt", "response_1", "response_2"),
        "HelpSteer3's format": ("context", "response1", "response2"),
        "Code-Preference-Pairs' format": ("input", "accepted", "rejected"),
        "Math-Step-DPO's format": ("prompt", "initial_reason_steps", "full_chosen", "full_rejected"),
    }
)
_WINNERS = MappingProxyType(
    {
        **{name: "A" for name in ("a", "modela", "responsea", "assistanta")},
        **{name: "B" for name in ("b", "modelb", "responseb", "assistantb")},
        **{name: "tie" for name in ("tie", "ties", "bothbad", "tiebothbad")},
    }
)
_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")


def parse_pair(row: Row, order: Order) -> list[PreferencePair]:
    """Row of one of the formats above -> one pair."""
    name, sides = row.name(), _sides(row)
    used, first, second = _conversations(row, sides)
    meta = {key: value for key, value in row.value.items() if key not in ("id", *used, *sides)}
    better = _better(row, sides)
    meta.pop("better", None)
    if sides in RANKED and better != "tie":
        return [PreferencePair.from_preference(name, first, second, chosen_in_b=order.by_id(name), meta=meta)]
    tie, better = better == "tie", None if better == "tie" else better
    return [PreferencePair(id=name, conversation_a=first, conversation_b=second, better=better, tie=tie, meta=meta)]


# ---- answers and question ----


def _sides(row: Row) -> tuple[str, str]:
    """Return the names of the two fields that hold the answers. The row must not hold another two of `OWN_SIDES`."""
    named = [kind for kind in SIDES if kind[0] in row.value or kind[1] in row.value]
    # A table has all columns in all rows: those that are null do not count, unless there are no others.
    present = [kind for kind in named if any(row.value.get(side) is not None for side in kind)] or named
    present = [kind for kind in present if kind in OWN_SIDES] or present[:1]
    if len(present) != 1:
        got = " and ".join(f"{a}/{b}" for a, b in present) or "none of them"
        expected = "response_a/response_b, chosen/rejected, conversation_a/_b"
        raise row.bad(None, f"expected one of {expected}; got {got}. It {_looks_like(row)}")
    for side in present[0]:
        if side not in row.value:
            raise row.bad(side, f"is missing; the row {_looks_like(row)}")
    return present[0]


def _conversations(row: Row, sides: tuple[str, str]) -> tuple[tuple[str, ...], Conversation, Conversation]:
    """Return the other fields that were used, and the two conversations."""
    if sides == CONVERSATIONS:
        used, (first, second) = (), map(row.conversation, sides)
    else:
        used, asked = _question(row, sides)
        if asked is None and all(isinstance(row.value[side], str) for side in sides):
            if sides not in RANKED:
                raise row.bad("question", f"is missing; the row {_looks_like(row)}")
            first, second = _implicit(row, sides)
        else:
            first, second = (_answered(row, side, asked, used) for side in sides)
    system = row.value.get("system")
    if system is not None and row.text("system").strip():
        for side, conversation in zip(sides, (first, second), strict=True):
            if conversation[0][0] == "system" and conversation[0][1] != system:
                raise row.bad("system", f"is not the system message that {side!r} begins with")
        first, second = (it if it[0][0] == "system" else [("system", system), *it] for it in (first, second))
    return (*used, "system"), first, second


def _question(row: Row, sides: tuple[str, str]) -> tuple[tuple[str, ...], Conversation | None]:
    """Return the fields that hold the question, and its messages; None where no field does."""
    whole = all(_is_whole(row.value[side]) for side in sides)
    present = [name for name in (QUESTIONS[:2] if whole else QUESTIONS) if name in row.value]
    name = next((name for name in present if row.value[name] is not None), None)
    if name is None:
        if present and not whole:
            row.text(present[0])  # null, which is no text
        return (), None
    if isinstance(row.value[name], list):
        return (name,), row.conversation(name, last="user")
    text, used = row.text(name), (name,)
    if name == "instruction" and isinstance(more := row.value.get("input"), str) and more:
        text, used = f"{text}\n{row.text('input')}", ("instruction", "input")
    turns = _dialogue(text)
    if turns and len(turns) > 1 and turns[-1] == ("assistant", ""):
        return used, turns[:-1]
    return used, [("user", text)]


def _is_whole(value: object) -> bool:
    """Whether an answer is a whole conversation, with the question in it."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and first.get("role") in ("user", "system")


def _answered(row: Row, side: str, asked: Conversation | None, used: tuple[str, ...]) -> Conversation:
    """Return the conversation of a side: the question and its answer, or the side itself where it is a whole one."""
    if isinstance(value := row.value[side], dict):
        row = Row(value={**row.value, side: [value]}, place=row.place, raw=row.raw)
    elif not isinstance(value, list):
        text = row.text(side)
        if asked is None:
            raise row.bad(side, "is a text, and no field holds its question")
        return [*asked, ("assistant", text)]
    said = row.conversation(side)
    if said[0][0] == "assistant":
        if asked is None:
            raise row.bad(side, f"holds no message of a user, and there is no question; the row {_looks_like(row)}")
        return [*asked, *said]
    if asked is None or said[: len(asked)] == asked:
        return said
    spoken = said[1:] if said[0][0] == "system" else said
    wanted = asked[1:] if asked[0][0] == "system" else asked
    turns = [content.strip() for role, content in spoken if role == "user"]
    if spoken[: len(wanted)] != wanted and not (len(wanted) == 1 and wanted[0][1].strip() in turns):
        raise row.bad(side, f"is a whole conversation, in which {used[0]!r} does not occur")
    return asked[:1] + spoken if said is spoken and asked[0][0] == "system" else said


def _implicit(row: Row, sides: tuple[str, str]) -> tuple[Conversation, Conversation]:
    """Split two texts without a question: dialogues by their turns, others where they stop to be the same words."""
    texts = [row.text(side) for side in sides]
    dialogues = [_dialogue(text) for text in texts]
    if any(dialogues):
        for side, turns in zip(sides, dialogues, strict=True):
            if not turns or turns[0][0] != "user" or turns[-1][0] != "assistant":
                raise row.bad(side, "is no dialogue from 'Human:' to 'Assistant:', and no field holds its question")
        return dialogues[0], dialogues[1]
    length = next((k for k, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), None)
    if length is None:
        raise row.bad(sides[0], f"or {sides[1]!r} is the beginning of the other, and no field holds their question")
    while length and texts[0][length - 1].isalnum() and any(text[length].isalnum() for text in texts):
        length -= 1  # not within a word
    if length and texts[0][length - 1] == " ":
        length -= 1
    question = texts[0][:length]
    if not question.strip():
        reason = f"and {sides[1]!r} do not begin with the same question, and no field holds it"
        raise row.bad(sides[0], f"{reason}; the row {_looks_like(row)}")
    return tuple([("user", question), ("assistant", text[length:])] for text in texts)


def _dialogue(text: str) -> Conversation | None:
    """Split a text "Human: ... Assistant: ..." into its turns; None for another text."""
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        return None
    roles = ({"Human": "user", "Assistant": "assistant"}[speaker] for speaker in turns[::2])
    return [(role, said.strip()) for role, said in zip(roles, turns[1::2], strict=True)]


# ---- better side ----


def _better(row: Row, sides: tuple[str, str]) -> str | None:
    """Return "A", "B", "tie", or None where the row does not say it."""
    better, winner = row.value.get("better"), row.value.get("winner")
    if better == "tie":
        return "tie"
    if better is not None and sides not in RANKED:
        if better not in ("A", "B"):
            raise row.bad("better", f"is {better!r}, expected 'A', 'B', 'tie' or null")
        return better
    if isinstance(winner, str):
        return _WINNERS.get(re.sub(r"\W|_", "", winner).lower())
    for name in ("overall_preference", "preference_strength"):
        value = row.value.get(name)
        if value is None or sides[0] not in ("response_1", "response1"):
            continue
        try:
            number = float(value)  # CSV has texts
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not -3 <= number <= 3:
            raise row.bad(name, f"is {describe(value)}, expected -3 to 3")
        return "A" if number < 0 else "B" if number else "tie"
    return None


# ---- errors ----


def _looks_like(row: Row) -> str:
    """Describe a row that lacks something by the nearest format, what of it is missing, and the fields it has."""
    keys = [str(key) for key in row.value]
    # A field that has its own place in the format is not another one misspelt.
    near = {
        shape: [
            difflib.get_close_matches(name, [k for k in keys if k == name or k not in fields], n=1, cutoff=0.8)
            for name in fields
        ]
        for shape, fields in _SHAPES.items()
    }
    shape = max(near, key=lambda shape: sum(map(bool, near[shape])) / len(near[shape]))
    has = f"has {', '.join(map(repr, keys)) or 'no fields'}"
    if not any(near[shape]):
        return f"{has}, and looks like no format that is read"
    wanted = zip(_SHAPES[shape], near[shape], strict=True)
    missing = [f"{name!r}{f' (is it {found[0]!r}?)' if found else ''}" for name, found in wanted if name not in keys]
    without = f" without {' and '.join(missing)}" if missing else ""
    return f"looks like {shape} ({', '.join(_SHAPES[shape])}){without}; it {has}"
