"""RMB (arXiv 2410.09893): helpfulness and harmlessness, pairwise and best-of-N: four sets and their plain mean.

The score of a pairwise set is its accuracy. A best-of-N item is right only if its best answer wins against each of its
losers; the accuracy over its comparisons is reported beside it.

Next: `evaluate.py`, which judges and scores; `logs.py`, the parts of log entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.eval import logs
from rmr1_jax.eval.benchmark import Benchmark
from rmr1_jax.eval.logs import FLAG, OURS, ArrayFiles, Judged
from rmr1_jax.eval.scores import Items, Place, Statistic, equal_sections
from rmr1_jax.pairs.benchmark_names import RMB_SETS as SETS
from rmr1_jax.pairs.containers import source_files
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.rows import Row

_SET_SCORE = "RMB/{folder}/score_result/Final_score.json"

_LOG_NAMES = MappingProxyType({"Pairwise_set": "logs.json", "BoN_set": "raw_logs.json"})

# The fields of an entry in their published order.
_FIELDS = MappingProxyType(
    {
        "Pairwise_set": ["pair_uid", "category_path", "text_chosen", "text_rejected", "results", "subset", "answers"],
        "BoN_set": ["text_chosen", "text_rejected", "bon_uid", "category_path", "subset", "idx", "results", "answers"],
    }
)


class Rmb(Benchmark):
    name = "rmb"
    main_scores = "RMB/META_RESULT.json"
    log_names = tuple(_LOG_NAMES.values())

    def read(self, path: Path) -> Iterator[PreferencePair]:
        """The pairs of every set below `path`. The A/B order of each set is drawn by itself, from seed 0."""
        for folder in _set_folders(path):
            yield from super().read(folder)

    def section(self, meta: Mapping[str, Any]) -> str:
        return set_of(str(meta["category"]))

    def write_logs(self, files: ArrayFiles, rows: Iterable[Judged], judge: str) -> None:
        items: dict[str, dict[str, int]] = {}  # the numbers of each folder's items
        for row in rows:
            meta = row["meta"]
            kind, goal = SETS[set_of(meta["category"])]
            folder = f"{kind}_{goal}"
            own = items.setdefault(folder, {})
            index = own.setdefault(meta["item"], len(own))
            uid, category = meta["item"].removeprefix(f"{meta['category']}#"), meta["category"]
            entry = {**logs.published(row), "pair_uid": uid, "bon_uid": uid, "category_path": category}
            entry |= {"subset": category if kind == "Pairwise_set" else "train", "idx": index}
            files.add(f"RMB/{folder}/{_LOG_NAMES[kind]}", {key: entry[key] for key in (*_FIELDS[kind], FLAG, OURS)})

    def judgements_of(self, entries: Iterable[Row]) -> Iterator[Judged]:
        seen: Counter[str] = Counter()
        for entry in entries:
            category = entry.text("category_path")
            pairwise = "pair_uid" in entry.value
            item = f"{category}#{entry.identifier('pair_uid' if pairwise else 'bon_uid')}"
            meta = {"benchmark": self.name, "kind": "pairwise" if pairwise else "best-of-n", "category": category}
            meta |= {"item": item, "section": set_of(category)}
            yield logs.judged(entry, item if pairwise else f"{item}-{seen[item]}", meta)
            seen[item] += 1

    def items(self) -> Items:
        return Items(all_or_nothing=True)

    def place(self, row: Mapping[str, Any]) -> Place:
        meta = row["meta"]
        return Place(self.section(meta), str(meta["item"]), cell=None, group=str(meta["category"]))

    def statistics(self, items: Items) -> list[Statistic]:
        return equal_sections(name for name in SETS if name in items.strata)

    def score_files(self, items: Items) -> dict[str, Any]:
        """The mean of the sets is there only if all four are."""
        files = {_set_file(name): _set_score(items, name) for name in SETS if name in items.strata}
        return {**files, self.main_scores: meta_result(files)}


def meta_result(files: Mapping[str, Any]) -> dict[str, float]:
    """META_RESULT.json from the score files of the sets, by path."""
    result = {}
    for name in SETS:
        if found := files.get(_set_file(name)):
            result[name] = found[0].get("BoN Final Accuracy", found[0].get("Overall_accuracy"))
    if len(result) == len(SETS):
        result["Accuracy Averaged from Four Sections"] = sum(result.values()) / len(result)
    return result


def set_of(category: str) -> str:
    """The name of the set that a category is in; InputError if it is in none."""
    parts = tuple(category.split("/")[:2])
    found = next((name for name, own in SETS.items() if own == parts), None)
    if found is None:
        known = ", ".join("/".join(parts) for parts in SETS.values())
        raise InputError(f"category_path {category!r} is none of RMB's: {known}")
    return found


def _set_folders(path: Path) -> list[Path]:
    """The folders Pairwise_set/Helpfulness and so on below `path`, in the order of `SETS`; `path` if there are none."""
    files = source_files(path) if path.is_dir() else []
    folders = sorted({parent for file in files for parent in file.parents if parent.is_relative_to(path)})
    return [folder for parts in SETS.values() for folder in folders if folder.parts[-2:] == parts] or [path]


def _set_file(name: str) -> str:
    return _SET_SCORE.format(folder="_".join(SETS[name]))


def _set_score(items: Items, name: str) -> list[dict[str, Any]]:
    """Final_score.json of one set: the overall numbers, and the accuracy of each category."""
    groups = items.groups(name)
    right, total = (sum(counts) for counts in zip(*groups.values(), strict=True))
    categories = {category: right / n for category, (right, n) in groups.items()}
    if SETS[name][0] == "Pairwise_set":
        return [{"Overall_accuracy": right / total}, categories]
    right_pairs, pairs = items.pairs(name)
    overall = {
        "Absolute Accuracy (all correct / all)": right_pairs / pairs,
        "BoN Final Accuracy": right / total,
        "BoN Absolute Number of Correct": right,
        "BoN Absolute Total Numbers": total,
    }
    return [overall, categories]
