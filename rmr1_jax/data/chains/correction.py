"""The request of the second pass, and the phrases that its chain must not have. The wording is this project's own.

The answer trains a judge that is given no verdict: `revealing_words` finds chains that mention the one they were given.

Next: `chains.py`, which runs the two passes; `prompts/named/cor.yaml`, the prompt of the first.
"""

from __future__ import annotations

import re

from rmr1_jax.prompts.prompt import Messages
from rmr1_jax.prompts.trace import parse_trace

_EARLIER = """\
It read:

[The Start of the Earlier Attempt]
{chain}
[The End of the Earlier Attempt]

"""

_CORRECTION = """\


[Note]
There was an earlier attempt at this task, and it was turned down: {reason}. {earlier}\
Chatbot {right} is the one that served the client better. Do the task again from the beginning, in the form that is \
asked for above. Find out what the earlier attempt missed or weighed wrongly, and let your comparison lead to the \
result by its own evidence. Write as somebody who has seen the words of the client and of the chatbots and nothing \
else: not a word about an earlier attempt, about this note, or about a result that was known. End with \
<answer>[[{right}]]</answer>"""

_VERDICTS = r"(?:verdicts?|judge?ments?)"

# Phrases of judges about ordinary tasks are not among them: the correct answer, my final verdict, we are given that, as
# instructed, the expected outcome.
_REVEALING = (
    rf"\b(?:earlier|previous|prior) (?:attempt|evaluation|comparison|{_VERDICTS})",
    rf"\b(?:original|initial|first|revised|corrected|updated) {_VERDICTS}",
    rf"\b(?:given|provided|supplied|known|stated|specified|expected|required|desired|predetermined) {_VERDICTS}",
    rf"\b(?:correct|right|true) verdict|\b(?:gold|reference|ground[- ]truth) (?:label|preference|winner|{_VERDICTS})",
    r"\bi (?:was|am|have been|'ve been) (?:told|informed|instructed|given the (?:answer|result))\b",
    r"\b(?:known|given|stated|specified|said) to be (?:the )?(?:better|winner|winning)\b",
    r"\b(?:known|stipulated) that chatbot [ab]\b",
    r"\b(?:since|because|as|given that) (?:we|i) (?:already )?know (?:that )?chatbot [ab]\b",
    r"\b(?:result|outcome|winner|better chatbot) (?:that )?(?:was|is|has been) (?:already )?(?:known|given|provided)\b",
    r"\b(?:predetermined|known) (?:conclusion|outcome|result|winner)\b",
    r"\b(?:the|this) note (?:says|said|states|stated|tells|told|indicates|names)\b|\baccording to the note\b",
)
_REVEALING_PHRASE = re.compile("|".join(_REVEALING), re.IGNORECASE)


def correction(messages: Messages, chain: str, right: str, reason: str) -> Messages:
    """Return the messages of the second pass: those of the first, with a note appended to the last one.
    chain: the answer of the first pass, "" if there was none. right: "A" or "B". reason: why it was rejected."""
    earlier = _EARLIER.format(chain=chain) if chain else ""
    note = _CORRECTION.format(reason=reason, earlier=earlier, right=right)
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + note}]


def revealing_words(chain: str) -> str | None:
    """Find the words, outside quotes of the chatbots, that reveal that a chain's verdict was given; None if none do."""
    text = list(re.sub(r"\s", " ", chain))  # of the same length; a phrase may be broken over two lines
    for quote in parse_trace(chain).quotes:
        if quote.kind == "quote":
            text[quote.start : quote.end] = " " * (quote.end - quote.start)
    found = _REVEALING_PHRASE.search("".join(text))
    return found[0] if found else None
