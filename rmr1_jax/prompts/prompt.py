"""Defines `Prompt`, the exact text around the two answers that a judge compares, and reads and writes prompt files.

A prompt is a system text (or none) and two frames: the fixed texts before, between and after the parts of a single-turn
or a multi-turn comparison. Rendering only joins strings, so an answer that holds braces, tags or delimiters cannot
change the frame, and the instructions and delimiters are never cut.

The project's own prompts are the files in `prompts/named/`: Chain-of-Rubrics, the prompt for reasoning models, and two
ablations. Their wording is ours. The tags and delimiters are the published ones, because checkpoints expect them to the
letter; a published checkpoint also expects its own sentences, which `recover_prompt` takes from rows of its training.

Next: `prompts/named/cor.yaml`; `prompts/trace.py`, which parses the text that the judge writes; `prompts/recover.py`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rmr1_jax.config import config_dataclass, load_config
from rmr1_jax.errors import InputError
from rmr1_jax.prompts.escape import escape_text, frame_delimiters

Messages = list[dict[str, str]]  # the input of a chat template: [{"role": ..., "content": ...}, ...]

# The published delimiters.
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

# The placeholders of a prompt file.
SINGLE_PARTS = ("{question}", "{response_a}", "{response_b}")
MULTI_PARTS = ("{conversation_a}", "{conversation_b}")

PROMPT_FILE = "prompt.yaml"  # in a model's directory: the prompt that it was trained with
OWN_PROMPTS = ("cor", "reasoning", "compare", "rubric")  # the project's own prompts, files in `named/`


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A system text and the frames of the user turn.

    Attributes:
        single_turn: the texts before the question, between question and answer A, between the answers, after answer B.
        multi_turn: the texts before conversation A, between the conversations, after conversation B.
        note: where the prompt comes from. It is kept in the prompt's file and never shown to the judge.
        escape_untrusted: whether the texts of client and chatbots pass through `escape_text`. Otherwise they are shown
            unchanged, as in the published rows. It is not kept in the prompt's file.
    """

    name: str
    system: str | None
    single_turn: tuple[str, str, str, str]
    multi_turn: tuple[str, str, str]
    note: str = ""
    escape_untrusted: bool = False

    def render(self, question: str, response_a: str, response_b: str) -> Messages:
        """Return the messages that ask for a verdict on two answers to one question."""
        parts = [question, response_a, response_b]
        if self.escape_untrusted:
            delimiters = frame_delimiters(self.single_turn)
            parts = [escape_text(part, delimiters) for part in parts]
        return self._messages(join_frame(self.single_turn, parts))

    def render_conversations(
        self, conversation_a: Sequence[tuple[str, str]], conversation_b: Sequence[tuple[str, str]]
    ) -> Messages:
        """Return the messages that ask for a verdict on two conversations of (role, content), each shown whole."""
        conversations = [conversation_a, conversation_b]
        if self.escape_untrusted:
            delimiters = frame_delimiters(self.multi_turn)
            escape = functools.partial(escape_text, delimiters=delimiters, in_conversation=True)
            conversations = [[(role, escape(content)) for role, content in own] for own in conversations]
        parts = [conversation_text(own, side) for own, side in zip(conversations, "AB", strict=True)]
        return self._messages(join_frame(self.multi_turn, parts))

    @property
    def structure(self) -> str:
        """The structure of the trace that the prompt asks for, a key of `trace.STRUCTURES`.

        It is derived from the tags that the prompt names.
        """
        instructions = f"{self.system or ''}{''.join(self.single_turn)}"
        for tag, structure in (("<type>", "cor"), ("<rubric>", "rubric"), ("<eval>", "compare")):
            if tag in instructions:
                return structure
        return "verdict"

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the system text and the frames."""
        wording = json.dumps([self.system, self.single_turn, self.multi_turn])
        return hashlib.sha256(wording.encode()).hexdigest()[:16]

    @property
    def identity(self) -> str:
        """The name and the digest, which the settings of a run record."""
        return f"{self.name} (sha256 {self.digest})"

    def _messages(self, user: str) -> Messages:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": user}]


def published_frames(
    before: str = "", between: str = "\n\n", after: str = ""
) -> tuple[tuple[str, str, str, str], tuple[str, str, str]]:
    """Return the single-turn and the multi-turn frame: the published delimiters with these texts around them."""
    start_a, end_a, start_b, end_b = RESPONSES
    single_turn = (before + QUESTION, start_a, end_a + between + start_b, end_b + after)
    start_a, end_a, start_b, end_b = CONVERSATIONS
    return single_turn, (before + start_a, end_a + between + start_b, end_b + after)


def conversation_text(conversation: Sequence[tuple[str, str]], side: str) -> str:
    """Return a conversation of (role, content) as lines `User: ...` and `Chatbot A: ...`, the published layout.

    Raises InputError for another role than "user" and "assistant".
    """
    speakers = {"user": "User", "assistant": f"Chatbot {side}"}
    for role, _ in conversation:
        if role not in speakers:
            raise InputError(f"conversation {side} has a message with role {role!r}; expected 'user' or 'assistant'")
    return "\n".join(f"{speakers[role]}: {content}" for role, content in conversation)


def join_frame(frame: Sequence[str], parts: Sequence[str]) -> str:
    """Put the parts between the frame's texts, of which there is one more than there are parts."""
    return "".join(text + part for text, part in zip(frame, [*parts, ""], strict=True))


def split_frame(frame: Sequence[str], text: str) -> tuple[str, ...] | None:
    """Return the parts that `join_frame` put into the frame, or None where the text does not fit the frame.

    Where a part holds a text of the frame, there is more than one way to split. The first one is returned; joining any
    of them gives the same text.
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


# ---- prompt files ----


@config_dataclass
class _PromptFile:
    """The keys of a prompt file. The frames are texts with placeholders."""

    name: str
    note: str = ""
    system: str | None
    single_turn: str
    multi_turn: str


def get_prompt(name_or_path: str | Path | Prompt) -> Prompt:
    """Return the prompt of that name (one of `OWN_PROMPTS`) or YAML file; a `Prompt` unchanged.

    Raises InputError for a name that is neither, and names the nearest known one; and as `load_prompt`.
    """
    if isinstance(name_or_path, Prompt):
        return name_or_path
    name, path = str(name_or_path), Path(name_or_path)
    if name in OWN_PROMPTS:
        return load_prompt(Path(__file__).parent / "named" / f"{name}.yaml")
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return load_prompt(path)
    nearest = difflib.get_close_matches(name, OWN_PROMPTS, n=1, cutoff=0.0)[0]
    raise InputError(
        f"prompt {name!r} is neither a name nor a file; the nearest name is {nearest!r} "
        f"(names: {', '.join(OWN_PROMPTS)}; a prompt file ends in .yaml)"
    )


def own_prompt(directory: Path) -> Prompt | None:
    """Return the prompt in the directory of a model or of a prepared set, or None if there is none. Raises InputError
    as `load_prompt`."""
    file = directory / PROMPT_FILE
    return load_prompt(file) if file.is_file() else None


def load_prompt(path: str | Path) -> Prompt:
    """Read a prompt file: a YAML mapping with `name`, `system` (a text or null), `single_turn`, `multi_turn`, `note`.

    The frames are texts with the placeholders `{question}`, `{response_a}`, `{response_b}` and `{conversation_a}`,
    `{conversation_b}`, each once and in this order; other braces are plain text. `note` may be left out.

    Raises:
        InputError: the file cannot be read or has another form. The message names the file and the field.
    """
    found = load_config(_PromptFile, path)
    single_turn = _frame_of(found.single_turn, SINGLE_PARTS, f"{path}: single_turn")
    multi_turn = _frame_of(found.multi_turn, MULTI_PARTS, f"{path}: multi_turn")
    return Prompt(**{**vars(found), "single_turn": single_turn, "multi_turn": multi_turn})


def check_prompt(prompt: Prompt) -> None:
    """Raise InputError if a frame of `prompt` holds a placeholder, which would be read back from a file as a part."""
    _frame_of(join_frame(prompt.single_turn, SINGLE_PARTS), SINGLE_PARTS, f"prompt {prompt.name!r}: single_turn")
    _frame_of(join_frame(prompt.multi_turn, MULTI_PARTS), MULTI_PARTS, f"prompt {prompt.name!r}: multi_turn")


def save_prompt(prompt: Prompt, path: str | Path) -> None:
    """Write a prompt file from which `load_prompt` reads the same prompt, character by character.

    Raises:
        InputError: the file cannot be written, or a frame holds a placeholder, which would be read back as a part.
    """
    check_prompt(prompt)
    fields = {"name": prompt.name, "note": prompt.note, "system": prompt.system}
    fields |= {"single_turn": join_frame(prompt.single_turn, SINGLE_PARTS)}
    fields |= {"multi_turn": join_frame(prompt.multi_turn, MULTI_PARTS)}
    written = yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    try:
        Path(path).write_text(written, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"prompt file {path}: cannot be written ({error.strerror})") from error


def _frame_of(template: str, placeholders: Sequence[str], where: str) -> tuple[str, ...]:
    """Split the text at the placeholders, each of which it must hold once and in this order."""
    frame, rest = [], template
    for placeholder in placeholders:
        if template.count(placeholder) != 1 or placeholder not in rest:
            raise InputError(f"{where} must hold {', '.join(placeholders)}, each once and in this order")
        before, rest = rest.split(placeholder)
        frame.append(before)
    return (*frame, rest)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, which a person can edit."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
