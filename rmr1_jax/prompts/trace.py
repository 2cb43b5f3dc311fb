"""Parses a judge's trace: text -> Trace(kind, rubric, justify, solution, evaluation, quotes, verdict).

A policy under training writes anything, so no function here raises on any text, and all run in time linear in its
length: one pass finds the tags, a pass from the end pairs them. Tags inside a quotation or a solution are plain text,
so a judge may quote an answer that imitates its format.

Next: `prompts/verdict.py`, the three rules that turn a text into a verdict or a reward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from rmr1_jax.prompts.thought import after_thinking

PARTS = ("type", "rubric", "solution", "eval", "answer")  # in the order in which a trace has them
HOLDERS = ("rubric", "eval")  # the parts that contain sections; all others contain plain text
QUOTATIONS = ("quote_A", "summary_A", "quote_B", "summary_B")

_TAG = re.compile(rf"<(/?)({'|'.join((*PARTS, 'justify', *QUOTATIONS))})>")
_VERDICT = re.compile(r"\[\[([AB])\]\]")
_ANSWER = re.compile(r"<answer>[^<\[]{0,80}\[\[([AB])\]\]")

# The parts that a trace must have, by the structure that its prompt asks for (`Prompt.structure`). "task" is a solution
# where the kind is reasoning and a rubric where it is chat.
STRUCTURES = MappingProxyType(
    {
        "cor": ("kind", "task", "eval", "answer"),
        "rubric": ("rubric", "eval", "answer"),
        "compare": ("eval", "answer"),
        "verdict": ("answer",),
    }
)


class Section(NamedTuple):
    """The text between a tag and its end, as offsets into the whole text, and the name of the section around it."""

    name: str
    start: int
    end: int
    closed: bool
    inside: str | None


@dataclass(frozen=True, kw_only=True)
class Quote:
    """Evidence from one side: its own words (kind "quote") or a paraphrase ("summary"), and its offsets in the text."""

    side: str
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The parts of a trace, stripped; None for a part that is absent.

    `kind` is "reasoning", "chat" or None; `rubric` is without its `justify`; `evaluation` keeps its quotation tags;
    `verdict` is "A" or "B" as the trace's answer says, or None, also where its answers name both sides. `flaws` lists
    the errors of form: a part that is not closed, repeated, out of order or inside another.
    """

    kind: str | None = None
    rubric: str | None = None
    justify: str | None = None
    solution: str | None = None
    evaluation: str | None = None
    quotes: tuple[Quote, ...] = ()
    verdict: str | None = None
    flaws: tuple[str, ...] = ()

    def is_complete(self, structure: str = "cor") -> bool:
        """Return whether the trace is well formed and has all parts of this structure (`Prompt.structure`)."""
        return not self.flaws and not self.missing(structure)

    def missing(self, structure: str = "cor") -> tuple[str, ...]:
        """Return which parts of the structure are absent or empty."""
        has = {
            "kind": self.kind,
            "task": {"reasoning": self.solution, "chat": self.rubric}.get(self.kind or ""),
            "rubric": self.rubric,
            "eval": self.evaluation,
            "answer": self.verdict,
        }
        return tuple(name for name in STRUCTURES[structure] if not has[name])


def parse_trace(text: str) -> Trace:
    """Parse the trace that follows the last `</think>` in `text`. Never raises on a str; linear in its length."""
    begin = after_thinking(text)
    sections = find_sections(text, begin)
    first: dict[str, Section] = {}
    # A part at the top level takes precedence over one inside another, which may only be mentioned there.
    for section in sorted(sections, key=lambda section: section.inside is not None):
        first.setdefault(section.name, section)

    def content(name: str) -> str | None:
        return text[first[name].start : first[name].end].strip() if name in first else None

    kind = (content("type") or "").lower()
    return Trace(
        kind=kind if kind in ("reasoning", "chat") else None,
        rubric=_without(text, first.get("rubric"), first.get("justify")),
        justify=content("justify"),
        solution=content("solution"),
        evaluation=content("eval"),
        quotes=tuple(_quote(text, section) for section in sections if section.name in QUOTATIONS),
        verdict=_verdict(text, begin, sections),
        flaws=_flaws(sections, first),
    )


def find_sections(text: str, begin: int = 0) -> list[Section]:
    """Return all tagged sections from offset `begin` on, in order.

    A section ends at its own closing tag; without one it ends at the opening tag of the next part (a quotation or
    justify: at the next tag of any kind). Stray closing tags are ignored.
    """
    tags = _visible(list(_TAG.finditer(text, begin)))
    sections: list[Section] = []
    outer: Section | None = None
    for tag, (end, closing) in zip(tags, _pair(tags, len(text)), strict=True):
        if tag[1]:
            continue
        inside = outer.name if outer is not None and tag.start() < outer.end else None
        section = Section(tag[2], tag.end(), end, closing is not None, inside)
        sections.append(section)
        if tag[2] in HOLDERS and inside is None:
            outer = section
    return sections


def _visible(tags: list[re.Match[str]]) -> list[re.Match[str]]:
    """Return the tags that are not inside a closed section of plain text, such as a quotation."""
    ends, visible, index = _pair(tags, 0), [], 0
    while index < len(tags):
        tag, (_, closing) = tags[index], ends[index]
        visible.append(tag)
        index = index + 1 if closing is None or tag[2] in HOLDERS else closing
    return visible


def _pair(tags: list[re.Match[str]], length: int) -> list[tuple[int, int | None]]:
    """Return for every opening tag the offset at which its section ends, and the index of its closing tag or None."""
    ends: list[tuple[int, int | None]] = [(length, None)] * len(tags)
    closing: dict[str, int] = {}  # name -> the nearest closing tag to the right that is not paired yet
    next_part = next_tag = length
    for index in range(len(tags) - 1, -1, -1):
        tag, name = tags[index], tags[index][2]
        if tag[1]:
            closing[name] = index
        else:
            paired = closing.pop(name, None)
            if paired is not None:
                ends[index] = (tags[paired].start(), paired)
            else:
                ends[index] = (next_part if name in PARTS else next_tag, None)
            if name in PARTS:
                next_part = tag.start()
        next_tag = tag.start()
    return ends


def _without(text: str, section: Section | None, cut: Section | None) -> str | None:
    """Return the section's text without the `<justify>...</justify>` inside it."""
    if section is None:
        return None
    if cut is None or not section.start <= cut.start <= cut.end <= section.end:
        return text[section.start : section.end].strip()
    before = text[section.start : cut.start - len("<justify>")]
    after = text[cut.end + (len("</justify>") if cut.closed else 0) : section.end]
    return f"{before.rstrip()}\n{after.lstrip()}".strip()


def _quote(text: str, section: Section) -> Quote:
    raw = text[section.start : section.end]
    start = section.start + len(raw) - len(raw.lstrip())
    kind, side = section.name.split("_")
    return Quote(side=side, kind=kind, text=raw.strip(), start=start, end=start + len(raw.strip()))


def _verdict(text: str, begin: int, sections: list[Section]) -> str | None:
    answers = [section for section in sections if section.name == "answer" and section.inside is None]
    named: set[str] = set()
    for answer in answers:
        named.update(_VERDICT.findall(text, answer.start, answer.end))
    if answers and not _VERDICT.search(text, answers[-1].start, answers[-1].end):
        return None  # an earlier answer does not stand for one that cannot be read
    if not answers:  # an answer inside another part counts where there is none at the top level
        named.update(_ANSWER.findall(text, begin))
    return named.pop() if len(named) == 1 else None


def _flaws(sections: list[Section], first: dict[str, Section]) -> tuple[str, ...]:
    flaws = []
    present = [name for name in PARTS if name in first]
    for name in (*present, *(["justify"] if "justify" in first else [])):
        same = [section for section in sections if section.name == name and section.inside == first[name].inside]
        if len(same) > 1:
            flaws.append(f"<{name}> occurs {len(same)} times")
        if not first[name].closed:
            flaws.append(f"<{name}> is not closed")
        if name in PARTS and first[name].inside is not None:
            flaws.append(f"<{name}> is inside <{first[name].inside}>")
    for name, following in pairwise(present):
        if first[name].start > first[following].start:
            flaws.append(f"<{following}> is before <{name}>")
    return tuple(flaws)
