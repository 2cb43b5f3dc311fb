"""Bytes that a compiled program moves between chips, read from its HLO text.

XLA's own count (`cost_analysis`) takes a loop's body once and knows no links, so the text is walked here: what stands
in a loop counts as often as the loop runs, nested loops multiplied. Called by `plan_compile.py` alone.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|true_computation|false_computation)=(\{.*?\}|%?[\w.\-]+)")
_SEND = re.compile(r"= \((\w+\[[\d,]*\]).* send\(.*_handler_name=\"xla_megascale_runtime\"")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_GROUPS = re.compile(
    r"replica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|mesh\[[^\]]*\](?:, device_ids=\(\S*\))? \{[^}]*\})"
)
_NUMBER = r"%?([\w.\-]+) = [su](?:32|64)\[\][^ ]* constant\((\d+)\)"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one chip sends in one call. links: by kind of collective, within its slice. slices: to other slices,
    over the data centre's network."""

    links: dict[str, float]
    slices: float

    @property
    def total(self) -> float:
        return sum(self.links.values())


def read_traffic(text: str, devices: int, *, slices: int = 1, dynamic_trips: float = 1) -> Traffic:
    """Sum the collectives of a compiled program (`compiled.as_text()`).

    A ring is assumed: of n chips each sends (n-1)/n of an all-gather's output or a reduce-scatter's input, twice that
    for an all-reduce. The program of a run on several slices is that of one of them: what it has for the others it
    hands to its host.

    Args:
        devices: of one slice. dynamic_trips: how often a loop runs whose count is not in the program.

    Raises:
        ValueError: device groups in a notation that is not known here.
    """
    computations, entry = _computations(text)
    walk = _Walk(computations, devices, slices, dynamic_trips)
    sums = walk.total(entry)
    return Traffic(dict(zip(KINDS, map(float, sums), strict=False)), float(sums[-1]))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of every computation by its name, and the entry's name."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            found[header[2]] = lines = []
            entry = header[2] if header[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


class _Walk:
    """One walk over the computations. A sum is an array: a number for each of KINDS, and one for slice to slice."""

    def __init__(self, computations: dict[str, list[str]], devices: int, slices: int, dynamic_trips: float):
        self.computations, self.dynamic_trips = computations, dynamic_trips
        self.devices, self.slices = devices, slices
        self.known: dict[str, tuple[dict[tuple, np.ndarray], np.ndarray]] = {}

    def total(self, name: str) -> np.ndarray:
        once, loops = self.parts(name)
        return sum(once.values(), loops)

    def parts(self, name: str) -> tuple[dict[tuple, np.ndarray], np.ndarray]:
        """What a computation moves outside of its loops, by instruction, and the sum of what its loops move."""
        if name in self.known:
            return self.known[name]
        once: dict[tuple, np.ndarray] = {}
        loops = np.zeros(len(KINDS) + 1)
        for i, line in enumerate(self.computations[name]):
            if found := _COLLECTIVE.search(line):
                channel = re.search(r"channel_id=(\d+)", line)
                once[(i, found[2], channel and channel[1])] = self.moved(line, *found.groups())
            elif found := _SEND.search(line):
                sums = np.zeros(len(KINDS) + 1)
                reduced = '_transfer_type="ALL_REDUCE"' in line
                sums[-1] = _bytes(found[1]) * (2 if reduced else 1) * (1 - 1 / self.slices)
                once[(i, "send", None)] = sums
            elif found := _WHILE.search(line):
                loops = loops + self.trips(line, found[1]) * self.total(found[2])
            else:
                # A transfer that runs beside other work is spread over fusions, each of which names its channel.
                pieces = " fusion(" in line or " async-" in line
                for called in _CALLED.findall(line):
                    for callee in re.findall(r"[\w.\-]+", called):
                        inner, inner_loops = self.parts(callee)
                        once |= {key[-2:] if pieces and key[-1] else (i, *key): sums for key, sums in inner.items()}
                        loops = loops + inner_loops
        self.known[name] = once, loops
        return self.known[name]

    def trips(self, line: str, condition: str) -> float:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if known:
            return int(known[1])
        lines = "\n".join(self.computations[condition])
        constants = dict(re.findall(_NUMBER, lines))
        compared = re.search(r"ROOT .* compare\(([^)]*)\), direction=LT", lines)
        names = re.findall(r"[\w.\-]+", compared[1]) if compared else list(constants)
        limits = [int(constants[n]) for n in names if n in constants]
        return limits[0] if len(limits) == 1 else self.dynamic_trips

    def moved(self, line: str, shape: str, kind: str, start: str | None) -> np.ndarray:
        size, n = _bytes(shape), 0 if kind == "collective-permute" else self.group_size(line)
        if start and kind in ("all-gather", "collective-permute"):  # the type of a start holds operands and results
            size *= n / (n + 1) if kind == "all-gather" else 0.5
        if kind == "reduce-scatter":
            size *= n  # the operand's
        sums = np.zeros(len(KINDS) + 1)
        share = 1 if kind == "collective-permute" else 1 - 1 / n
        sums[KINDS.index(kind)] = (2 if kind == "all-reduce" else 1) * size * share
        return sums

    def group_size(self, line: str) -> int:
        """How many devices exchange with each other, in any of HLO's notations: `{{0,1},{2,3}}`, `[2,4]<=[8]` (2 groups
        of 4), `mesh['a'=2,'b'=4] {'b'}` (along axes of a mesh over the devices), `{}` for all."""
        found = _GROUPS.search(line)
        text = found[1] if found else ""
        if text == "{}":
            return self.devices
        if text.startswith("{"):
            return len(_ints(re.search(r"\d[\d,]*", text)[0]))
        if text.startswith("["):
            return _ints(text[1 : text.index("]")])[-1]
        axes, _, within = text.partition("]")
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
        if not text or re.search(r":\(", within) or math.prod(sizes.values()) != self.devices:
            raise ValueError(f"device groups that are not known here: {line.strip()[:400]}")
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", within))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _bytes(shape: str) -> float:
    """Of an array type or a tuple of them, as HLO writes it. A start's counters are scalars of a few bytes."""
    total = 0.0
    for dtype, dims in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape):
        bits = int(re.search(r"\d+", dtype)[0]) if dtype != "pred" else 8
        total += math.prod(_ints(dims)) * bits / 8 if dims else bits / 8
    return total
