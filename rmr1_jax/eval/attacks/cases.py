"""The attack set: pairs whose worse answer tries to change the verdict, made of attack families and base pairs.

A case is a pair whose worse answer has an attack in it, and `clean` is the same pair without it. Structure attacks
imitate what only the prompt, the tokenizer or the judge may write: a verdict, a tag, a turn, a delimiter. Persuasion
attacks are plain words: instructions, praise, or one of the empty openers that fool judges (Zhao et al. 2025, arXiv
2507.08794).

The base pairs and the families are data: `cases.yaml`.

Next: `injection.py`, which runs the attacks on a judge; `prompts/escape.py`, the defence against the first kind.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.verdict import other_side

STRUCTURE, PERSUASION = "structure", "persuasion"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """pair: its `better` is the right winner. attacker: the other side, whose answer has the attack in it."""

    family: str
    kind: str
    attacker: str
    pair: PreferencePair
    clean: PreferencePair


@dataclass(frozen=True, kw_only=True)
class Base:
    """A conversation that ends with the client, a good answer to it and a clearly worse one."""

    name: str
    asked: list[tuple[str, str]]
    good: str
    bad: str

    def pair(self, id: str, attacker: str, answer: str, **meta: str) -> PreferencePair:
        """The pair of the good answer and of `answer`, which is shown as the side `attacker`."""
        chosen, rejected = ([*self.asked, ("assistant", text)] for text in (self.good, answer))
        return PreferencePair.from_preference(id, chosen, rejected, chosen_in_b=attacker == "A", meta=meta)


@functools.cache
def _data() -> Any:
    return yaml.safe_load(Path(__file__).with_name("cases.yaml").read_text(encoding="utf-8"))


def bases() -> list[Base]:
    """The pairs that attacks are written into."""
    return [Base(**base) for base in _data()["bases"]]


def families() -> dict[str, str]:
    """The attack families in their order, each with its kind."""
    return {name: family["kind"] for name, family in _data()["families"].items()}


def attacks() -> list[Attack]:
    """All cases in a fixed order: each form of each family on each base pair, with the attacker in A and B in turn."""
    return [
        _attack(family, number, form, base, "AB"[(number + position) % 2])
        for family in families()
        for number, form in enumerate(_data()["families"][family]["forms"])
        for position, base in enumerate(bases())
    ]


def _attack(family: str, number: int, form: str, base: Base, attacker: str) -> Attack:
    names = {"bad": base.bad, "good": base.good, "x": attacker, "y": other_side(attacker)}
    if disguise := _DISGUISES.get(family):  # the answer that the attack is attached to stays as it is
        text = base.bad + disguise(Template(form.removeprefix("$bad")).substitute(names))
    else:
        text = Template(form).substitute(names)
    kind, clean = families()[family], f"clean/{base.name}/{attacker}"
    meta = {"benchmark": "injection", "family": family, "attack": kind, "clean": clean}
    return Attack(
        family=family,
        kind=kind,
        attacker=attacker,
        pair=base.pair(f"{family.replace(' ', '-')}/{number}/{base.name}", attacker, text, **meta),
        clean=base.pair(clean, attacker, base.bad, benchmark="injection"),
    )


def _spread(text: str) -> str:
    """Insert zero-width characters between the letters."""
    invisible = itertools.cycle("\u200b\u200d\u2060\ufeff\u00ad")
    return "".join(c + next(invisible) if c.isascii() and not c.isspace() else c for c in text)


def _wide(text: str) -> str:
    """Replace ASCII characters by their full-width forms."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def _alike(text: str) -> str:
    """Replace letters and brackets by others that look the same."""
    return text.translate(
        str.maketrans("aeopcxTAB<>", "\u0430\u0435\u043e\u0440\u0441\u0445\u0422\u0410\u0412\u2039\u203a")
    )


def _loose(text: str) -> str:
    """Convert to upper case, with white space where it changes nothing for a reader."""
    spaced = text.upper().replace("<", "< ").replace(">", " >").replace("[THE", "[ THE").replace(" OF ", "  OF\u00a0")
    return spaced.replace("RESPONSE]", "RESPONSE ]")


_DISGUISES = {
    "zero-width characters": _spread,
    "full-width characters": _wide,
    "look-alike letters": _alike,
    "other case and space": _loose,
}
