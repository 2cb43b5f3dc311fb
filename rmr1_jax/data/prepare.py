"""`rmr1 data prepare`: tokenize rows once, in parallel, into a prepared set that training reads.

The rows are read twice. The first pass only validates and counts them, so that a bad row is reported now and not after
an hour; in the second, processes tokenize them in order and this process writes the examples as they arrive. Memory
grows only by the row ids, about 100 bytes each, which detect duplicates.

Next: `store.py`, which describes, writes and reads the directory; `examples.py`, which tokenizes a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import JsonValue, NonNegativeInt, PositiveInt
from tqdm import tqdm

from rmr1_jax.config import config_dataclass
from rmr1_jax.data import store
from rmr1_jax.data.examples import Example, Stage, Target, load_tokenizer, make_example, read_training_rows
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.append import lock_for_writing
from rmr1_jax.files.hub import locate
from rmr1_jax.files.write import hash_written, writing
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.pairs.rows import ReadReport
from rmr1_jax.pairs.training_sets import PublishedRow
from rmr1_jax.prompts.prompt import PROMPT_FILE, get_prompt, save_prompt

CHUNK = 64  # rows a process takes at a time
NO_RIGHT_SIDE = {  # pairs that are dropped and counted, whatever the config says about bad rows
    "ties": "the pair is a tie: no side is right",
    "identical_answers": "the two answers are the same: no side is right",
}


@config_dataclass
class PrepareConfig:
    """The settings of `rmr1 data prepare`. Lengths are in tokens."""

    model: str
    """Model whose tokenizer and chat template are used: a directory or hub id."""
    chat_template_kwargs: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false} for Qwen3."""
    data: str | tuple[str, ...]
    """Files, folders or hub ids of rendered rows (context_messages, winner); or, with `prompt`, one of pairs."""
    out: str
    """Directory to write."""
    prompt: str | None = None
    """Prompt that renders pairs: cor, reasoning, compare, rubric, or a prompt file. null: the rows are rendered."""
    stage: Stage = "sft"
    """Stage that trains on the set."""
    target: Target = "trace"
    """What SFT trains: the row's trace, or only the right verdict."""
    max_length: PositiveInt = 12288
    """Maximum length of an example."""
    on_too_long: Literal["error", "drop"] = "error"
    """If an example is longer: an error, or drop it."""
    on_bad_row: Literal["error", "quarantine"] = "error"
    """If a row cannot be read: an error, or move it to rejects.jsonl."""
    limit: PositiveInt | None = None
    """Most rows to take, drawn by `seed` before long examples are dropped. null: all."""
    seed: NonNegativeInt = 0
    """Seed of the draw, and of the order of chosen and rejected answers."""
    workers: PositiveInt | None = None
    """Number of processes. null: one for each core."""

    def __post_init__(self):
        if not self.data:
            raise InputError("data names no rows; give a file, a folder or a hub id")
        if self.prompt is None:
            return
        if not isinstance(self.data, str):
            raise InputError("data: a prompt renders one file or folder of pairs; `rmr1 data mix` makes one of several")
        if (self.stage, self.target) == ("sft", "trace"):
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
            tokenizer = load_tokenizer(config.model, config.chat_template_kwargs)
            with writing(out, then="make room, then run the same command again"):
                shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
                (partial / store.ROWS).mkdir(parents=True)
                manifest = _write_set(config, tokenizer, partial)
                store.PreparedExamples(partial)  # check that it opens before it is published
                store.publish(partial, out)
        except BrokenProcessPool as e:
            raise RunError("a worker process was killed, perhaps for memory; run again with fewer workers") from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)
    return manifest


def summary_line(manifest: Mapping[str, Any]) -> str:
    """Describe a set in a line. The counts of rows add up: read is the sum of the others."""
    tokens, trained = (manifest["lengths"].get(kind, {"sum": 0})["sum"] for kind in ("tokens", "trained"))
    return f"rows: {_in_words(manifest['counts'])}; tokens: {tokens}, {trained} of them trained"


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _write_set(config: PrepareConfig, tokenizer: Tokenizer, partial: Path) -> dict[str, Any]:
    """Write all files of the set into the directory `partial`, and return its manifest."""
    prompt = None if config.prompt is None else get_prompt(config.prompt)
    paths = [locate(path) for path in ([config.data] if isinstance(config.data, str) else config.data)]
    rejects = partial / store.REJECTS
    bad_rows = rejects if config.on_bad_row == "quarantine" else None
    rows = functools.partial(read_training_rows, paths, prompt, seed=config.seed, rejects=bad_rows)
    total, sampled = 0, []
    for total, row in enumerate(rows(), 1):
        sampled += [row.messages] if prompt is None and store.is_sampled(total - 1) else []
    if own := prompt or store.common_prompt(sampled):
        save_prompt(own, partial / PROMPT_FILE)
    count = min(config.limit or total, total)
    chosen = np.isin(np.arange(total), np.random.default_rng(config.seed).choice(total, count, replace=False))
    report, examples, drops = ReadReport(), store.SetWriter(partial / store.ROWS), Counter()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, -(-count // CHUNK) or 1)
    outcomes = _tokenize(config, tokenizer, itertools.compress(rows(report=report), chosen), workers)
    every = 0.1 if sys.stderr.isatty() else 30.0  # in a log file, a line every half minute
    with (
        contextlib.closing(outcomes),
        tqdm(outcomes, "prepare", count, unit="row", dynamic_ncols=True, mininterval=every) as bar,
        tempfile.TemporaryFile(dir=partial) as dropped,  # the reader writes its own rejects until the last row
    ):
        for outcome in bar:
            if isinstance(outcome, Example):
                examples.add(outcome)
            else:
                drops[outcome.kind] += 1
                dropped.write(json.dumps({"id": outcome.id, "reason": outcome.reason}).encode() + b"\n")
        examples.flush(last=True)
        dropped.seek(0)
        with rejects.open("ab") as end:
            shutil.copyfileobj(dropped, end)
    if report.made != total:
        raise InputError(f"{config.data} changed while it was read: {total} rows, then {report.made}; run again")
    counts = {
        "read": report.made + report.rejected,
        "kept": len(examples.tokens),
        "rejected": report.rejected + drops["rejected"],
        "too_long": drops["too_long"],
        "left_out": total - count,
        **{kind: drops[kind] for kind in NO_RIGHT_SIDE if drops[kind]},
    }
    if not counts["kept"]:
        raise InputError(f"{config.data}: no row is left ({_in_words(counts)})")
    np.save(partial / store.LENGTHS, examples.lengths())
    manifest = {
        "format": store.FORMAT,
        "stage": config.stage,
        "target": "prompt" if config.stage == "grpo" else config.target,
        "fingerprint": tokenizer.fingerprint,
        "prompt": prompt and {"name": prompt.name, "sha256": prompt.digest},
        "config": dataclasses.asdict(config),
        "counts": counts,
        **examples.summary(),
        "files": {str(p.relative_to(partial)): hash_written(p) for p in sorted(partial.rglob("*")) if p.is_file()},
    }
    (partial / store.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


class Dropped(NamedTuple):
    """A row that is left out. kind: the count it belongs to, "rejected", "too_long" or a key of `NO_RIGHT_SIDE`."""

    id: str
    kind: str
    reason: str


def _tokenize(
    config: PrepareConfig, tokenizer: Tokenizer, rows: Iterator[PublishedRow], workers: int
) -> Iterator[Example | Dropped]:
    """Make an example of each row, in order. With several workers, a few chunks a worker are in memory at any time.
    Close the iterator to stop the processes. Raises BrokenProcessPool if one was killed."""
    if workers == 1:
        yield from (_make(config, tokenizer, row) for row in rows)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads is unsafe
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        pending = deque()
        try:
            while chunk := list(itertools.islice(rows, CHUNK)):
                pending.append(pool.submit(_make_chunk, config, str(tokenizer.directory), chunk))
                if len(pending) >= 4 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _make(config: PrepareConfig, tokenizer: Tokenizer, row: PublishedRow) -> Example | Dropped:
    """Raises InputError for a row that the config does not allow to drop."""
    if row.no_right_side:
        return Dropped(row.id, row.no_right_side, NO_RIGHT_SIDE[row.no_right_side])
    try:
        example = make_example(tokenizer, row, config.stage, config.target)
    except InputError as e:
        if config.on_bad_row == "error":
            raise InputError(f"{config.data}: {e}; set on_bad_row=quarantine to go on without such rows") from e
        return Dropped(row.id, "rejected", str(e))
    if len(example) <= config.max_length:
        return example
    if config.on_too_long == "error":
        raise InputError(
            f"{config.data}: row {row.id} has {len(example)} tokens, more than max_length={config.max_length}; "
            "raise max_length, or set on_too_long=drop"
        )
    return Dropped(row.id, "too_long", f"longer than max_length={config.max_length}: {len(example)} tokens")


def _make_chunk(config: PrepareConfig, directory: str, rows: list[PublishedRow]) -> list[Example | Dropped]:
    tokenizer = _load_once(directory, json.dumps(config.chat_template_kwargs))
    return [_make(config, tokenizer, row) for row in rows]


@functools.cache
def _load_once(directory: str, chat_template_kwargs: str) -> Tokenizer:
    """The tokenizer of a worker process; the arguments are JSON."""
    return Tokenizer(directory, json.loads(chat_template_kwargs))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and stops this process

    def exit_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # otherwise a worker would wait forever for a parent that was killed

    threading.Thread(target=exit_with_parent, daemon=True).start()
