"""Reads which answer a judge's text names, by three rules, and computes the two rewards of training.

Two rules are exactly the published ones, so that published numbers can be reproduced; a text that imitates a verdict
can fool each of them. The strict rule is ours, and the judge uses it.

| rule | reads | names X where |
|---|---|---|
| `training_reward` | the last 80 characters | `<answer>[[X]]</answer>` occurs there, and not the other one |
| `eval_verdict` | the whole text | `[[X]]` occurs in it, and not the other one |
| `strict_verdict` | what follows the last `</think>` | it ends with an answer X, however spelled, and has no other |

Next: `judge/judgement.py` and `train/rollout.py`, which call these functions.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Literal, get_args

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.thought import after_thinking
from rmr1_jax.prompts.trace import parse_trace

Side = Literal["A", "B"]  # the answer that the judge is shown first, and the other one
Verdict = Literal["A", "B", None]  # None: neither answer is named

# What models put around and between the parts of a verdict, which says nothing: Markdown and white space.
_MARKS = r"[\s*_`]*"
_OPENING, _CLOSING = r"<\s*answer\s*>", r"<\s*/\s*answer\s*>"
_NAMED = rf"{_OPENING}{_MARKS}\[\[{_MARKS}([AB]){_MARKS}\]\]"
_AFTER = r"[\s*_`.!\u3002]"
# One in twelve traces of a published 32B judge closes a tag too many after its answer; the verdict is still clear.
_FINAL_ANSWER = re.compile(
    rf"{_NAMED}{_MARKS}{_CLOSING}(?:{_AFTER}|</(?:type|rubric|solution|eval|answer)>)*\Z",
)
_ANY_ANSWER = re.compile(_NAMED)
_ANY_NAME = re.compile(rf"\[\[{_MARKS}([AB]){_MARKS}\]\]")
_LAST_ANSWER = re.compile(_OPENING)
_ANSWER_BEFORE = re.compile(rf"{_CLOSING}{_AFTER}*\Z")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
_FULL_WIDTH = str.maketrans("\uff1c\uff1e\uff0f\uff3b\uff3d\u3010\u3011\uff21\uff22", "<>/[][]AB")


def other_side(side: Verdict) -> Verdict:
    """Return the letter of the other answer: "B" for "A", "A" for "B", None for None.

    It translates a verdict on a pair whose answers were exchanged.
    """
    exchanged: dict[Verdict, Verdict] = {"A": "B", "B": "A", None: None}
    return exchanged[side]


def training_reward(text: str, right: Side, last_chars: int = 80) -> float:
    """Return 1.0 if the end of `text` gives the verdict `right` ("A" or "B") and not the other one, else -1.0.

    `last_chars` is the length of the end in characters, 80 in the published rule (arXiv 2505.02387 and its code).
    Raises InputError where `right` is another value or `last_chars` is not positive.
    """
    if right not in get_args(Side):
        raise InputError(f"right={right!r}: the better answer is named 'A' or 'B'")
    if last_chars < 1:
        raise InputError(f"last_chars={last_chars}: expected at least 1; the published rule has 80")
    end = text[-last_chars:]
    gives = f"<answer>[[{right}]]</answer>" in end and f"<answer>[[{other_side(right)}]]</answer>" not in end
    return 1.0 if gives else -1.0


def format_reward(text: str, structure: str = "cor") -> float:
    """Return 1.0 if `text` is a complete, well-formed trace, else 0.0: the format reward of cold-start RL.

    `structure` names the parts that the prompt asks for (`Prompt.structure`), by default those of Chain-of-Rubrics.
    """
    return float(parse_trace(text).is_complete(structure))


def eval_verdict(text: str) -> Verdict:
    """Return "A" or "B" if only that one of `[[A]]`, `[[B]]` occurs in the text, else None: the published rule."""
    has_a, has_b = "[[A]]" in text, "[[B]]" in text
    if has_a == has_b:
        return None
    return "A" if has_a else "B"


def strict_verdict(text: str) -> Verdict:
    """Return the verdict that `text` ends with, "A" or "B"; None where it is open to doubt.

    Only the text after the last `</think>` counts. It must end with one `<answer>[[X]]</answer>`, and no answer in it
    may name the other side, not even a quoted one. White space, Markdown (bold, code and its fences), invisible
    characters and full-width brackets in and around the answer are read over, as are a full stop and stray closing tags
    of a trace after it. A lower-case letter names no side. Where the last answer cannot be read, no earlier one counts.
    """
    text = text.translate(_INVISIBLE)
    judgement = text[after_thinking(text) :].translate(_FULL_WIDTH)
    start = max((tag.start() for tag in _LAST_ANSWER.finditer(judgement)), default=0)
    final = _FINAL_ANSWER.match(judgement, start)
    if final is None or _ANSWER_BEFORE.search(judgement[:start]):  # no answer there, or two
        return None
    if set(_ANY_ANSWER.findall(judgement)) != {final[1]}:
        return None
    return "A" if final[1] == "A" else "B"


RULES = MappingProxyType({"strict": strict_verdict, "eval": eval_verdict})


def why_unread(text: str, rule: str) -> Literal["other_form", "several_verdicts", "no_verdict"]:
    """Return why `rule` reads no verdict from `text`.

    "other_form": another rule reads one, as `eval` does a bare `[[A]]`; "several_verdicts": the text names both
    answers; "no_verdict": it names none.
    """
    if any(read(text) for name, read in RULES.items() if name != rule):
        return "other_form"
    return "several_verdicts" if len(set(_ANY_NAME.findall(text))) == 2 else "no_verdict"
