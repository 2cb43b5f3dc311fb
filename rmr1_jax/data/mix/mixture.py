"""The training mixture: pairs of several sources, filtered, drawn, without duplicates or evaluation sets, shuffled.

    report = mix(load_config(MixtureConfig, "configs/mixture_rm_r1.yaml"))     # `rmr1 data mix CONFIG.yaml`

What becomes of a row, in this order: a bad one stops the run or is put aside; `where` and `exclude` filter by its own
fields; `count` rows are drawn; a pair whose two answers are the same (both empty, say) has nothing to be judged; of
pairs with the same question and the same answers, in either order, the first is kept, and none where they disagree on
which is better; what overlaps with evaluation sets is removed, or only reported. Every row is counted once:

    read = kept + rejected + filtered + not_drawn + alike + duplicates + contradictory + overlap

Then the pairs of all sources are shuffled by the seed, and the better answer is shown in A, in B, in A, ... along that
order. The same config and sources give the same bytes; another seed gives another order of the same pairs.

OUT/pairs.jsonl has our own format (`data/preferences.py`); a pair's `id` is `name of the source/id in the source`, and
`origin` is the field `source` that its row had. OUT/mixture.json has the counts; it is written last, and both whole.
Next: `data/mixture_source.py`, `data/overlap.py`; `data/teacher.py`, which asks for chains on the pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rmr1_jax.config import check_least, config_differences
from rmr1_jax.data.mix.overlap import Benchmark, Hasher, OverlapConfig, question_words, read_benchmark
from rmr1_jax.data.mix.sources import DROPPED, SourceConfig, SourceReport, read_source
from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import commit_of, locate
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.pairs.pair import Message, PreferencePair

EXAMPLES = 5  # of overlaps that are kept, of each source with each benchmark


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A mixture. out: the directory to write. seed: of the order. on_bad_row: "error", or "quarantine", which puts bad
    rows into OUT/rejects-NAME.jsonl and goes on."""

    sources: tuple[SourceConfig, ...]
    out: str
    seed: int = 0
    on_bad_row: str = "error"
    overlap: OverlapConfig = OverlapConfig()

    def __post_init__(self):
        if not self.sources:
            raise InputError("sources is empty; a mixture needs at least one")
        twice = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if twice:
            raise InputError(f"sources: two are named {', '.join(twice)}; give each a `name` of its own")
        check_least(self, 0, "seed")
        if self.on_bad_row not in ("error", "quarantine"):
            raise InputError(f"on_bad_row={self.on_bad_row!r} must be error or quarantine")


@dataclass(kw_only=True)
class MixReport:
    """What a mixture came to. a: pairs that show the better answer in A. sha256: of pairs.jsonl. examples: of overlaps,
    {source, id, benchmark, kind, benchmark_id, words}."""

    config: dict[str, Any]
    pairs: int
    a: int
    sha256: str
    sources: list[SourceReport]
    examples: list[dict[str, str]]

    def table(self) -> str:
        """The counts by source, as text."""
        reasons = [reason for reason in DROPPED if any(getattr(source, reason) for source in self.sources)]
        columns = ["read", "kept", *reasons]
        rows = [["source", *(reason.replace("_", " ") for reason in columns), "better in A"]]
        for each in self.sources:
            share = f"{each.a / each.kept:.1%}" if each.kept else "-"
            rows.append([each.name, *(f"{getattr(each, column):,}" for column in columns), share])
        totals = [sum(getattr(each, column) for each in self.sources) for column in columns]
        rows.append(["all", *(f"{total:,}" for total in totals), f"{self.a / self.pairs:.1%}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        for each in self.sources:
            for name, kinds in each.overlaps.items():
                if any(kinds.values()):
                    lines.append(f"{each.name}: overlaps with {name}: {kinds['exact']} exact, {kinds['near']} near")
            lines += [f"{each.name}: {note}" for note in each.notes]
        return "\n".join(lines)


def mix(config: MixtureConfig) -> MixReport:
    """Make a mixture and write it into `config.out`; see the module's text.

    Raises:
        InputError: a source cannot be read or is a benchmark; a bad row, where they stop the run; a filter on a field
            that no row has; `out` holds a mixture of another config; no pair is left.
        RunError: the disk refuses the files. An older mixture's pairs.jsonl is there whole, or the new one.
    """
    settings = _settings(config)
    out = _take(Path(config.out), settings)
    paths = [locate(source.path, source.revision) for source in config.sources]  # what is not there shows at once
    hasher = Hasher(config.overlap.ngram)
    benchmarks = [read_benchmark(name, hasher) for name in config.overlap.benchmarks]
    reports: list[SourceReport] = []
    pairs: list[PreferencePair] = []
    owners: list[SourceReport] = []  # of each pair
    with tqdm(desc="mix", unit="row", dynamic_ncols=True) as bar:
        for source, path in zip(config.sources, paths, strict=True):
            of_source = SourceReport(name=source.name, path=source.path, commit=commit_of(path))
            of_source.overlaps = {benchmark.name: {"exact": 0, "near": 0} for benchmark in benchmarks}
            rejects = out / f"rejects-{source.name}.jsonl"
            pairs += read_source(source, path, of_source, on_bad_row=config.on_bad_row, rejects=rejects, bar=bar)
            owners += [of_source] * (len(pairs) - len(owners))
            reports.append(of_source)
    pairs, owners = _without(_repeated(pairs, owners), pairs, owners)
    overlapping, examples = _overlapping(pairs, owners, benchmarks, hasher)
    if config.overlap.action == "remove":
        for place in overlapping:
            owners[place].overlap += 1
        pairs, owners = _without(overlapping, pairs, owners)
    if not pairs:
        raise InputError(f"of {sum(each.read for each in reports)} rows no pair is left; see the filters")
    for owner in owners:
        owner.kept += 1
    assert all(each.reconciles for each in reports)
    lines = _Lines(config.seed, pairs, owners)
    with writing(out / "mixture.json"):
        (out / "mixture.json").unlink(missing_ok=True)  # it would speak of other pairs
    write_whole(out / "pairs.jsonl", lines)
    report = MixReport(
        config=settings,
        pairs=len(pairs),
        a=sum(each.a for each in reports),
        sha256=lines.digest.hexdigest(),
        sources=reports,
        examples=examples,
    )
    write_whole(out / "mixture.json", json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return report


def _settings(config: MixtureConfig) -> dict[str, Any]:
    """What decides the pairs, as it will be read back from mixture.json."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    del settings["out"]
    return settings


def _take(out: Path, settings: dict[str, Any]) -> Path:
    """`out`, made; refused where it holds a mixture of other settings, which chains may have been made on."""
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
        raise InputError(
            f"{out} holds a mixture made with another {', '.join(changed)}; give another out, or remove it"
        )
    return out


# ---- what is dropped ----


def _repeated(pairs: list[PreferencePair], owners: list[SourceReport]) -> set[int]:
    """The places of pairs that say again what an earlier one says, and of all those that disagree; counted."""
    first: dict[bytes, tuple[int, bytes]] = {}  # both sides in a fixed order -> the first place, and its better side
    again: list[tuple[int, bytes]] = []
    disagree: set[bytes] = set()
    for place, pair in enumerate(pairs):
        a, b = _digest(pair.conversation_a), _digest(pair.conversation_b)
        key, better = min(a, b) + max(a, b), a if pair.better == "A" else b
        if key not in first:
            first[key] = (place, better)
            continue
        again.append((place, key))
        if first[key][1] != better:
            disagree.add(key)
    contradictory = {place for place, key in again if key in disagree} | {first[key][0] for key in disagree}
    duplicates = {place for place, _ in again} - contradictory
    for place in contradictory:
        owners[place].contradictory += 1
    for place in duplicates:
        owners[place].duplicates += 1
    return contradictory | duplicates


def _digest(conversation: tuple[Message, ...]) -> bytes:
    text = json.dumps([(role, content.strip()) for role, content in conversation])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _overlapping(
    pairs: list[PreferencePair], owners: list[SourceReport], benchmarks: list[Benchmark], hasher: Hasher
) -> tuple[set[int], list[dict[str, str]]]:
    """The places of pairs whose question stands in a benchmark, counted by benchmark; and examples."""
    found: set[int] = set()
    examples: list[dict[str, str]] = []
    if not benchmarks:
        return found, examples
    for place, pair in enumerate(tqdm(pairs, desc="overlap", unit="pair", dynamic_ncols=True)):
        words = question_words(pair)
        windows = hasher(words)
        for benchmark in benchmarks:
            overlap = benchmark.find(words, windows)
            if overlap is None:
                continue
            found.add(place)
            counts = owners[place].overlaps[benchmark.name]
            counts[overlap.kind] += 1
            if sum(counts.values()) <= EXAMPLES:
                name = owners[place].name
                at = {"source": name, "id": f"{name}/{pair.id}", "benchmark": benchmark.name}
                examples.append({**at, "kind": overlap.kind, "benchmark_id": overlap.id, "words": overlap.words})
    return found, examples


def _without(
    dropped: set[int], pairs: list[PreferencePair], owners: list[SourceReport]
) -> tuple[list[PreferencePair], list[SourceReport]]:
    kept = [place for place in range(len(pairs)) if place not in dropped]
    return [pairs[place] for place in kept], [owners[place] for place in kept]


# ---- writing ----


class _Lines:
    """The lines of pairs.jsonl, in the order of the seed; `digest` is theirs when they are exhausted."""

    def __init__(self, seed: int, pairs: list[PreferencePair], owners: list[SourceReport]):
        self.seed, self.pairs, self.owners, self.digest = seed, pairs, owners, hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        # By a hash of the id and not by a shuffled list: a row more or less leaves the order of the others.
        ids = [f"{owner.name}/{pair.id}" for owner, pair in zip(self.owners, self.pairs, strict=True)]
        order = sorted(range(len(ids)), key=lambda k: hashlib.sha256(f"{self.seed}/{ids[k]}".encode()).digest())
        for number, k in enumerate(order):
            better = "AB"[number % 2]
            pair, owner = self.pairs[k], self.owners[k]
            owner.a += better == "A"
            row = _row(ids[k], owner.name, pair if pair.better == better else pair.swapped())
            line = json.dumps(row, default=str) + "\n"  # Parquet has values that JSON does not, dates for one
            self.digest.update(line.encode())
            yield line


def _row(id: str, source: str, pair: PreferencePair) -> dict[str, Any]:
    """A pair in our own format."""
    if pair.single_turn:
        shown: dict[str, Any] = {
            "question": pair.question,
            "response_a": pair.response_a,
            "response_b": pair.response_b,
        }
    else:
        sides = {"conversation_a": pair.conversation_a, "conversation_b": pair.conversation_b}
        shown = {name: [message._asdict() for message in side] for name, side in sides.items()}
    meta = dict(pair.meta)
    if "source" in meta:
        meta["origin"] = meta.pop("source")
    return {"id": id, "source": source, **shown, "better": pair.better, **meta}
