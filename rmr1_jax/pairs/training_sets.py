"""Makes preference pairs of the rows of the public sets that RM-R1 is trained on, and reads rendered training rows.

The sets, each in its published schema (fields -> pair):

    skywork           {chosen, rejected, source}: two lists of messages, of one or several turns.
                      Skywork-Reward-Preference-80K-v0.2; `source` is the row's origin, such as magpie_ultra
    code-preference   {input, accepted, rejected, ...}: a task and two answers, one of them with a bug.
                      Code-Preference-Pairs
    math-step         {prompt, initial_reason_steps, full_chosen, full_rejected, ...}: each answer is the common first
                      steps with one of the two ends. Math-Step-DPO-10K

The answers are shown in an order drawn from (seed, id). A row without an `id` gets its number in the source. A few
fields are kept in `meta`; the rest would double the size of a mixture.

Rendered rows are those of the published RM-R1 sets and of `rmr1 data chains`: {context_messages, winner}. Training
takes them unchanged.

Next: `pairs/read.py`, which opens the files; `data/mix/mixture.py`, which mixes the sets.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.order import Order
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.rows import ReadReport, Row, check_rejects, parse_rows
from rmr1_jax.prompts.prompt import Messages

_SIDES = MappingProxyType({"model_a": "A", "model_b": "B"})

# ---- preference sets ----


def parse_skywork(row: Row, order: Order) -> list[PreferencePair]:
    """Row {chosen, rejected, source} -> one pair."""
    chosen, rejected = (row.conversation(side) for side in ("chosen", "rejected"))
    # Share the messages that both sides have, such as a long question: it halves the memory of a pair.
    rejected = [mine if mine == theirs else theirs for mine, theirs in itertools.zip_longest(chosen, rejected)]
    return [_preference(row, order, chosen, [message for message in rejected if message], ("source",))]


def parse_code_preference(row: Row, order: Order) -> list[PreferencePair]:
    """Row {input, accepted, rejected} -> one pair."""
    question = ("user", row.text("input"))
    chosen, rejected = ([question, ("assistant", row.text(side))] for side in ("accepted", "rejected"))
    return [_preference(row, order, chosen, rejected, ("ID",))]


def parse_math_step(row: Row, order: Order) -> list[PreferencePair]:
    """Row {prompt, initial_reason_steps, full_chosen, full_rejected} -> one pair, its answers joined as published."""
    question, steps = ("user", row.text("prompt")), row.text("initial_reason_steps")
    chosen, rejected = ([question, ("assistant", steps + row.text(f"full_{end}"))] for end in ("chosen", "rejected"))
    return [_preference(row, order, chosen, rejected, ("dataset", "answer"))]


def _preference(
    row: Row, order: Order, chosen: list[tuple[str, str]], rejected: list[tuple[str, str]], kept: Sequence[str]
) -> PreferencePair:
    name = row.name()
    meta = {key: row.value[key] for key in kept if key in row.value}
    return PreferencePair.from_preference(name, chosen, rejected, chosen_in_b=order.by_id(name), meta=meta)


# ---- rendered rows ----


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A rendered prompt and its target: `winner` is "model_a" or "model_b" in RLVR rows, the trace in SFT rows, ""
    in a row made of a pair. `no_right_side`: why a pair cannot be learned from, "ties" or "identical_answers", or "".

    `id` is the row's own or, as in the published rows, the file's name and the row's number from 0 in the source.
    `messages` are dicts of role and content, the input of a chat template. `source` is "" where the row names none;
    `meta` holds its other fields.
    """

    id: str
    messages: Messages
    winner: str
    source: str = ""
    no_right_side: str = ""
    meta: Mapping[str, object] = field(default_factory=dict, hash=False)

    @property
    def better(self) -> str | None:
        """The better side, "A" or "B". In a row with a trace it is the row's field `better`, None where it has none."""
        return _SIDES.get(self.winner) or self.meta.get("better")

    @property
    def trace(self) -> str | None:
        """The trace to learn; None in a row that names a side."""
        return None if self.winner in _SIDES else self.winner


def read_published(
    path: str | Path | Sequence[str | Path], *, rejects: str | Path | None = None, report: ReadReport | None = None
) -> Iterator[PublishedRow]:
    """Read rows {context_messages, winner [, id, source, better]} of JSONL, JSON or Parquet files. Raises InputError,
    which names the place, if they hold other rows.

    Args:
        path: a file or a folder, or several. Rows are numbered from one to the next.
        rejects, report: as in `parse_rows`.
    """
    check_rejects(rejects, path)
    return parse_rows(read_rows(path), parse_published, rejects=rejects, report=report)


def parse_published(row: Row) -> list[PublishedRow]:
    """Row {context_messages, winner [, id, source, better]} -> one rendered row."""
    messages = row.messages("context_messages", ("system", "user", "assistant"), last="user", parts=True)
    winner = row.text("winner")
    if not winner.strip():
        raise row.bad("winner", "is empty, expected 'model_a', 'model_b' or a trace")
    if winner not in _SIDES and re.fullmatch(r"\w+", winner.strip()):  # one word is a misspelt side, not a trace
        raise row.bad("winner", f"is {winner!r}, expected 'model_a', 'model_b' or a trace")
    better = row.side("better")
    if better and _SIDES.get(winner, better) != better:
        raise row.bad("better", f"is {better!r}, but winner is {winner!r}")
    has_id = row.value.get("id") is not None
    published = PublishedRow(
        id=row.identifier("id") if has_id else f"{Path(row.place.file).stem}-{row.place.index}",
        messages=[{"role": role, "content": content} for role, content in messages],
        winner=winner,
        source=row.text("source") if row.value.get("source") is not None else "",
        meta={k: v for k, v in row.value.items() if k not in ("id", "source", "context_messages", "winner")},
    )
    return [published]
