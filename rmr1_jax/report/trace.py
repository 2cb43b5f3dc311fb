"""Prepares a judge's text for display: cuts it into coloured blocks, and finds its quotations in the answers.

A judge's text is not trusted and may be anything: nothing here raises on a text, and no part of a text is lost. What
counts as a part of a trace is decided by `prompts/trace.py` alone.

Read next: `training.py` and `judgements.py`, whose pages show the blocks.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

from rmr1_jax.prompts.thought import after_thinking
from rmr1_jax.prompts.trace import PARTS, find_sections

BLOCKS = (*PARTS, "justify")  # the parts that are shown as blocks; quotations are shown inside a block

_WORD = re.compile(r"[^\W_]+")
# What judges write between the pieces of one quotation: dots, or quotation marks and a comma.
_GAP = re.compile(r"\[?(?:\.{3,}|…)\]?|[\"”]\s*(?:and|,|;|/)?\s*[\"“]")


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of a trace.

    block: "think", one of BLOCKS, or "text" for text outside of all parts. kind: "tag", "quote", "summary", or "" for
    other text. side: "A" or "B" for a quote or a summary, else "".
    """

    text: str
    block: str
    kind: str = ""
    side: str = ""


def split_trace(text: str) -> list[Span]:
    """Cuts a trace at its tags. The texts of the spans, joined, are the trace again.

    The parts are those of `find_sections`, so that the colours agree with the parsed trace. Everything up to the last
    `</think>` is in "think" blocks.
    """
    begin = after_thinking(text)
    spans = [
        Span(text=piece, block="think", kind="tag" if piece in ("<think>", "</think>") else "")
        for piece in re.split("(</?think>)", text[:begin])
    ]
    sections = find_sections(text, begin)  # in order; a section does not include its tags
    opens = [section.start - len(f"<{section.name}>") for section in sections]
    ends = [section.end + section.closed * len(f"</{section.name}>") for section in sections]
    tags = {*opens, *(section.end for section in sections if section.closed)}
    cuts = {begin, len(text), *opens, *ends, *(cut for section in sections for cut in (section.start, section.end))}
    waiting, around = deque(zip(opens, ends, sections, strict=True)), []
    for start, end in pairwise(sorted(cuts)):
        while waiting and waiting[0][0] <= start:
            around.append(waiting.popleft())
        around = [entry for entry in around if entry[1] > start]
        names = [section.name for _, _, section in around]
        block = next((name for name in reversed(names) if name in BLOCKS), "text")
        kind, side = names[-1].split("_") if names and names[-1] not in BLOCKS else ("", "")
        kind, side = ("tag", "") if start in tags else (kind, side)
        spans.append(Span(text=text[start:end], block=block, kind=kind, side=side))
    return [span for span in spans if span.text]


def blocks_of(text: str) -> list[dict[str, Any]]:
    """Returns the blocks of a trace as {"name", "spans", "bare"}; a bare block holds nothing but tags.

    White space around a block's text and around quotations is removed.
    """
    blocks = []
    for name, group in groupby(split_trace(text), key=lambda span: span.block):
        left = _stripped(list(group), str.lstrip)
        spans = _stripped(left[::-1], str.rstrip)[::-1]
        spans = [replace(span, text=span.text.strip()) if span.side else span for span in spans]
        spans = [span for span in spans if span.text]
        if spans:
            blocks.append({"name": name, "spans": spans, "bare": all(span.kind == "tag" for span in spans)})
    return blocks


def _stripped(spans: list[Span], strip: Callable[[str], str]) -> list[Span]:
    """Applies `strip` to the spans up to and including the first one with text in it; tags are left as they are."""
    kept, begun = [], False
    for span in spans:
        tag = span.kind == "tag"
        text = span.text if tag or begun else strip(span.text)
        begun = begun or (bool(text) and not tag)
        kept += [replace(span, text=text)] if text else []
    return kept


@dataclass(frozen=True)
class QuoteFinder:
    """An answer in which quotations are located."""

    text: str

    def find(self, quote: str) -> tuple[str, list[tuple[int, int]]]:
        """Locates a quotation: returns ("found" | "partly found" | "not found", [(start, end)] in characters).

        Only the words are compared, without case and without what stands between them, because judges change the
        punctuation freely. If the whole is not found, its pieces between dots or quotation marks are looked for one by
        one; "partly found" means that some of them are missing.
        """
        whole = self._locate(quote)
        if whole:
            return "found", [whole]
        pieces = [piece.strip() for piece in _GAP.split(quote) if _WORD.search(piece)]
        places = [place for piece in pieces if (place := self._locate(piece))]
        if not places:
            return "not found", []
        return ("found" if len(places) == len(pieces) else "partly found"), sorted(places)

    def _locate(self, quote: str) -> tuple[int, int] | None:
        start = self.text.find(quote)
        if start >= 0:
            return start, start + len(quote)
        joined, starts, words = self._words
        wanted = " ".join(_WORD.findall(quote.lower()))
        at = joined.find(wanted) if wanted else -1
        if at < 0:
            return None

        def original(offset: int) -> int:
            word = bisect_right(starts, offset) - 1
            return min(words[word].start() + offset - starts[word], words[word].end())

        return original(at), original(at + len(wanted) - 1) + 1

    @cached_property
    def _words(self) -> tuple[str, list[int], list[re.Match[str]]]:
        """The words in lower case with one space between them, the offset of each in that string, and the matches."""
        words = list(_WORD.finditer(self.text))
        plain = [word[0].lower() for word in words]
        return " ".join(plain), list(accumulate((len(word) + 1 for word in plain), initial=0)), words
