"""`rmr1 data mix`: combine preference sets into the pairs to train on.

Rows are dropped and counted for the reasons in `sources.DROPPED`, in this order: read = kept + held out + these counts.
The other pairs are sorted by a hash of seed and id, and show the better answer in A, in B, in A, and so on. The same
config and sources give the same bytes.

OUT/pairs.jsonl has the project's own format (`pairs/read.py`); a pair's `id` is `SOURCE NAME/ID IN THE SOURCE`, and
`origin` is the field `source` of its row. OUT/held_out.jsonl holds the pairs to evaluate on, if some are held out.
OUT/mixture.json holds the counts and is written last.

Next: `sources.py`, which reads a source; `overlap.py`; `chains/chains.py`, which asks a teacher about the pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt
from tqdm import tqdm

from rmr1_jax.config import config_dataclass, config_differences
from rmr1_jax.data.mix.overlap import Benchmark, OverlapConfig, hash_ngrams, question_words
from rmr1_jax.data.mix.sources import DROPPED, SourceConfig, SourceReport, read_source
from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import locate
from rmr1_jax.files.write import hash_written, to_json, write_whole, writing
from rmr1_jax.pairs.pair import Message, PreferencePair
from rmr1_jax.pairs.read import read_pairs

EXAMPLES = 5  # overlaps that are shown for each source and benchmark
HELD_OUT = "held_out"  # the name of the part to evaluate on, among those of benchmarks

Entry = tuple[PreferencePair, SourceReport]  # a pair, and the report of its source


@config_dataclass
class MixtureConfig:
    """The settings of `rmr1 data mix`."""

    sources: tuple[SourceConfig, ...]
    """Data sets to combine."""
    out: str
    """Directory to write."""
    seed: NonNegativeInt = 0
    """Seed of the order."""
    on_bad_row: Literal["error", "quarantine"] = "error"
    """If a row cannot be read: an error, or move it to OUT/rejects-NAME.jsonl."""
    overlap: OverlapConfig = OverlapConfig()
    """Search for rows that overlap with evaluation sets."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the questions, about, whose pairs are written to OUT/held_out.jsonl, to evaluate on. A question is in
    the same part whatever the seed and the other rows, with all its pairs."""

    def __post_init__(self):
        if not self.sources:
            raise InputError("sources is empty; a mixture needs at least one")
        twice = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if twice:
            raise InputError(f"sources: two are named {', '.join(twice)}; give each a `name` of its own")


@dataclasses.dataclass(kw_only=True)
class MixReport:
    """The content of mixture.json. config: the settings without `out`. pairs: those of pairs.jsonl. a: pairs of it that
    show the better answer in A. sha256: of pairs.jsonl. held_out: the pairs of held_out.jsonl. examples: of overlaps,
    {source, id, benchmark, kind, benchmark_id, words}."""

    config: dict[str, Any]
    pairs: int
    a: int
    sha256: str
    held_out: int
    sources: list[SourceReport]
    examples: list[dict[str, str]]

    def table(self) -> str:
        """Format the counts by source as text."""
        columns = [
            "read",
            "kept",
            *(name for name in (HELD_OUT, *DROPPED) if any(getattr(each, name) for each in self.sources)),
        ]
        rows = [["source", *(reason.replace("_", " ") for reason in columns), "better in A"]]
        for name, sources in [(each.name, [each]) for each in self.sources] + [("all", self.sources)]:
            a, kept, *counts = (sum(getattr(each, column) for each in sources) for column in ("a", "kept", *columns))
            rows.append([name, *(f"{count:,}" for count in counts), f"{a / kept:.1%}" if kept else "-"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        for each in self.sources:
            for name, kinds in each.overlaps.items():
                if any(kinds.values()):
                    lines.append(f"{each.name}: overlaps with {name}: {kinds['exact']} exact, {kinds['near']} near")
            lines += [f"{each.name}: {note}" for note in each.notes]
        return "\n".join(lines)


def mix(config: MixtureConfig) -> MixReport:
    """Make a mixture and write it into `config.out`; see the module's docstring.

    Raises:
        InputError: a source cannot be read or is a benchmark; a bad row, if bad rows are errors; a filter on a field
            that no row has; `out` holds a mixture of another config; no pair is left, or none in one of two parts.
        RunError: the files cannot be written. pairs.jsonl is then either the older mixture's or the new one, whole.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # as it will be read from mixture.json
    del settings["out"]
    if not config.held_out:
        del settings["held_out"]  # mixtures of earlier versions have none
    out = _make_output(Path(config.out), settings)
    paths = [locate(source.path, source.revision) for source in config.sources]  # report all that is missing first
    ngram = config.overlap.ngram
    benchmarks = [Benchmark(name, read_pairs(locate(name)), ngram) for name in config.overlap.benchmarks]
    reports: list[SourceReport] = []
    entries: list[Entry] = []
    with tqdm(desc="mix", unit="row", dynamic_ncols=True) as bar:
        for source, path in zip(config.sources, paths, strict=True):
            rejects = out / f"rejects-{source.name}.jsonl" if config.on_bad_row == "quarantine" else None
            pairs, report = read_source(source, path, rejects=rejects, bar=bar)
            entries += [(pair, report) for pair in pairs]
            reports.append(report)
    entries = _drop(_repeated(entries), entries)
    held_out, entries = _hold_out(entries, config.held_out)
    if held_out:
        benchmarks.append(Benchmark(HELD_OUT, (pair for pair, _ in held_out), ngram))
    for report in reports:
        report.overlaps = {benchmark.name: {"exact": 0, "near": 0} for benchmark in benchmarks}
    overlapping, examples = _overlapping(entries, benchmarks, ngram)
    if config.overlap.action == "remove":
        entries = _drop(dict.fromkeys(overlapping, "overlap"), entries)
    if not entries:
        raise InputError(f"of {sum(report.read for report in reports)} rows no pair is left; see the filters")
    with writing(out / "mixture.json"):
        (out / "mixture.json").unlink(missing_ok=True)  # it would describe other pairs
    if held_out:
        write_whole(out / f"{HELD_OUT}.jsonl", _lines(held_out, config.seed, HELD_OUT))
    write_whole(out / "pairs.jsonl", _lines(entries, config.seed, "kept"))
    assert all(report.reconciles for report in reports)
    mixed = MixReport(
        config=settings,
        pairs=len(entries),
        a=sum(report.a for report in reports),
        sha256=hash_written(out / "pairs.jsonl")["sha256"],
        held_out=len(held_out),
        sources=reports,
        examples=examples,
    )
    write_whole(out / "mixture.json", json.dumps(dataclasses.asdict(mixed), indent=1) + "\n")
    return mixed


def _make_output(out: Path, settings: dict[str, Any]) -> Path:
    """Create `out`; refuse it if it holds a mixture of other settings, on which chains may have been made."""
    made = out / "mixture.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = json.loads(made.read_bytes())["config"] if made.exists() else settings
        changed = config_differences(before, settings)
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror}; give an `out` that can be written") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{made} is not what `rmr1 data mix` writes ({error!r}); give another out") from error
    if changed:
        raise InputError(f"{out} holds a mixture made with another {', '.join(changed)}; remove it or give another out")
    return out


def _repeated(entries: list[Entry]) -> dict[int, str]:
    """Find the pairs that repeat or contradict others: {place in `entries`: "duplicates" or "contradictory"}."""
    same: defaultdict[bytes, list[tuple[int, bytes]]] = defaultdict(list)  # both sides -> (place, the better side)
    for place, (pair, _) in enumerate(entries):
        a, b = _digest(pair.conversation_a), _digest(pair.conversation_b)
        same[min(a, b) + max(a, b)].append((place, a if pair.better == "A" else b))
    dropped: dict[int, str] = {}
    for group in same.values():
        contradict = len({better for _, better in group}) > 1
        for place, _ in group if contradict else group[1:]:
            dropped[place] = "contradictory" if contradict else "duplicates"
    return dropped


def _digest(conversation: tuple[Message, ...]) -> bytes:
    text = json.dumps([(role, content.strip()) for role, content in conversation])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _drop(reasons: dict[int, str], entries: list[Entry]) -> list[Entry]:
    """Count the entries at the places in `reasons` under their reason, and return the others."""
    for place, reason in reasons.items():
        report = entries[place][1]
        setattr(report, reason, getattr(report, reason) + 1)
    return [entry for place, entry in enumerate(entries) if place not in reasons]


def _hold_out(entries: list[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """Divide the entries into those to evaluate on and those to train on, by a hash of the question."""
    parts: tuple[list[Entry], list[Entry]] = [], []
    for entry in entries:
        question = " ".join(question_words(entry[0]))
        digest = hashlib.blake2b(question.encode(errors="surrogatepass"), digest_size=8).digest()
        parts[int.from_bytes(digest, "big") >= share * 2**64].append(entry)
    if share and not all(parts):
        raise InputError(
            f"held_out={share}: all {len(entries)} pairs are in one part, as their questions fell; give another share"
        )
    return parts


def _overlapping(entries: list[Entry], benchmarks: list[Benchmark], ngram: int) -> tuple[set[int], list[dict]]:
    """Find the places of pairs whose question is in a benchmark, counted by benchmark; and examples of them."""
    places: set[int] = set()
    examples: list[dict] = []
    if not benchmarks:
        return places, examples
    for place, (pair, report) in enumerate(tqdm(entries, "overlap", unit="pair", dynamic_ncols=True)):
        words = question_words(pair)
        hashes = hash_ngrams(words, ngram)
        for benchmark in benchmarks:
            if overlap := benchmark.find(words, hashes):
                places.add(place)
                counts = report.overlaps[benchmark.name]
                counts[overlap.kind] += 1
                if sum(counts.values()) <= EXAMPLES:
                    facts = {"source": report.name, "id": f"{report.name}/{pair.id}", "benchmark": benchmark.name}
                    examples.append(facts | {"kind": overlap.kind, "benchmark_id": overlap.id, "words": overlap.words})
    return places, examples


def _lines(entries: list[Entry], seed: int, count: str) -> Iterator[str]:
    """Yield the lines of a file of pairs. Each is counted in its source's report, as `count`."""

    def key(entry: Entry) -> bytes:  # a hash of the id: an added or removed row leaves the order of the others
        pair, report = entry
        return hashlib.sha256(f"{seed}/{report.name}/{pair.id}".encode()).digest()

    for number, (pair, report) in enumerate(sorted(entries, key=key)):
        better = "AB"[number % 2]
        setattr(report, count, getattr(report, count) + 1)
        report.a += better == "A" and count == "kept"
        row = _row(report.name, pair if pair.better == better else pair.swapped())
        yield to_json(row, default=str) + "\n"  # Parquet has values that JSON has not, such as dates


def _row(source: str, pair: PreferencePair) -> dict[str, Any]:
    """Return a row of the project's own format."""
    if pair.single_turn:
        shown: dict[str, Any] = {name: getattr(pair, name) for name in ("question", "response_a", "response_b")}
    else:
        sides = ("conversation_a", "conversation_b")
        shown = {side: [message._asdict() for message in getattr(pair, side)] for side in sides}
    meta = dict(pair.meta)
    if "source" in meta:
        meta["origin"] = meta.pop("source")
    row = {"id": f"{source}/{pair.id}", "source": source, **shown, "better": pair.better}
    return row | {name: value for name, value in meta.items() if name not in row}
