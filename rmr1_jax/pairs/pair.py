"""Defines `PreferencePair`: two conversations with a client, one of them better. Everything else works on these.

Next: `pairs/read.py`, which reads pairs from files; `prompts/prompt.py`, which renders them for a judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.prompt import Messages, Prompt
from rmr1_jax.prompts.verdict import other_side

ROLES = ("user", "assistant", "system")  # a system message can only be the first one


class Message(NamedTuple):
    """One message of a conversation: its role, one of `ROLES`, and its text."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two conversations, each ending with the answer to be judged, and the better side ("A", "B"; None: not known).

    `tie`: the source says that neither is better; `better` is then None. `meta` holds the other facts of the source
    (subset, domain, model names, ...). An empty answer is a valid loser; where both answers are empty there is nothing
    to judge, and `meta["both_empty"]` is True. Raises InputError if a conversation does not end with the assistant, has
    other roles or a system message that does not come first, before a user's; or if `better` has another value.
    """

    id: str
    conversation_a: tuple[Message, ...]
    conversation_b: tuple[Message, ...]
    better: str | None = None
    tie: bool = False
    meta: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        for side in ("a", "b"):
            conversation = tuple(Message(*message) for message in getattr(self, f"conversation_{side}"))
            roles = [message.role for message in conversation]
            spoken = roles[1:] if roles[:2] == ["system", "user"] else roles
            if not roles or roles[-1] != "assistant" or not set(spoken) <= {"user", "assistant"}:
                raise InputError(
                    f"pair {self.id!r}: conversation_{side} has the roles {roles}; expected 'user' and 'assistant', "
                    "the last one 'assistant', perhaps after a 'system' message"
                )
            object.__setattr__(self, f"conversation_{side}", conversation)
        if self.better not in (None, "A", "B"):
            raise InputError(f"pair {self.id!r}: better is {self.better!r}, expected 'A', 'B' or None")
        if self.tie and self.better:
            raise InputError(f"pair {self.id!r}: better is {self.better!r}, expected None for a tie")
        if not self.response_a.strip() and not self.response_b.strip():
            object.__setattr__(self, "meta", {**self.meta, "both_empty": True})

    @classmethod
    def from_answers(
        cls,
        id: str,
        question: str,
        response_a: str,
        response_b: str,
        *,
        better: str | None = None,
        meta: Mapping[str, object] | None = None,
    ) -> PreferencePair:
        """Make a single-turn pair: two answers to one question."""
        a, b = ((Message("user", question), Message("assistant", answer)) for answer in (response_a, response_b))
        return cls(id=id, conversation_a=a, conversation_b=b, better=better, meta=meta or {})

    @classmethod
    def from_preference(
        cls,
        id: str,
        chosen: Sequence[tuple[str, str]],
        rejected: Sequence[tuple[str, str]],
        *,
        chosen_in_b: bool,
        meta: Mapping[str, object] | None = None,
    ) -> PreferencePair:
        """Make the pair of a chosen and a rejected conversation, with the chosen one shown as B or as A."""
        a, b = (rejected, chosen) if chosen_in_b else (chosen, rejected)
        better = "B" if chosen_in_b else "A"
        return cls(id=id, conversation_a=tuple(a), conversation_b=tuple(b), better=better, meta=meta or {})

    @property
    def single_turn(self) -> bool:
        """Whether each side is one answer, to the same question, without a system message."""
        return _same_question(self.conversation_a, self.conversation_b)

    @property
    def identical(self) -> bool:
        """Whether the two sides are the same conversation, but for white space around the last answer."""
        same_before = self.conversation_a[:-1] == self.conversation_b[:-1]
        return same_before and self.response_a.strip() == self.response_b.strip()

    @property
    def question(self) -> str:
        """The client's last message before answer A; "" where there is none."""
        asked = [message.content for message in self.conversation_a if message.role == "user"]
        return asked[-1] if asked else ""

    @property
    def response_a(self) -> str:
        """The answer that conversation A ends with."""
        return self.conversation_a[-1].content

    @property
    def response_b(self) -> str:
        """The answer that conversation B ends with."""
        return self.conversation_b[-1].content

    def swapped(self) -> PreferencePair:
        """Return the same pair with A and B exchanged; the id stays."""
        better = other_side(self.better)
        return replace(self, conversation_a=self.conversation_b, conversation_b=self.conversation_a, better=better)


def render_pair(prompt: Prompt, pair: PreferencePair) -> Messages:
    """Return the messages that ask for a verdict on `pair`, in the single-turn frame where it fits.

    The published frames have no place for a system message: its text is shown in front of the client's first message.
    """
    a, b = _with_system_in_front(pair.conversation_a), _with_system_in_front(pair.conversation_b)
    if _same_question(a, b):
        return prompt.render(a[0].content, a[1].content, b[1].content)
    return prompt.render_conversations(a, b)


def _same_question(a: Sequence[Message], b: Sequence[Message]) -> bool:
    return len(a) == len(b) == 2 and a[0].role == "user" and a[0] == b[0]


def _with_system_in_front(conversation: tuple[Message, ...]) -> tuple[Message, ...]:
    """Join a system message, if there is one, with the user's message after it."""
    if conversation[0].role != "system":
        return conversation
    system, first, *rest = conversation
    text = f"{system.content}\n\n{first.content}" if system.content.strip() else first.content
    return (Message("user", text), *rest)
