"""`rmr1 data prepare`: tokenize rows once, in parallel, into a prepared set that training reads.

The rows are read twice. The first pass only validates and counts them, so that a bad row is reported now and not after
an hour; in the second, processes tokenize them in order and this process writes the examples as they arrive. Memory
grows only by the row ids, about 100 bytes each, which detect duplicates. Everything is written into a directory beside
the output, which is renamed to the output when it is complete and on the disk.

Next: `store.py`, which describes the directory and reads it; `tokenize_rows.py` and `writer.py`, the two halves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from rmr1_jax.config import config_dataclass
from rmr1_jax.data import store, writer
from rmr1_jax.data.examples import (
    Example,
    Stage,
    Target,
    first_row,
    is_rendered,
    load_tokenizer,
    make_example,
    read_source,
)
from rmr1_jax.data.tokenize_rows import CHUNK, Refused, tokenize_rows
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.append import lock_for_writing
from rmr1_jax.files.hub import locate
from rmr1_jax.files.write import writing
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.pairs.rows import ReadReport
from rmr1_jax.prompts.cor import get_prompt


@config_dataclass
class PrepareConfig:
    """The settings of `rmr1 data prepare`. Lengths are in tokens.

    model: whose tokenizer and chat template are used; a directory or hub id. data: files, folders or hub ids of
    rendered rows (`context_messages`, `winner`); or, with `prompt` (cor, reasoning, a prompt file), of pairs. target:
    what SFT trains, the row's trace or only the right verdict. max_length: of an example. on_too_long: "error", or
    "drop" longer examples. on_bad_row: "error", or "quarantine" bad rows into rejects.jsonl. limit: the most rows to
    take, drawn by `seed` before long examples are dropped. workers: processes; None: one a core.
    """

    model: str
    data: str | tuple[str, ...]
    out: str
    prompt: str | None = None
    stage: Stage = "sft"
    target: Target = "trace"
    max_length: PositiveInt = 12288
    on_too_long: Literal["error", "drop"] = "error"
    on_bad_row: Literal["error", "quarantine"] = "error"
    limit: PositiveInt | None = None
    seed: NonNegativeInt = 0
    workers: PositiveInt | None = None

    def __post_init__(self):
        if not self.data:
            raise InputError("data names no rows; give a file, a folder or a hub id")
        if self.prompt is not None and not isinstance(self.data, str):
            raise InputError(
                "data: with a prompt, give one file or folder of pairs; `rmr1 data mix` makes one of several"
            )
        if self.prompt is not None and (self.stage, self.target) == ("sft", "trace"):
            raise InputError(
                f"prompt={self.prompt!r}: pairs hold no traces, which stage sft learns; set target=verdict (the answer "
                "alone) or stage=grpo, or make traces with `rmr1 data chains`"
            )


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the prepared set `config.out`, and return the content of its prepared.json.

    Raises:
        InputError: bad input, an example that is too long (on_too_long: error), `out` exists, or another run is
            writing it. RunError: the disk is full, or a worker was killed. In either case nothing is left behind.
    """
    out = Path(config.out)
    partial, lock = (out.with_name(out.name + end) for end in (".partial", ".lock"))
    with lock_for_writing(lock):
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise InputError(f"{out} exists already; remove it, or give another out")
            tokenizer = load_tokenizer(config.model)
            with writing(out, then="make room, then run the same command again"):
                shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
                (partial / store.ROWS).mkdir(parents=True)
                manifest = _write_set(config, tokenizer, partial)
                store.PreparedExamples(partial)  # check that it opens before it is published
                writer.publish(partial, out)
        except BrokenProcessPool as e:
            raise RunError("a worker process was killed, perhaps for memory; run again with fewer workers") from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)
    return manifest


def summary_line(manifest: Mapping[str, Any]) -> str:
    """Describe a set in a line. The counts of rows add up: read = kept + rejected + too long + left out."""
    lengths = manifest["lengths"]
    trained = lengths["trained"]["sum"] if "trained" in lengths else 0
    return f"rows: {_in_words(manifest['counts'])}; tokens: {lengths['tokens']['sum']}, {trained} of them trained"


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _write_set(config: PrepareConfig, tokenizer: Tokenizer, partial: Path) -> dict[str, Any]:
    """Write all files of the set into the directory `partial`, and return its manifest."""
    prompt = None if config.prompt is None else get_prompt(config.prompt)
    rejects, dropped = partial / store.REJECTS, partial / "dropped"
    bad_rows = rejects if config.on_bad_row == "quarantine" else None
    rows = functools.partial(read_source, _locate_sources(config), prompt, seed=config.seed, rejects=bad_rows)
    chosen = _choose(sum(1 for _ in rows()), config.limit, config.seed)
    report, statistics, drops = ReadReport(), writer.SetStatistics(), Counter()
    workers = min(config.workers or _cores(), -(-len(chosen) // CHUNK) or 1)
    make = functools.partial(make_example, stage=config.stage, target=config.target, prompt=prompt)
    outcomes = tokenize_rows(itertools.compress(rows(report=report), chosen), tokenizer, make, workers)
    every = 0.1 if sys.stderr.isatty() else 30.0  # in a log file, a line every half minute
    with (
        tqdm(total=int(chosen.sum()), desc="prepare", unit="row", dynamic_ncols=True, mininterval=every) as bar,
        dropped.open("w", encoding="utf-8") as dropped_rows,
        contextlib.closing(outcomes),
    ):
        examples = writer.RowsWriter(partial / store.ROWS)
        for outcome in outcomes:
            bar.update()
            if isinstance(outcome, Example) and len(outcome) <= config.max_length:
                examples.add(outcome)
                statistics.add(outcome)
            else:
                kind, reason = _drop(config, outcome)
                drops[kind] += 1
                dropped_rows.write(json.dumps({"id": outcome.id, "reason": reason}) + "\n")
        examples.close()
    if report.made != len(chosen):
        raise InputError(f"{config.data} changed while it was read: {len(chosen)} rows, then {report.made}; run again")
    counts = {"read": report.made + report.rejected, "kept": len(statistics.tokens)}
    counts |= {"rejected": report.rejected + drops["rejected"], "too_long": drops["too_long"]}
    counts |= {"left_out": int((~chosen).sum())}
    if not counts["kept"]:
        raise InputError(f"{config.data}: no row is left ({_in_words(counts)})")
    with rejects.open("ab") as end, dropped.open("rb") as lines:  # the reader wrote its own rejects until now
        shutil.copyfileobj(lines, end)
    dropped.unlink()
    np.save(partial / store.LENGTHS, statistics.lengths())
    manifest = {
        "format": store.FORMAT,
        "stage": config.stage,
        "target": "prompt" if config.stage == "grpo" else config.target,
        "fingerprint": tokenizer.fingerprint,
        "prompt": prompt and {"name": prompt.name, "sha256": prompt.digest},
        "config": dataclasses.asdict(config),
        "counts": counts,
        **statistics.summary(),
        "files": writer.flush_and_hash(partial),
    }
    (partial / store.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _locate_sources(config: PrepareConfig) -> list[Path]:
    """Find the data, and check by the first row of each source that pairs come with a prompt and rendered rows not."""
    paths = [locate(path) for path in ([config.data] if isinstance(config.data, str) else config.data)]
    for row in map(first_row, paths):
        if config.prompt is not None and is_rendered(row):
            raise InputError(f"{row.place}: these rows are rendered already; leave `prompt` out")
        if config.prompt is None and not is_rendered(row):
            raise InputError(
                f"{row.place}: no rendered row (context_messages, winner), it has {', '.join(map(repr, row.value))}; "
                "for pairs set `prompt` (cor, reasoning, or a prompt file)"
            )
    return paths


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose(total: int, limit: int | None, seed: int) -> np.ndarray:
    """[total] bool: the rows that are taken."""
    chosen = np.ones(total, bool)
    if limit is not None and limit < total:
        chosen[:] = False
        chosen[np.random.default_rng(seed).choice(total, limit, replace=False)] = True
    return chosen


def _drop(config: PrepareConfig, outcome: Example | Refused) -> tuple[str, str]:
    """Return under which count a row is left out and why, or raise InputError where the config does not allow it."""
    if isinstance(outcome, Refused):
        if config.on_bad_row == "error":
            raise InputError(f"{config.data}: {outcome.reason}; set on_bad_row=quarantine to go on without such rows")
        return "rejected", outcome.reason
    if config.on_too_long == "error":
        raise InputError(
            f"{config.data}: row {outcome.id} has {len(outcome)} tokens, more than max_length={config.max_length}; "
            "raise max_length, or set on_too_long=drop"
        )
    return "too_long", f"longer than max_length={config.max_length}: {len(outcome)} tokens"
