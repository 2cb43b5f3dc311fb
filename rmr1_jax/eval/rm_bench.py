"""RM-Bench: 1,327 items, each with three styles of a right and of a wrong answer, all nine pairs judged.

M[i][j] is how often the chosen answer in style i (0 concise, 1 detailed, 2 detailed with markdown) beats the rejected
one in style j. Hard is the upper triangle, where the wrong answer is the better dressed, normal the diagonal, easy the
lower triangle. The published run wrote three files: file f pairs style i with style i + f - 1 (mod 3).

Next: `run.py`, which judges and scores; `logs.py` for what entries and rows are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import (
    FLAG,
    OURS,
    ArrayFiles,
    Judged,
    conversations,
    extras,
    judged,
    log_files,
    shown_text,
    with_meta,
)
from rmr1_jax.pairs.benchmarks import STYLES
from rmr1_jax.pairs.order import LegacyFlags
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import Row, describe

NAME = "rm-bench"


LOG = "RM-Bench/total_dataset_{file}_{model}.json"


SCORE = "RM-Bench/final_result.json"


DOMAINS = ("chat", "math", "code", "safety")


_LOG_NAME = re.compile(r"total_dataset_([123])_.*\.json")


_CELLS = [(i, j) for i in range(STYLES) for j in range(STYLES)]


def load(path: Path) -> Iterator[PreferencePair]:
    """Nine pairs an item, in the published A/B order; see `data/benchmarks.py`."""
    for number, pair in enumerate(read_pairs(path, NAME, flags=LegacyFlags(0))):
        yield with_meta(pair, section=_domain(str(pair.meta["domain"])), number=number)


def write_logs(files: ArrayFiles, rows: Iterable[Judged], model: str) -> None:
    """The three published logs of rows in data-set order. An item that lacks a pair is left out."""
    own: list[Judged] = []
    for row in rows:
        if own and row["meta"]["item"] != own[0]["meta"]["item"]:
            own = []
        own.append(row)
        if len(own) == len(_CELLS):
            by_style = {(r["meta"]["chosen_style"], r["meta"]["rejected_style"]): r for r in own}
            for file in range(STYLES):
                styles = [by_style[i, (i + file) % STYLES] for i in range(STYLES)]
                files.add(LOG.format(file=file + 1, model=model), _entry(styles))


def _entry(rows: list[Judged]) -> dict[str, Any]:
    """An item in one file: its three chosen styles, each with the rejected answer it was judged against."""
    meta = rows[0]["meta"]
    sides = [conversations(row) for row in rows]
    return {
        "id": meta["item"],
        "prompt": sides[0][0][0][1],
        "chosen": [chosen[-1][1] for chosen, _ in sides],
        "rejected": [rejected[-1][1] for _, rejected in sides],
        "domain": meta["domain"],
        "result": [int(row["correct"]) for row in rows],
        "output": [shown_text(row) for row in rows],
        FLAG: [row["better"] == "B" for row in rows],
        OURS: [extras(row) for row in rows],
    }


def find_logs(path: Path) -> list[Path]:
    """The log files that `path` stands for."""
    return log_files(path, lambda file: bool(_LOG_NAME.fullmatch(file.name)), "total_dataset_{1,2,3}_*.json")


def judgements_of(entries: Iterable[Row]) -> Iterator[Judged]:
    """Our rows for the entries of a published log, one for each chosen style. The file's name says which file it is."""
    for entry in entries:
        named = _LOG_NAME.fullmatch(Path(entry.place.file).name)
        if not named:
            raise InputError(
                f"{entry.place.file}: expected total_dataset_1_*.json, _2_ or _3_: the number says the styles"
            )
        yield from _judged_styles(entry, int(named[1]))


def _judged_styles(entry: Row, file: int) -> Iterator[Judged]:
    item, question, domain = entry.identifier("id"), entry.text("prompt"), entry.text("domain")
    fields = {name: entry.sequence(name) for name in ("chosen", "rejected", "result", "output", FLAG)}
    for name, values in fields.items():
        if len(values) != STYLES:
            raise entry.bad(name, f"has {len(values)} values, expected {STYLES}, one of each style")
    ours = entry.value.get(OURS) or [None] * STYLES
    if not isinstance(ours, list) or len(ours) != STYLES:
        raise entry.bad(OURS, f"is {describe(ours)}, expected a list of {STYLES}, one of each style")
    for i in range(STYLES):
        j = (i + file - 1) % STYLES
        meta = {"benchmark": NAME, "item": item, "domain": domain, "section": _domain(domain), "file": file}
        answers = [entry.checked_text(fields[name][i], f"{name}[{i}]") for name in ("chosen", "rejected")]
        yield judged(
            entry,
            id=f"{item}#{i}-{j}",
            chosen=[("user", question), ("assistant", answers[0])],
            rejected=[("user", question), ("assistant", answers[1])],
            text=entry.checked_text(fields["output"][i], f"output[{i}]"),
            result=fields["result"][i],
            in_b=fields[FLAG][i],
            meta={**meta, "chosen_style": i, "rejected_style": j},
            ours=ours[i],
        )


def record(row: Judged) -> dict[str, Any]:
    """What `score` needs of a row."""
    meta = row["meta"]
    return {key: meta[key] for key in ("item", "domain", "chosen_style", "rejected_style")} | {
        "correct": row["correct"]
    }


def score(records: Iterable[Mapping[str, Any]], compat: str | None = None) -> dict[str, Any]:
    """The published score file, by path, from records {item, domain, chosen_style, rejected_style, correct}.

    compat: "released" reads M[i][i + 1] off file 3, as the released scorer does, and never off file 2.

    Raises:
        InputError: no records; an item that lacks a pair; a domain that RM-Bench does not have.
    """
    items: dict[str, dict[str, np.ndarray]] = {}
    for found in records:
        own = items.setdefault(_domain(found["domain"]), {})
        cells = own.setdefault(str(found["item"]), np.full((STYLES, STYLES), np.nan))
        cells[found["chosen_style"], found["rejected_style"]] = found["correct"]
    if not items:
        raise InputError("no judgements to score")
    shares = {name: _difficulties(items[name], slip=compat == "released") for name in DOMAINS if name in items}
    result = {name: float(np.mean(list(own.values()))) for name, own in shares.items()}
    total = float(np.mean(list(result.values())))
    for difficulty in ("hard", "normal", "easy"):
        result[f"{difficulty}_acc"] = float(np.mean([own[difficulty] for own in shares.values()]))
    return {SCORE: {**result, "total_avg_acc": total}}


def _difficulties(items: Mapping[str, np.ndarray], slip: bool) -> dict[str, float]:
    """A domain's accuracy where the rejected answer is in a more elaborate style, in the same, in a plainer one."""
    total = np.zeros((STYLES, STYLES))
    for name, cells in items.items():
        for i, j in _CELLS:
            read = (j + 1) % STYLES if slip and j == (i + 1) % STYLES else j
            if np.isnan(cells[i, read]):
                file = (read - i) % STYLES + 1
                raise InputError(
                    f"item {name!r} has no judgement of chosen style {i}, rejected style {read}: file {file}"
                )
            total[i, j] += cells[i, read]
    matrix = total / len(items)
    pairs = STYLES * (STYLES - 1) / 2
    return {
        "hard": np.sum(np.triu(matrix, 1)) / pairs,
        "normal": np.mean(np.diag(matrix)),
        "easy": np.sum(np.tril(matrix, -1)) / pairs,
    }


def _domain(name: str) -> str:
    """Of the four; safety-refuse and safety-response are one."""
    found = next((domain for domain in DOMAINS if name.startswith(domain)), None)
    if found is None:
        raise InputError(f"domain {name!r} is none of RM-Bench's: {', '.join(DOMAINS)}")
    return found
