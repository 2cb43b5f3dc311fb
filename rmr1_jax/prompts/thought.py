"""The thought of a reasoning model: where it ends in a text, and how a text continues a prompt that begins one.

Some chat templates end a prompt with `<think>`, so that every answer begins within a thought; some end it with an empty
thought, `<think></think>`, so that an answer has none. A trace must fit its prompt, so that no thought begins twice.

Next: `prompts/trace.py`, which parses what follows the thought.
"""

from __future__ import annotations

import re

from rmr1_jax.errors import InputError

_OPEN = re.compile(r"\s*<think>")
_OPENED_BY_PROMPT = re.compile(r"<think>\s*\Z")
_CLOSED_BY_PROMPT = re.compile(r"</think>\s*\Z")
_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")


def after_thinking(text: str) -> int:
    """Return the offset at which the judgement begins: after the last `</think>`, or at the end of an open thought."""
    begin = _last_end(text)
    # Only a `<think>` at the start opens a thought; the judge may mention one further on.
    return len(text) if _OPEN.match(text, begin) else begin


def opened_thought(prompt: str) -> str:
    """Return the `<think>` that a prompt ends in, with the white space after it; "" where it ends in no such tag."""
    opened = _OPENED_BY_PROMPT.search(prompt)
    return opened[0] if opened else ""


def continue_thought(prompt: str, trace: str) -> str:
    """Return what a model writes after `prompt` (its end is enough) if its whole text is `trace`.

    After a prompt that opens a thought, the trace's own `<think>` is left out, and a trace without a thought begins by
    closing the prompt's, as templates write an empty thought. After one that ends with an empty thought, an empty
    thought in the trace is left out.

    Raises:
        InputError: the trace's thought never ends, or it thinks where the prompt has ended the thought.
    """
    if _OPEN.match(trace, _last_end(trace)):
        raise InputError("the thought in its trace never ends; expected </think> and the judgement after it")
    opened = opened_thought(prompt)
    if opened and (begins := _OPEN.match(trace)):
        return trace[begins.end() :].removeprefix(opened.removeprefix("<think>"))
    if opened and "</think>" not in trace:
        return ("\n" if opened.endswith("\n") else "\n\n") + "</think>\n\n" + trace
    if _CLOSED_BY_PROMPT.search(prompt) and "</think>" in trace:
        empty = _EMPTY.match(trace)
        if empty is None or "</think>" in trace[empty.end() :]:
            raise InputError(
                "its trace has a thought, but the chat template ends each prompt with an empty thought; give a trace "
                "without one, or let the model think (enable_thinking in chat_template_kwargs)"
            )
        return trace[empty.end() :]
    return trace


def _last_end(text: str) -> int:
    """Return the offset after the last `</think>`, 0 where there is none."""
    found = text.rfind("</think>")
    return 0 if found < 0 else found + len("</think>")
