"""Counts the bytes that a compiled program sends between chips, from its HLO text.

XLA's own count (`cost_analysis`) takes the body of a loop once and leaves out collectives. Here a loop's collectives
count as often as the loop runs; the counts of nested loops are multiplied.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(")
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
    """The bytes that one chip sends in one call. links: within its slice, by collective. network: to other slices, over
    the data center's network."""

    links: dict[str, float]
    network: float

    @property
    def total(self) -> float:
        """The bytes over the links, of all collectives."""
        return sum(self.links.values())


def read_traffic(text: str, devices: int, *, slices: int = 1, dynamic_trips: float = 1) -> Traffic:
    """Sum the collectives in the text of a compiled program (`compiled.as_text()`) of `devices` chips per slice. A loop
    whose count is not in the text runs `dynamic_trips` times.

    Collectives are assumed to run on rings: of n chips, each sends (n-1)/n of the output of an all-gather or of the
    input of a reduce-scatter, and twice that for an all-reduce. On several slices the text is the program of one slice,
    which hands the data for other slices to its hosts. Raises ValueError if groups of devices are written in an unknown
    notation.
    """
    computations, entry = _computations(text)
    total = _Walk(computations, devices, slices, dynamic_trips).total(entry)
    return Traffic({kind: float(total[kind]) for kind in COLLECTIVES}, float(total["network"]))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Split the text into the instructions of each computation, by name; also return the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line.startswith(" "):
            lines.append(line)
        elif header := _HEADER.match(line):
            found[header[2]] = lines = []
            entry = header[2] if header[1] else entry
    return found, entry


class _Walk:
    """A walk over the computations of a program, which sums their bytes by collective, or "network"."""

    def __init__(self, computations: dict[str, list[str]], devices: int, slices: int, dynamic_trips: float):
        self.computations, self.dynamic_trips = computations, dynamic_trips
        self.devices, self.slices = devices, slices
        self.known: dict[str, dict[tuple, float]] = {}

    def total(self, name: str) -> Counter:
        total: Counter = Counter()
        for key, size in self.transfers(name).items():
            total[key[-2]] += size
        return total

    def transfers(self, name: str) -> dict[tuple, float]:
        """Return the bytes of each transfer of a computation, by (where it is, kind, channel); a loop's are summed."""
        if name in self.known:
            return self.known[name]
        sizes: dict[tuple, float] = {}
        for i, line in enumerate(self.computations[name]):
            if found := _COLLECTIVE.search(line):
                channel = re.search(r"channel_id=(\d+)", line)
                sizes[i, found[2], channel and channel[1]] = self.sent(line, *found.groups())
            elif found := _SEND.search(line):
                passes = 2 if '_transfer_type="ALL_REDUCE"' in line else 1
                sizes[i, "network", None] = _bytes(found[1]) * passes * (1 - 1 / self.slices)
            elif found := _WHILE.search(line):
                trips = self.trips(line, found[1])
                sizes |= {(i, kind, None): trips * size for kind, size in self.total(found[2]).items()}
            else:
                # A transfer that overlaps other work is split over several fusions, all with the same channel.
                is_piece = " fusion(" in line or " async-" in line
                for callee in re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(line))):
                    for key, size in self.transfers(callee).items():
                        sizes[key[-2:] if is_piece and key[-1] else (i, callee, *key)] = size
        self.known[name] = sizes
        return sizes

    def trips(self, line: str, condition: str) -> float:
        """Return how often a loop runs, from the compiler's note or the constant in its condition."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
            return int(known[1])
        lines = "\n".join(self.computations[condition])
        constants = dict(re.findall(_NUMBER, lines))
        compared = re.search(r"ROOT .* compare\(([^)]*)\), direction=LT", lines)
        names = re.findall(r"[\w.\-]+", compared[1]) if compared else list(constants)
        limits = [int(constants[n]) for n in names if n in constants]
        return limits[0] if len(limits) == 1 else self.dynamic_trips

    def sent(self, line: str, shape: str, kind: str, start: str | None) -> float:
        """Return the bytes that one chip sends in a collective."""
        size = _bytes(shape)
        if kind == "collective-permute":
            return size / 2 if start else size  # the type of a start holds operands and results
        n = self.group_size(line)
        if kind == "all-gather" and start:
            size *= n / (n + 1)
        if kind == "reduce-scatter":
            size *= n  # from the output's size to the input's
        return (2 if kind == "all-reduce" else 1) * size * (1 - 1 / n)

    def group_size(self, line: str) -> int:
        """Return how many devices exchange with each other, from any of HLO's notations: `{{0,1},{2,3}}`, `[2,4]<=[8]`
        (2 groups of 4), `mesh['a'=2,'b'=4] {'b'}` (along axes of a mesh over the devices), `{}` for all."""
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
            raise ValueError(f"device groups in an unknown notation: {line.strip()[:400]}")
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", within))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _bytes(shape: str) -> float:
    """Return the size of an array type or a tuple of them in HLO text; the counters of a start are a few bytes."""
    arrays = re.findall(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    return sum(int(bits or 8) / 8 * (math.prod(_ints(dims)) if dims else 1) for bits, dims in arrays)
