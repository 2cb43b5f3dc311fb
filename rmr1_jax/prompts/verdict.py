"""Which answer a judge's text names: three rules, and the two rewards that training uses.

Two rules are the published ones to the letter, so that published numbers can be reproduced; each can be fooled by a
text that imitates a verdict. The strict one is ours, and the judge uses it.

| rule | reads | names X where |
|---|---|---|
| `training_reward` | the last 80 characters | `<answer>[[X]]</answer>` stands there, and not the other one |
| `eval_verdict` | the whole text | `[[X]]` stands in it, and not the other one |
| `strict_verdict` | what follows the last `</think>` | it ends with `<answer>[[X]]</answer>`, no answer has the other |

Next: `judge.py` and `train/rollout.py`, which call these.
"""

from __future__ import annotations

import re

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.trace import after_thinking, parse_trace

# One published 32B judge in twelve closes a tag too many after its answer: that leaves no doubt of what it said.
_FINAL_ANSWER = re.compile(r"<answer>\[\[([AB])\]\]</answer>(?:\s*</(?:type|rubric|solution|eval|answer)>)*\Z")


_ANY_ANSWER = re.compile(r"<answer>\s*\[\[([AB])\]\]")

SIDES = ("A", "B")  # the letters of the two answers, in the order in which the judge sees them


def other_side(side: str | None) -> str | None:
    """The letter of the other answer: "B" for "A", "A" for "B"; None (no verdict) stays None.

    A verdict on a pair whose answers were exchanged is translated back by this function.
    """
    return {"A": "B", "B": "A", None: None}[side]


def training_reward(text: str, right: str, last_chars: int = 80) -> float:
    """1.0 if the end of `text` gives the verdict `right` ("A" or "B") and not the other one, else -1.0.

    `last_chars` is how many characters the end has, 80 as published (arXiv 2505.02387 and its code).
    """
    if right not in SIDES:
        raise InputError(f"right={right!r}: the better answer is named 'A' or 'B'")
    if last_chars < 1:
        raise InputError(f"last_chars={last_chars}: expected at least 1; the published rule has 80")
    end = text[-last_chars:]
    gives = f"<answer>[[{right}]]</answer>" in end and f"<answer>[[{other_side(right)}]]</answer>" not in end
    return 1.0 if gives else -1.0


def format_reward(text: str, structure: str = "cor") -> float:
    """1.0 if `text` is a whole trace in form, else 0.0: the format term of cold-start RL (format + right answer).

    `structure` is what the prompt asks for (`Prompt.structure`), the full Chain-of-Rubrics trace by default.
    """
    return float(parse_trace(text).is_complete(structure))


def eval_verdict(text: str) -> str | None:
    """The published evaluation rule: "A" or "B" if only that one of `[[A]]`, `[[B]]` stands in the text, else None."""
    has_a, has_b = "[[A]]" in text, "[[B]]" in text
    if has_a == has_b:
        return None
    return "A" if has_a else "B"


def strict_verdict(text: str) -> str | None:
    """The verdict that `text` ends with, "A" or "B"; None where it is not beyond doubt.

    Only what follows the last `</think>` counts. It must end, but for white space and stray closing tags of a trace,
    with one `<answer>[[X]]</answer>`, and no answer in it may name the other side, not even a quoted one.
    """
    judgement = text[after_thinking(text) :].rstrip()
    start = judgement.rfind("<answer>")
    final = _FINAL_ANSWER.match(judgement, max(start, 0))
    if final is None or judgement[:start].rstrip().endswith("</answer>"):  # no answer there, or two
        return None
    return final[1] if set(_ANY_ANSWER.findall(judgement)) == {final[1]} else None
