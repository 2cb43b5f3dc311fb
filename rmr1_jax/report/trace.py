"""A trace cut at its tags for showing: text -> spans -> the blocks that a page colours, and where its quotes stand.

A judge's text is not trusted and may be anything: nothing here raises on a text, nothing is lost of one, and what
counts as a part is decided by `prompts/trace.py` alone.

Read next: `report.py` and `report_judgements.py`, whose pages show the blocks.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

from rmr1_jax.prompts.trace import PARTS, after_thinking, find_sections

BLOCKS = (*PARTS, "justify")  # parts that stand on lines of their own; a quotation stands in a line


_WORD = re.compile(r"[^\W_]+")


# A judge that quotes several places at once puts dots, or quotation marks and a comma, between them.
_GAP = re.compile(r"\[?(?:\.{3,}|…)\]?|[\"”]\s*(?:and|,|;|/)?\s*[\"“]")


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of a trace: its `text`, whether that is a `tag`, and what it is in.

    `block` is "think", a part such as "eval", or "text" (outside of all); `part` is the block or a quotation in it.
    """

    block: str
    part: str
    text: str
    tag: bool


def split_trace(text: str) -> list[Span]:
    """Cuts a trace at its tags. Any text is accepted, and the spans' texts joined are that text again.

    What counts as a part is `find_sections`' decision, so the colours are those of the parsed trace; what stands before
    the end of the last thought is one `think` block.
    """
    begin = after_thinking(text)
    spans = [
        Span(block="think", part="think", text=piece, tag=piece in ("<think>", "</think>"))
        for piece in re.split("(</?think>)", text[:begin])
    ]
    sections = find_sections(text, begin)  # in order; the tags around one are not part of it
    opens = [section.start - len(f"<{section.name}>") for section in sections]
    ends = [section.end + section.closed * len(f"</{section.name}>") for section in sections]
    tags = {*opens, *(section.end for section in sections if section.closed)}
    places = {begin, len(text), *opens, *ends, *(place for section in sections for place in section[1:3])}
    waiting, around = deque(zip(opens, ends, sections, strict=True)), []
    for place, following in pairwise(sorted(places)):
        while waiting and waiting[0][0] <= place:
            around.append(waiting.popleft())
        around = [entry for entry in around if entry[1] > place]
        names = [section.name for _, _, section in around]
        block = next((name for name in reversed(names) if name in BLOCKS), "text")
        part = names[-1] if names else "text"
        spans.append(Span(block=block, part=part, text=text[place:following], tag=place in tags))
    return [span for span in spans if span.text]


def blocks_of(spans: list[Span]) -> list[dict[str, Any]]:
    """The spans by block, without the white space around its words; a `bare` block holds nothing but tags."""
    blocks = []
    for name, group in groupby(spans, key=lambda span: span.block):
        left = _stripped(list(group), str.lstrip)
        kept = _stripped(left[::-1], str.rstrip)[::-1]
        if kept:
            blocks.append({"name": name, "spans": kept, "bare": all(span.tag for span in kept)})
    return blocks


def _stripped(spans: list[Span], strip: Callable[[str], str]) -> list[Span]:
    """The spans without the white space that `strip` takes off before the first word; tags are left alone."""
    kept, begun = [], False
    for span in spans:
        text = span.text if span.tag or begun else strip(span.text)
        begun = begun or (bool(text) and not span.tag)
        kept += [replace(span, text=text)] if text else []
    return kept


@dataclass(frozen=True)
class Quoted:
    """A text that quotes are looked for in."""

    text: str

    def find(self, quote: str) -> tuple[str, list[tuple[int, int]]]:
        """Where `quote` stands: ("found" | "in part" | "not found", [(start, end)] offsets in characters).

        Judges quote freely with marks, so words count, and neither case nor what stands between them. A quote with dots
        or several quotation marks is looked for piece by piece; "in part" means that a piece is missing.
        """
        whole = self._place(quote)
        if whole:
            return "found", [whole]
        pieces = [piece.strip() for piece in _GAP.split(quote) if _WORD.search(piece)]
        places = [place for piece in pieces if (place := self._place(piece))]
        if not places:
            return "not found", []
        return ("found" if len(places) == len(pieces) else "in part"), sorted(places)

    def _place(self, quote: str) -> tuple[int, int] | None:
        start = self.text.find(quote)
        if start >= 0:
            return start, start + len(quote)
        joined, starts, words = self._words
        wanted = " ".join(_WORD.findall(quote.lower()))
        at = joined.find(wanted) if wanted else -1
        if at < 0:
            return None

        def original(place: int) -> int:
            word = bisect_right(starts, place) - 1
            return min(words[word].start() + place - starts[word], words[word].end())

        return original(at), original(at + len(wanted) - 1) + 1

    @cached_property
    def _words(self) -> tuple[str, list[int], list[re.Match[str]]]:
        """The words in lower case, one space between them; where each starts in that, and in the text."""
        words = list(_WORD.finditer(self.text))
        starts, place = [], 0
        for word in words:
            starts.append(place)
            place += len(word[0].lower()) + 1
        return " ".join(word[0].lower() for word in words), starts, words
