"""Recovers the exact text of a published prompt from rows that were rendered with it.

A published checkpoint was trained on one exact system text, or on one exact text around the delimited answers. The rows
of the published data sets hold that text, so the project needs no copy of it: the system message is used unchanged, and
the texts before, between and after the delimited parts are those on which all rows agree.

Next: `prompts/prompt.py`, whose `save_prompt` writes the result to a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.prompt import CONVERSATIONS, QUESTION, RESPONSES, Prompt, published_frames, split_frame

Numbered = list[tuple[int, str]]  # (row number, user text)


def recover_prompt(rows: Iterable[Sequence[Mapping[str, str]] | Mapping], name: str = "recovered") -> Prompt:
    """Return the prompt that all `rows` were rendered with.

    Every row is checked: the recovered frame around the row's own parts must give the row's text, character by
    character. Where all rows are single-turn, or all are multi-turn, the frame of the other kind is the published
    delimiters between the same texts, and `note` says so. One row is enough; with several, delimiters inside an answer
    cannot mislead.

    Args:
        rows: the messages of each row, [system and] user; or published rows as dicts with `context_messages`.
        name: the name of the prompt.

    Raises:
        InputError: there are no rows, messages have another form, delimiters are absent, or rows disagree. The message
            names the row by its number from 1.
    """
    single: Numbered = []
    multi: Numbered = []
    system = None
    for number, row in enumerate(rows, 1):
        row_system, user = _system_and_user(row, number)
        if number == 1:
            system = row_system
        elif row_system != system:
            raise InputError(f"row {number}: its system text differs from row 1's {_difference(row_system, system)}")
        (multi if _is_multi_turn(user, number) else single).append((number, user))
    if not single and not multi:
        raise InputError("there are no rows to recover a prompt from; give rows of a published data set")
    found = []
    if single:
        found.append(_recover_texts(single, QUESTION, RESPONSES))
    if multi:
        found.append(_recover_texts(multi, CONVERSATIONS[0], CONVERSATIONS))
    single_turn, multi_turn = published_frames(*found[0])[0], published_frames(*found[-1])[1]
    note = f"recovered from {len(single)} single-turn and {len(multi)} multi-turn rows"
    if len(found) == 1:
        absent = "multi" if single else "single"
        note += f"; no {absent}-turn row was seen: that frame is the published delimiters between the same texts"
    for texts, frame in ((single, single_turn), (multi, multi_turn)):
        for number, user in texts:
            if split_frame(frame, user) is None:
                raise InputError(f"row {number}: its user turn does not fit the frame of the other rows, {frame!r}")
    return Prompt(name=name, system=system, single_turn=single_turn, multi_turn=multi_turn, note=note)


def _system_and_user(row: Sequence[Mapping[str, str]] | Mapping, number: int) -> tuple[str | None, str]:
    messages = row.get("context_messages") if isinstance(row, Mapping) else row
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"row {number}: expected a list of messages, or a row with 'context_messages'")
    roles = tuple(message.get("role") for message in messages)
    if roles not in (("user",), ("system", "user")):
        raise InputError(f"row {number}: the roles are {roles}, expected ('user',) or ('system', 'user')")
    contents = [text for message in messages if isinstance(text := message.get("content"), str)]
    if len(contents) < len(messages):
        raise InputError(f"row {number}: every message needs a 'content' that is a text")
    return (contents[0] if len(contents) == 2 else None), contents[-1]


def _is_multi_turn(user: str, number: int) -> bool:
    # The frame's own delimiter comes first; the other kind can only occur in a text of the client or of a chatbot.
    question, conversation = user.find(QUESTION), user.find(CONVERSATIONS[0])
    if question < 0 and conversation < 0:
        raise InputError(f"row {number}: the user turn holds neither {QUESTION!r} nor {CONVERSATIONS[0]!r}")
    return question < 0 or 0 <= conversation < question


def _recover_texts(rows: Numbered, opening: str, delimiters: Sequence[str]) -> tuple[str, str, str]:
    """Return the texts before the opening delimiter, between A's end and B's start, and after B's end.

    The candidates come from the shortest row, which holds the fewest delimiters by chance. Of those that every row has,
    the shortest is the frame's.
    """
    _, end_a, start_b, end_b = delimiters
    for number, text in rows:
        missing = [delimiter for delimiter in (opening, *delimiters) if delimiter not in text]
        if missing:
            raise InputError(f"row {number}: the delimiter {missing[0]!r} is absent")
    _, shortest = min(rows, key=lambda row: len(row[1]))
    before = [shortest[:start] for start in _occurrences(shortest, opening)]
    after = [shortest[start + len(end_b) :] for start in _occurrences(shortest, end_b)]
    ends = [(start + len(end_a), shortest.find(start_b, start)) for start in _occurrences(shortest, end_a)]
    between = [shortest[start:end] for start, end in ends if end >= 0]
    return (
        _common(before, rows, "before the delimiters", lambda text, own: text.startswith(own + opening)),
        _common(between, rows, "between the answers", lambda text, own: end_a + own + start_b in text),
        _common(after, rows, "after the delimiters", lambda text, own: text.endswith(end_b + own)),
    )


def _common(candidates: list[str], rows: Numbered, where: str, has: Callable[[str, str], bool]) -> str:
    """Return the shortest candidate that every row has, where has(text of the row, candidate)."""
    candidates = sorted(set(candidates), key=len)
    for number, text in rows:
        left = [candidate for candidate in candidates if has(text, candidate)]
        if not left:
            raise InputError(f"row {number}: its text {where} differs from the other rows' {candidates[:1]!r}")
        candidates = left
    return candidates[0]


def _occurrences(text: str, delimiter: str) -> list[int]:
    return [match.start() for match in re.finditer(f"(?={re.escape(delimiter)})", text)]  # overlapping ones too


def _difference(one: str | None, other: str | None) -> str:
    if one is None or other is None:
        return "(one of them has none)"
    at = next((k for k, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
    return f"from character {at + 1} on: {one[at : at + 40]!r}, not {other[at : at + 40]!r}"
