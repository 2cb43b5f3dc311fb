"""RM-Bench (arXiv 2410.16184): 1,327 items of a right and a wrong answer in three styles, all nine pairs judged.

M[i][j] is how often the chosen answer in style i (0 concise, 1 detailed, 2 detailed with markdown) beats the rejected
one in style j. Hard is the upper triangle, where the wrong answer has the more elaborate style, normal the diagonal,
easy the lower triangle. The published run wrote three files: file f pairs style i with style i + f - 1 (mod 3).

Next: `evaluate.py`, which judges and scores; `logs.py`, the parts of log entries.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.eval import logs
from rmr1_jax.eval.benchmark import Benchmark, section_of
from rmr1_jax.eval.logs import FLAG, OURS, ArrayFiles, Judged
from rmr1_jax.eval.scores import Items, Place, Statistic, equal_sections
from rmr1_jax.pairs.benchmark_names import RM_BENCH_DOMAINS as DOMAINS
from rmr1_jax.pairs.benchmarks import STYLES
from rmr1_jax.pairs.rows import Row, describe

LOG = "RM-Bench/total_dataset_{file}_{model}.json"
_LOG_NAME = re.compile(r"total_dataset_([123])_.*\.json")
_CELLS = [(i, j) for i in range(STYLES) for j in range(STYLES)]  # (chosen style, rejected style); bit i * STYLES + j

# Hard is where the rejected answer has the more elaborate style.
DIFFICULTIES = {
    name: sum(1 << (i * STYLES + j) for i, j in _CELLS if compare(i, j))
    for name, compare in (("hard", operator.lt), ("normal", operator.eq), ("easy", operator.gt))
}


@dataclasses.dataclass(frozen=True)
class RmBench(Benchmark):
    """released: score as the released scorer does, which reads file 3 in place of file 2."""

    released: bool = False
    name = "rm-bench"
    main_scores = "RM-Bench/final_result.json"
    log_names = ("total_dataset_[123]_*.json",)

    def section(self, meta: Mapping[str, Any]) -> str:
        """One of `DOMAINS`; safety-refuse and safety-response are one domain."""
        return section_of(str(meta["domain"]), DOMAINS, "domain", "RM-Bench")

    def write_logs(self, files: ArrayFiles, rows: Iterable[Judged], judge: str) -> None:
        """Write three logs. An item that lacks a pair is left out."""
        for _, own in itertools.groupby(rows, key=lambda row: row["meta"]["item"]):
            by_style = {(row["meta"]["chosen_style"], row["meta"]["rejected_style"]): row for row in own}
            if len(by_style) == len(_CELLS):
                for file in range(STYLES):
                    styles = [by_style[i, (i + file) % STYLES] for i in range(STYLES)]
                    files.add(LOG.format(file=file + 1, model=judge), _entry(styles))

    def judgements_of(self, entries: Iterable[Row]) -> Iterator[Judged]:
        """One row for each chosen style. The number in the file's name tells the rejected styles."""
        for entry in entries:
            named = _LOG_NAME.fullmatch(Path(entry.place.file).name)
            if not named:
                raise InputError(
                    f"{entry.place.file}: expected total_dataset_1_*.json, _2_ or _3_: the number tells the styles"
                )
            yield from _judged_styles(entry, int(named[1]))

    def items(self) -> Items:
        return Items(read=_without_file_2) if self.released else Items()

    def place(self, row: Mapping[str, Any]) -> Place:
        meta = row["meta"]
        cell = (meta["chosen_style"], meta["rejected_style"])
        if cell not in _CELLS:
            raise KeyError("chosen_style, rejected_style")
        return Place(self.section(meta), str(meta["item"]), _CELLS.index(cell))

    def statistics(self, items: Items) -> list[Statistic]:
        headline, *domains = equal_sections(_present(items))
        by_difficulty = [Statistic(name, headline.weights, cells) for name, cells in DIFFICULTIES.items()]
        return [headline, *domains, *by_difficulty]

    def score_files(self, items: Items) -> dict[str, Any]:
        """Raises InputError if an item lacks a pair."""
        by_domain = {}
        for name in _present(items):
            self._check_complete(items, name)
            matrix = np.array(_matrix(items, name))
            pairs = STYLES * (STYLES - 1) / 2
            by_domain[name] = {
                "hard": np.sum(np.triu(matrix, 1)) / pairs,
                "normal": np.mean(np.diag(matrix)),
                "easy": np.sum(np.tril(matrix, -1)) / pairs,
            }
        result = {name: float(np.mean(list(own.values()))) for name, own in by_domain.items()}
        total = float(np.mean(list(result.values())))
        for difficulty in DIFFICULTIES:
            result[f"{difficulty}_acc"] = float(np.mean([own[difficulty] for own in by_domain.values()]))
        return {self.main_scores: {**result, "total_avg_acc": total}}

    def as_released(self) -> RmBench:
        return RmBench(released=True)

    def styles(self, items: Items) -> dict[str, Any]:
        return {
            name: [[None if share is None else 100 * share for share in row] for row in _matrix(items, name)]
            for name in _present(items)
        }

    def notes(self, items: Items) -> list[str]:
        masks = [asked for own in items.strata.values() for asked, _ in own.values()]
        partial = sum(asked != (1 << len(_CELLS)) - 1 for asked in masks)
        notes = [f"{partial} of {len(masks)} items lack some of their nine judgements; they count by those they have"]
        return [
            *(notes if partial else []),
            "Intervals by kind and length treat an item's nine pairs as independent, so they are too narrow",
            *(["Scored as the released scorer does, which reads file 3 in place of file 2"] if self.released else []),
        ]

    def _check_complete(self, items: Items, domain: str) -> None:
        for (_, item), asked, _ in items.bits(domain):
            for bit, (i, j) in enumerate(_CELLS):
                if not asked >> bit & 1:
                    file = (j - i) % STYLES
                    if self.released and file == 1:
                        file, j = 2, (i + 2) % STYLES
                    raise InputError(
                        f"item {item!r} has no judgement of chosen style {i}, rejected style {j}: file {file + 1}"
                    )


def _present(items: Items) -> list[str]:
    return [name for name in DOMAINS if name in items.strata]


def _matrix(items: Items, domain: str) -> list[list[float | None]]:
    """The share of a domain's items that are right, [chosen style][rejected style]; None: no item."""
    found = list(items.bits(domain))
    counts = [
        (sum(right >> bit & 1 for _, _, right in found), sum(asked >> bit & 1 for _, asked, _ in found))
        for bit in range(len(_CELLS))
    ]
    shares = [right / n if n else None for right, n in counts]
    return [shares[i * STYLES : (i + 1) * STYLES] for i in range(STYLES)]


def _without_file_2(bits: int) -> int:
    """An item's bits with each cell (i, i + 1), which file 2 holds, replaced by (i, i + 2), which file 3 holds."""
    for i in range(STYLES):
        file_2, file_3 = (i * STYLES + (i + k) % STYLES for k in (1, 2))
        bits = bits & ~(1 << file_2) | (bits >> file_3 & 1) << file_2
    return bits


def _entry(rows: list[Judged]) -> dict[str, Any]:
    """An item in one file: its three chosen styles, each with the rejected answer it was compared with."""
    meta = rows[0]["meta"]
    styles = [logs.published(row) for row in rows]
    return {
        "id": meta["item"],
        "prompt": styles[0]["text_chosen"][0]["content"],
        "chosen": [style["text_chosen"][-1]["content"] for style in styles],
        "rejected": [style["text_rejected"][-1]["content"] for style in styles],
        "domain": meta["domain"],
        "result": [style["results"] for style in styles],
        "output": [style["answers"] for style in styles],
        FLAG: [style[FLAG] for style in styles],
        OURS: [style[OURS] for style in styles],
    }


def _judged_styles(entry: Row, file: int) -> Iterator[Judged]:
    item, question, domain = entry.identifier("id"), entry.text("prompt"), entry.text("domain")
    fields = {name: entry.sequence(name) for name in ("chosen", "rejected", "result", "output", FLAG)}
    for name, values in fields.items():
        if len(values) != STYLES:
            raise entry.bad(name, f"has {len(values)} values, expected {STYLES}, one for each style")
    ours = entry.value.get(OURS) or [None] * STYLES
    if not isinstance(ours, list) or len(ours) != STYLES:
        raise entry.bad(OURS, f"is {describe(ours)}, expected a list of {STYLES}, one for each style")
    for i in range(STYLES):
        j = (i + file - 1) % STYLES
        meta = {"benchmark": RmBench.name, "item": item, "domain": domain}
        meta |= {"section": RmBench().section(meta), "file": file}
        chosen, rejected, text = (
            entry.checked_text(fields[name][i], f"{name}[{i}]") for name in ("chosen", "rejected", "output")
        )
        asked = {"role": "user", "content": question}
        style = {
            "text_chosen": [asked, {"role": "assistant", "content": chosen}],
            "text_rejected": [asked, {"role": "assistant", "content": rejected}],
            **{"answers": text, "results": fields["result"][i], FLAG: fields[FLAG][i], OURS: ours[i]},
        }
        own = Row(value=style, place=entry.place, raw=entry.raw)
        yield logs.judged(own, f"{item}#{i}-{j}", {**meta, "chosen_style": i, "rejected_style": j})
