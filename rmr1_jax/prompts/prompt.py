"""What a prompt is: the exact text around the two answers that a judge compares, and the YAML file that holds it.

A `Prompt` is a system text (or none) and two frames: the fixed texts that stand before, between and after the parts of
a single-turn or a multi-turn comparison. Rendering only joins strings, so an answer that holds braces, tags or
delimiters cannot change the frame, and the instructions and delimiters are never cut.

Next: `prompts/cor.py` for the prompts by name, `prompts/recover.py` for a published one from its rows.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.escape import escape_text, frame_delimiters

Messages = list[dict[str, str]]  # what a chat template takes: [{"role": ..., "content": ...}, ...]

QUESTION = "[Client Question]\n"


RESPONSES = (
    "\n\n[The Start of Chatbot A's Response]\n",
    "\n[The End of Chatbot A's Response]",
    "[The Start of Chatbot B's Response]\n",
    "\n[The End of Chatbot B's Response]",
)


CONVERSATIONS = (
    "[The Start of the Conversation between Chatbot A and the Client]\n",
    "\n[The End of the Conversation between Chatbot A and the Client]",
    "[The Start of the Conversation between Chatbot B and the Client]\n",
    "\n[The End of the Conversation between Chatbot B and the Client]",
)


SINGLE_PARTS = ("{question}", "{response_a}", "{response_b}")


MULTI_PARTS = ("{conversation_a}", "{conversation_b}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A system text and the frames of the user turn.

    `single_turn` is the text before the question, between question and answer A, between the answers, and after answer
    B; `multi_turn` the text before conversation A, between the conversations, and after conversation B. `note` says
    where the prompt comes from; it is kept in the prompt's file and never shown to the judge.

    `escape_untrusted` says whether the client's and the chatbots' texts pass through `escape_text`; otherwise they are
    shown unchanged, as in the published prompts and rows. It is not written into the prompt's file.
    """

    name: str
    system: str | None
    single_turn: tuple[str, str, str, str]
    multi_turn: tuple[str, str, str]
    note: str = ""
    escape_untrusted: bool = False

    def render(self, question: str, response_a: str, response_b: str) -> Messages:
        """The messages that ask for a verdict on two answers to one question."""
        parts = [question, response_a, response_b]
        if self.escape_untrusted:
            own = frame_delimiters(self.single_turn)
            parts = [escape_text(part, own) for part in parts]
        return self._messages(join_frame(self.single_turn, parts))

    def render_conversations(
        self, conversation_a: Sequence[tuple[str, str]], conversation_b: Sequence[tuple[str, str]]
    ) -> Messages:
        """The messages that ask for a verdict on two conversations of (role, content), each shown whole."""
        sides = [(conversation_a, "A"), (conversation_b, "B")]
        if self.escape_untrusted:
            show = functools.partial(escape_text, delimiters=frame_delimiters(self.multi_turn), in_conversation=True)
            sides = [([(role, show(content)) for role, content in messages], side) for messages, side in sides]
        parts = [conversation_text(messages, side) for messages, side in sides]
        return self._messages(join_frame(self.multi_turn, parts))

    @property
    def structure(self) -> str:
        """The trace that the prompt asks for, a key of `trace.STRUCTURES`, read off the tags that it names."""
        told = f"{self.system or ''}{''.join(self.single_turn)}"
        for tag, structure in (("<type>", "cor"), ("<rubric>", "rubric"), ("<eval>", "compare")):
            if tag in told:
                return structure
        return "verdict"

    def _messages(self, user: str) -> Messages:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": user}]


def published_frames(
    before: str = "", between: str = "\n\n", after: str = ""
) -> tuple[tuple[str, str, str, str], tuple[str, str, str]]:
    """The single-turn and the multi-turn frame with the published delimiters and these texts around them."""
    start_a, end_a, start_b, end_b = RESPONSES
    single_turn = (before + QUESTION, start_a, end_a + between + start_b, end_b + after)
    start_a, end_a, start_b, end_b = CONVERSATIONS
    return single_turn, (before + start_a, end_a + between + start_b, end_b + after)


def conversation_text(conversation: Sequence[tuple[str, str]], side: str) -> str:
    """A conversation of (role, content) as lines `User: ...` and `Chatbot A: ...`, the published layout."""
    speakers = {"user": "User", "assistant": f"Chatbot {side}"}
    for role, _ in conversation:
        if role not in speakers:
            raise InputError(f"conversation {side} has a message with role {role!r}; expected 'user' or 'assistant'")
    return "\n".join(f"{speakers[role]}: {content}" for role, content in conversation)


def join_frame(frame: Sequence[str], parts: Sequence[str]) -> str:
    """The frame's texts with the parts in their places: one text more than there are parts."""
    pieces = [frame[0]]
    for part, text in zip(parts, frame[1:], strict=True):
        pieces += [part, text]
    return "".join(pieces)


def split_frame(frame: Sequence[str], text: str) -> tuple[str, ...] | None:
    """The parts that stand in the frame, or None where the text does not have it; the inverse of `join_frame`.

    Where a part itself holds the frame's text there is more than one way to split. The first one found is given, and
    joining it again gives the same text whichever it is.
    """
    inner = len(text) - len(frame[-1])
    if not text.startswith(frame[0]) or not text.endswith(frame[-1]) or inner < len(frame[0]):
        return None
    parts, start = [], len(frame[0])
    for separator in frame[1:-1]:
        found = text.find(separator, start, inner)
        if found < 0:
            return None
        parts.append(text[start:found])
        start = found + len(separator)
    return (*parts, text[start:inner])


def split_user_turn(prompt: Prompt, text: str) -> tuple[str, str, str]:
    """(question, response_a, response_b) of a single-turn user message that `prompt` rendered.

    Raises InputError where the text is not in the prompt's single-turn frame. See `split_frame` on answers that imitate
    the delimiters.
    """
    parts = split_frame(prompt.single_turn, text)
    if parts is None:
        raise InputError(
            f"the user turn is not in the single-turn frame of prompt {prompt.name!r}; expected it to begin with "
            f"{prompt.single_turn[0]!r}, to end with {prompt.single_turn[3]!r} and to hold the delimiters between"
        )
    question, response_a, response_b = parts
    return question, response_a, response_b


# ---- prompt files ----


def load_prompt(path: str | Path) -> Prompt:
    """Reads a prompt file: a YAML mapping with `name`, `system` (text or null), `single_turn`, `multi_turn`, `note`.

    The frames are texts with places: `{question}`, `{response_a}`, `{response_b}` and `{conversation_a}`,
    `{conversation_b}`, each once and in this order; other braces are plain text. `note` may be left out. Raises
    InputError with the file, the place and the field for anything else.
    """
    try:
        fields = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"prompt file {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else f"{path}"
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{place}: not YAML: {problem}") from error
    required = ("name", "system", "single_turn", "multi_turn")
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a mapping with the keys {', '.join(required)}, got {type(fields).__name__}")
    for key in fields:
        if key not in (*required, "note"):
            nearest = difflib.get_close_matches(str(key), (*required, "note"), n=1, cutoff=0.0)[0]
            raise InputError(f"{path}: unknown key {key!r}; the nearest known one is {nearest!r}")
    for key in required:
        if key not in fields:
            raise InputError(f"{path}: the key {key!r} is missing" + (" (null for none)" if key == "system" else ""))
    for key, value in fields.items():
        if not isinstance(value, str) and not (key == "system" and value is None):
            raise InputError(f"{path}: field {key!r} is {value!r} ({type(value).__name__}), expected a text")
    single_turn = _frame_from_template(fields["single_turn"], SINGLE_PARTS, f"{path}: field 'single_turn'")
    multi_turn = _frame_from_template(fields["multi_turn"], MULTI_PARTS, f"{path}: field 'multi_turn'")
    return Prompt(**{**fields, "single_turn": single_turn, "multi_turn": multi_turn})


def save_prompt(prompt: Prompt, path: str | Path) -> None:
    """Writes a prompt file from which `load_prompt` gives the same prompt, character by character."""
    frames = {
        "single_turn": join_frame(prompt.single_turn, SINGLE_PARTS),
        "multi_turn": join_frame(prompt.multi_turn, MULTI_PARTS),
    }
    fields = {"name": prompt.name, "note": prompt.note, "system": prompt.system, **frames}
    # A frame that spells one of the places itself would be read back otherwise: refused before anything is written.
    for key, places in (("single_turn", SINGLE_PARTS), ("multi_turn", MULTI_PARTS)):
        _frame_from_template(frames[key], places, f"prompt {prompt.name!r}: the text of {key!r}")
    written = yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    try:
        Path(path).write_text(written, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"prompt file {path}: cannot be written ({error.strerror})") from error


def _frame_from_template(template: str, places: Sequence[str], where: str) -> tuple[str, ...]:
    texts, rest = [], template
    for place in places:
        if template.count(place) != 1 or place not in rest:
            raise InputError(f"{where} must hold {', '.join(places)}, each once and in this order")
        before, rest = rest.split(place)
        texts.append(before)
    return (*texts, rest)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks that a person can edit."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
