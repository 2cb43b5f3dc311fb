"""The training rows, in the published format: a rendered prompt, and the better side (RLVR) or a whole trace
(distillation). `rmr1 data chains` writes such rows too, with `id`, `source` and more beside them.

Next: `prompts/recover.py`, which recovers the prompt they were rendered with; `data/store.py`, which makes examples of
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rmr1_jax.data.containers import read_rows, refuse_as_rejects
from rmr1_jax.data.rows import BadRow, ReadReport, Row, keep_good
from rmr1_jax.prompts.prompt import Messages

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
