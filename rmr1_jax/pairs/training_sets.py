"""The rows of the public preference sets that RM-R1 is trained on, each in its real schema, as preference pairs.

    skywork           {chosen, rejected, source}: two lists of messages, of one or several turns
                      Skywork-Reward-Preference-80K-v0.2; `source` is where a row comes from, such as magpie_ultra
    code-preference   {input, accepted, rejected, ...}: a task and two answers, one of them with a bug
                      Code-Preference-Pairs
    math-step         {prompt, initial_reason_steps, full_chosen, full_rejected, ...}: the answers are the common first
                      steps with either of the full ends. Math-Step-DPO-10K
    published         {context_messages, winner}: the RM-R1 sets, rendered already. Training takes them as they are;
                      here their pairs are taken out of the text again, to be mixed and rendered anew

Only the last has the better side fixed; the others are shown in an order drawn from (seed, id). Rows without an id of
their own get their number in the source. A few fields are kept in `meta`; the rest would double the size of a mixture.

Next: `data/preferences.py`, which opens the files; `data/mixture.py`, which mixes them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from rmr1_jax.pairs.pair import ROLES, Message, PreferencePair, drawn_in_b
from rmr1_jax.pairs.rows import BadRow, ReadReport, Row, keep_good, read_rows, refuse_as_rejects
from rmr1_jax.prompts.prompt import Messages, Prompt, split_frame
from rmr1_jax.prompts.verdict import strict_verdict

_SIDES = {"model_a": "A", "model_b": "B"}


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A rendered prompt and its target: `winner` is "model_a" or "model_b" in RLVR rows, the trace in SFT rows.

    A row without an id of its own (the published ones) has the file's name and its number from 0 in the source.
    `messages` are dicts of role and content, as a chat template takes them. `source` is "" where the row names none;
    `meta` holds its other fields.
    """

    id: str
    messages: Messages
    winner: str
    source: str = ""
    meta: Mapping[str, object] = field(default_factory=dict, hash=False)

    @property
    def better(self) -> str | None:
        """The better side, "A" or "B"; in a row that holds a trace: its field `better`, None where it has none."""
        return _SIDES.get(self.winner) or self.meta.get("better")

    @property
    def trace(self) -> str | None:
        """The trace to learn; None in a row that names a side."""
        return None if self.winner in _SIDES else self.winner


def read_published(
    path: str | Path | Sequence[str | Path],
    *,
    on_bad_row: str = "error",
    rejects: str | Path | None = None,
    report: ReadReport | None = None,
) -> Iterator[PublishedRow]:
    """Rows {context_messages, winner} of JSONL, JSON or Parquet files: of a path or several, each a file or a folder.

    Optional in a row: id (a second row with the same is a bad one), source, better. The last three arguments are those
    of `keep_good`. Raises InputError for what is not such rows, with the place.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    for each in paths:
        refuse_as_rejects(rejects, each)
    return keep_good(_numbered(paths), _parser(), on_bad_row=on_bad_row, rejects=rejects, report=report)


def _numbered(paths: Sequence[str | Path]) -> Iterator[Row | BadRow]:
    """The rows of all paths, numbered on from one to the next: ids are made of the numbers."""
    start = 0
    for path in paths:
        end = start
        for row in read_rows(path):
            end = start + row.place.index + 1
            yield replace(row, place=replace(row.place, index=end - 1)) if start and isinstance(row, Row) else row
        start = end


def _parser() -> Callable[[Row], list[PublishedRow]]:
    seen: set[str] = set()

    def parse(row: Row) -> list[PublishedRow]:
        messages = row.messages("context_messages", ("system", "user", "assistant"), last="user")
        winner = row.text("winner")
        if not winner.strip():
            raise row.bad("winner", "is empty, expected 'model_a', 'model_b' or a trace")
        if winner not in _SIDES and re.fullmatch(r"\w+", winner.strip()):  # one word is a side misspelt, not a trace
            raise row.bad("winner", f"is {winner!r}, expected 'model_a', 'model_b' or a trace")
        better = row.value.get("better")
        if better not in ("A", "B", None):
            raise row.bad("better", f"is {better!r}, expected 'A', 'B' or null")
        if better and _SIDES.get(winner, better) != better:
            raise row.bad("better", f"is {better!r}, but winner is {winner!r}")
        has_id = row.value.get("id") is not None
        name = row.identifier("id") if has_id else f"{Path(row.place.file).stem}-{row.place.index}"
        if name in seen:
            raise row.bad("id", f"is {name!r} a second time; an earlier row has it too")
        seen.add(name)
        return [
            PublishedRow(
                id=name,
                messages=[{"role": role, "content": content} for role, content in messages],
                winner=winner,
                source=row.text("source") if row.value.get("source") is not None else "",
                meta={k: v for k, v in row.value.items() if k not in ("id", "source", "context_messages", "winner")},
            )
        ]

    return parse


Parser = Callable[[Row], list[PreferencePair]]


Conversation = list[tuple[str, str]]

# The released multi-turn rows spell "Chabot B" wherever the better conversation is shown in A.
_SPEAKER = re.compile(r"(?:^|\n)(User|Chatbot A|Chatbot B|Chabot B): ")


def skywork_parser(seed: int) -> Parser:
    """Row {chosen, rejected, source} -> one pair."""

    def parse(row: Row) -> list[PreferencePair]:
        chosen, rejected = (row.messages(side, ROLES, last="assistant") for side in ("chosen", "rejected"))
        # The same question stands on both sides: held once.
        rejected = [mine if mine == theirs else theirs for mine, theirs in itertools.zip_longest(chosen, rejected)]
        return [_preference(row, seed, chosen, [turn for turn in rejected if turn], ("source",))]

    return parse


def code_preference_parser(seed: int) -> Parser:
    """Row {input, accepted, rejected} -> one pair."""

    def parse(row: Row) -> list[PreferencePair]:
        question = ("user", row.text("input"))
        chosen, rejected = ([question, ("assistant", row.text(side))] for side in ("accepted", "rejected"))
        return [_preference(row, seed, chosen, rejected, ("ID",))]

    return parse


def math_step_parser(seed: int) -> Parser:
    """Row {prompt, initial_reason_steps, full_chosen, full_rejected} -> one pair, its answers joined as published."""

    def parse(row: Row) -> list[PreferencePair]:
        question, steps = ("user", row.text("prompt")), row.text("initial_reason_steps")
        chosen, rejected = (
            [question, ("assistant", steps + row.text(f"full_{end}"))] for end in ("chosen", "rejected")
        )
        return [_preference(row, seed, chosen, rejected, ("dataset", "answer"))]

    return parse


def published_parser(prompt: Prompt) -> Parser:
    """Row {context_messages, winner} that `prompt` rendered -> one pair, in the order it was shown in.

    The better side is the winner, or what a trace ends with. Rendering the pair with `prompt` gives the row's text
    again, but for the misspelt speaker of the released multi-turn rows.
    """

    parse_published = _parser()

    def parse(row: Row) -> list[PreferencePair]:
        (published,) = parse_published(row)
        better = published.better or strict_verdict(published.winner)
        if better is None:
            raise row.bad("winner", "names no side and is no trace that ends with a verdict")
        text = published.messages[-1]["content"]
        single, several = split_frame(prompt.single_turn, text), split_frame(prompt.multi_turn, text)
        if single is not None:
            sides = [[("user", single[0]), ("assistant", answer)] for answer in single[1:]]
        elif several is not None:
            sides = [_turns(row, side, conversation) for side, conversation in zip("AB", several, strict=True)]
        else:
            raise row.bad("context_messages", "is not in the frame of the source's other rows")
        a, b = (tuple(Message(*turn) for turn in side) for side in sides)
        meta = {"source": published.source} if published.source else {}
        return [PreferencePair(id=published.id, conversation_a=a, conversation_b=b, better=better, meta=meta)]

    return parse


# The formats whose rows say which answer is chosen, and the fields they are told by.
CHOSEN_PARSERS: Mapping[str, Callable[[int], Parser]] = MappingProxyType(
    {"skywork": skywork_parser, "code-preference": code_preference_parser, "math-step": math_step_parser}
)


TOLD_BY: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "code-preference": frozenset({"input", "accepted", "rejected"}),
        "math-step": frozenset({"prompt", "initial_reason_steps", "full_chosen", "full_rejected"}),
        "skywork": frozenset({"chosen", "rejected", "source"}),
    }
)


def _preference(
    row: Row, seed: int, chosen: Conversation, rejected: Conversation, kept: Sequence[str]
) -> PreferencePair:
    name = _id(row)
    in_b = drawn_in_b(seed, name)
    return PreferencePair.from_preference(name, chosen, rejected, chosen_in_b=in_b, meta=_meta(row, kept))


def _id(row: Row) -> str:
    return row.identifier("id") if "id" in row.value else str(row.place.index)


def _meta(row: Row, kept: Sequence[str]) -> dict[str, object]:
    return {name: row.value[name] for name in kept if name in row.value}


def _turns(row: Row, side: str, text: str) -> Conversation:
    """The messages of a conversation written as lines `User: ...` and `Chatbot A: ...`."""
    before, *rest = _SPEAKER.split(text)
    speakers = ["user" if speaker == "User" else "assistant" for speaker in rest[::2]]
    turns = list(zip(speakers, rest[1::2], strict=True))
    if before or not turns or turns[-1][0] != "assistant":
        raise row.bad("context_messages", f"conversation {side} is no list of turns 'User: ...', 'Chatbot {side}: ...'")
    return turns
