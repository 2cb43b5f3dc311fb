"""The published training rows: a rendered prompt, and the better side (RLVR) or a whole trace (distillation).

Next: `prompts/recover.py`, which recovers the prompt they were rendered with; `data/tokens.py`, which renders them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rmr1_jax.data.containers import read_rows, refuse_as_rejects
from rmr1_jax.data.rows import ReadReport, Row, keep_good
from rmr1_jax.prompts.prompt import Messages

_SIDES = {"model_a": "A", "model_b": "B"}


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A rendered prompt and its target: `winner` is "model_a" or "model_b" in RLVR rows, the trace in SFT rows.

    The rows have no ids of their own: `id` is the file's name and the row's number from 0 in the source. `messages` are
    dicts of role and content, as a chat template takes them.
    """

    id: str
    messages: Messages
    winner: str

    @property
    def better(self) -> str | None:
        """The better side, "A" or "B"; None in a row that holds a trace."""
        return _SIDES.get(self.winner)

    @property
    def trace(self) -> str | None:
        """The trace to learn; None in a row that names a side."""
        return None if self.winner in _SIDES else self.winner


def read_published(
    path: str | Path,
    *,
    on_bad_row: str = "error",
    rejects: str | Path | None = None,
    report: ReadReport | None = None,
) -> Iterator[PublishedRow]:
    """Published rows {context_messages, winner} of a JSONL, JSON or Parquet file, or of a folder of such files.

    The last three arguments are those of `keep_good`. Raises InputError for what is not such rows, with the place.
    """
    refuse_as_rejects(rejects, path)
    return keep_good(read_rows(path), _parse, on_bad_row=on_bad_row, rejects=rejects, report=report)


def _parse(row: Row) -> list[PublishedRow]:
    messages = row.messages("context_messages", ("system", "user", "assistant"), last="user")
    winner = row.text("winner")
    if not winner.strip():
        raise row.bad("winner", "is empty, expected 'model_a', 'model_b' or a trace")
    if winner not in _SIDES and re.fullmatch(r"\w+", winner.strip()):  # one word is a side misspelt, not a trace
        raise row.bad("winner", f"is {winner!r}, expected 'model_a', 'model_b' or a trace")
    return [
        PublishedRow(
            id=f"{Path(row.place.file).stem}-{row.place.index}",
            messages=[{"role": role, "content": content} for role, content in messages],
            winner=winner,
        )
    ]
