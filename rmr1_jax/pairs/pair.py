"""PreferencePair: two conversations with a client, one of them better, the unit that everything else works on.

Next: `data/preferences.py`, which reads pairs; `prompts/prompt.py`, which shows them to a judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.prompt import Messages, Prompt
from rmr1_jax.prompts.verdict import other_side

ROLES = ("user", "assistant")


class Message(NamedTuple):
    """One message of a conversation: role "user" or "assistant", and its text."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two conversations, each ending with the answer to be judged, and which is better ("A", "B"; None: not known).

    `meta` holds what the source says beside that (subset, domain, model names, ...). An empty answer is a valid loser;
    where both answers are empty there is nothing to judge, and `meta["both_empty"]` is True.

    Raises InputError where a conversation does not end with the assistant, has other roles, or `better` is another
    value.
    """

    id: str
    conversation_a: tuple[Message, ...]
    conversation_b: tuple[Message, ...]
    better: str | None = None
    meta: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        for side in ("a", "b"):
            conversation = tuple(Message(*message) for message in getattr(self, f"conversation_{side}"))
            roles = [message.role for message in conversation]
            if not roles or roles[-1] != "assistant" or not set(roles) <= set(ROLES):
                raise InputError(
                    f"pair {self.id!r}: conversation_{side} has the roles {roles}; expected 'user' and 'assistant', "
                    "the last one 'assistant'"
                )
            object.__setattr__(self, f"conversation_{side}", conversation)
        if self.better not in (None, "A", "B"):
            raise InputError(f"pair {self.id!r}: better is {self.better!r}, expected 'A', 'B' or None")
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
        """The single-turn pair: two answers to one question."""
        return cls(
            id=id,
            conversation_a=(Message("user", question), Message("assistant", response_a)),
            conversation_b=(Message("user", question), Message("assistant", response_b)),
            better=better,
            meta=meta or {},
        )

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
        """The pair of a chosen and a rejected conversation, with the chosen one in B or in A."""
        a, b = (rejected, chosen) if chosen_in_b else (chosen, rejected)
        better = "B" if chosen_in_b else "A"
        return cls(id=id, conversation_a=tuple(a), conversation_b=tuple(b), better=better, meta=meta or {})

    @property
    def single_turn(self) -> bool:
        """Whether both sides are one answer to one and the same question."""
        if not len(self.conversation_a) == len(self.conversation_b) == 2:
            return False
        return self.conversation_a[0].role == "user" and self.conversation_a[0] == self.conversation_b[0]

    @property
    def question(self) -> str:
        """What the client asked last before answer A (a single-turn pair's question); "" where nothing was asked."""
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
        """The same pair with A and B exchanged; the id stays."""
        return replace(
            self,
            conversation_a=self.conversation_b,
            conversation_b=self.conversation_a,
            better=other_side(self.better),
        )


def drawn_in_b(seed: int, id: str) -> bool:
    """Whether a pair's chosen answer is shown in B, where the source fixes no order: by seed and id alone."""
    return bool(hashlib.sha256(f"{seed}/{id}".encode()).digest()[0] & 1)


def render_pair(prompt: Prompt, pair: PreferencePair) -> Messages:
    """The messages that ask for a verdict on `pair`: the single-turn frame where it fits, else the multi-turn one."""
    if pair.single_turn:
        return prompt.render(pair.question, pair.response_a, pair.response_b)
    return prompt.render_conversations(pair.conversation_a, pair.conversation_b)
