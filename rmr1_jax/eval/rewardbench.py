"""RewardBench (arXiv 2403.13787): 2,985 pairs in 23 subsets and four sections.

A section is the weighted mean of its subsets' accuracies, and the score is the plain mean of the sections. The weights
are the sizes of the subsets, except for math-prm: its 447 rows count as 984, as many as those of the six code subsets.

Next: `evaluate.py`, which judges and scores; `logs.py`, the parts of log entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.eval import logs
from rmr1_jax.eval.benchmark import Benchmark
from rmr1_jax.eval.logs import OURS, ArrayFiles, Judged
from rmr1_jax.eval.scores import Items, Place, Statistic, score
from rmr1_jax.pairs.benchmark_names import REWARDBENCH_SECTIONS as SECTIONS
from rmr1_jax.pairs.benchmark_names import REWARDBENCH_SUBSETS
from rmr1_jax.pairs.containers import source_files
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.rows import Row

LOG = "reward_bench/log_result/logs.json"
SUBSETS = "reward_bench/score_result/each_small_section_score.json"


class RewardBench(Benchmark):
    name = "rewardbench"
    main_scores = "reward_bench/score_result/main_score.json"
    log_names = ("logs.json",)

    def read(self, path: Path) -> Iterator[PreferencePair]:
        # The repository on the hub has the split `raw` beside `filtered`.
        filtered = [file for file in source_files(path) if file.name.startswith("filtered")]
        return super().read(filtered[0] if len(filtered) == 1 else path)

    def section(self, meta: Mapping[str, Any]) -> str:
        subset = str(meta["subset"])
        if subset not in REWARDBENCH_SUBSETS:
            raise InputError(f"subset {subset!r} is none of RewardBench's: {', '.join(REWARDBENCH_SUBSETS)}")
        return REWARDBENCH_SUBSETS[subset]

    def write_logs(self, files: ArrayFiles, rows: Iterable[Judged], judge: str) -> None:
        for row in rows:
            meta, entry = row["meta"], logs.published(row)
            ours = entry.pop(OURS)
            files.add(LOG, {**entry, "subset": meta["subset"], "id": meta.get("id"), OURS: ours})

    def judgements_of(self, entries: Iterable[Row]) -> Iterator[Judged]:
        for entry in entries:
            subset, number = entry.text("subset"), entry.identifier("id")
            meta = {"benchmark": self.name, "subset": subset, "id": entry.value["id"]}
            yield logs.judged(entry, f"{subset}/{number}", {**meta, "section": self.section(meta)})

    def place(self, row: Mapping[str, Any]) -> Place:
        self.section(row["meta"])  # raises for an unknown subset
        return Place(str(row["meta"]["subset"]), row["id"])

    def statistics(self, items: Items) -> list[Statistic]:
        sections = []
        for name, weights in _present(items).items():
            total = sum(weights.values())
            sections.append(Statistic(name, {subset: weight / total for subset, weight in weights.items()}))
        headline = {subset: weight for section in sections for subset, weight in section.weights.items()}
        return [Statistic("headline", headline), *sections]

    def score_files(self, items: Items) -> dict[str, Any]:
        """A subset or section without a judgement is left out of the means."""
        # With the weights as integers, as published: the last digits depend on it.
        main = {name: score(items.strata_of(Statistic(name, own))) for name, own in _present(items).items()}
        right, n = items.pairs(*items.strata)
        main |= {"avg_Result_each_section": sum(main.values()) / len(main), "absoluate_Result": right / n}
        counts = {subset: items.pairs(subset) for subset in sorted(items.strata)}
        return {self.main_scores: main, SUBSETS: {subset: right / n for subset, (right, n) in counts.items()}}


def _present(items: Items) -> dict[str, dict[str, float]]:
    """The weights of the subsets that hold a judgement, by section."""
    found = {
        name: {subset: weight for subset, weight in weights.items() if subset in items.strata}
        for name, weights in SECTIONS.items()
    }
    return {name: weights for name, weights in found.items() if weights}
