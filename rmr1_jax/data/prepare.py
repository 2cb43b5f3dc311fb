"""`rmr1 data prepare`: rows -> token ids and masks, once, in parallel, into a prepared set that training reads.

Rows are read twice: the first time only to see that they are good and how many there are, so that a bad one shows now
and not after an hour. Then processes tokenise them in chunks, in order, and this one writes them as they come; memory
does not grow with the rows, but for 100 bytes each that tell a repeated id. All is written into a directory beside the
output, which takes its name when it is whole and on the disk.

Next: `data/store.py`, which says what the directory holds and reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from tqdm import tqdm

from rmr1_jax.config import check_least
from rmr1_jax.data import store
from rmr1_jax.data.examples import Example, make_example
from rmr1_jax.data.store import Tally
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.append import alone
from rmr1_jax.files.hub import locate
from rmr1_jax.files.write import writing
from rmr1_jax.model.tokenizer import TOKENIZER_FILES, Tokenizer
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import ReadReport, Row, read_rows
from rmr1_jax.pairs.training_sets import PublishedRow, read_published
from rmr1_jax.prompts.cor import get_prompt
from rmr1_jax.prompts.prompt import Prompt

CHUNK = 64  # rows a process takes at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """A prepared set. Lengths are in tokens.

    model: whose tokenizer and chat template; a directory or hub id. data: rendered rows (`context_messages`, `winner`),
    files, folders or hub ids; or, with `prompt` (cor, reasoning, a prompt file), pairs. target: what SFT learns, the
    row's trace or, for "verdict", the right answer alone. max_length: of a prompt with what follows it in the row.
    on_too_long: error or drop. on_bad_row: error, or quarantine (into rejects.jsonl). limit: rows to take at most,
    drawn by `seed` before the too long ones are dropped. workers: processes, default one a core.
    """

    model: str
    data: str | tuple[str, ...]
    out: str
    prompt: str | None = None
    stage: Literal["sft", "grpo"] = "sft"
    target: Literal["trace", "verdict"] = "trace"
    max_length: int = 12288
    on_too_long: Literal["error", "drop"] = "error"
    on_bad_row: Literal["error", "quarantine"] = "error"
    limit: int | None = None
    seed: int = 0
    workers: int | None = None

    def __post_init__(self):
        check_least(self, 1, "max_length", "limit", "workers")
        check_least(self, 0, "seed")
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
    """Write the prepared set `config.out`, and return what its prepared.json holds.

    Raises:
        InputError: bad input, a row that is too long (on_too_long: error), `out` is there already, or another run is
            writing it. RunError: the disk is full, or a worker was killed. Nothing is left behind either way.
    """
    out = Path(config.out)
    partial, lock = (out.with_name(out.name + end) for end in (".partial", ".lock"))
    with alone(lock):
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise InputError(f"{out} is there already; remove it, or give another out")
            tokenizer = Tokenizer(locate(config.model, kind="model", patterns=TOKENIZER_FILES))
            with writing(out, then="make room, then run the same command again"):
                shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
                (partial / store.ROWS).mkdir(parents=True)
                manifest = _write(config, tokenizer, partial)
                store.PreparedExamples(partial)  # it opens, before it takes the place
                store.publish(partial, out)
        except BrokenProcessPool as e:
            raise RunError("a worker process was killed, perhaps for memory; run again with fewer workers") from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)
    return manifest


def summary_line(manifest: Mapping[str, Any]) -> str:
    """What was made, in a line: the counts reconcile, read = kept + rejected + too long + left out."""
    lengths = manifest["lengths"]
    trained = lengths["trained"]["sum"] if "trained" in lengths else 0
    return f"rows: {summary_of(manifest['counts'])}; tokens: {lengths['tokens']['sum']}, {trained} of them trained"


def summary_of(counts: Mapping[str, int]) -> str:
    """The counts in words."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _write(config: PrepareConfig, tokenizer: Tokenizer, partial: Path) -> dict[str, Any]:
    """All files of the set, into the directory `partial`; returns what its manifest holds."""
    prompt = None if config.prompt is None else get_prompt(config.prompt)
    rows = _source(config, prompt, partial / store.REJECTS)
    chosen = _choose(sum(1 for _ in rows(ReadReport())), config.limit, config.seed)
    report, tally = ReadReport(), Tally()
    work = _Tokenise(str(tokenizer.directory), str(tokenizer.fingerprint), config.stage, config.target, prompt)
    workers = min(config.workers or _cores(), -(-len(chosen) // CHUNK) or 1)
    every = 0.1 if sys.stderr.isatty() else 30.0  # where nobody watches (a log file), a line every half minute
    with (
        tqdm(total=int(chosen.sum()), desc="prepare", unit="row", dynamic_ncols=True, mininterval=every) as bar,
        (partial / "dropped").open("w", encoding="utf-8") as dropped,
        contextlib.closing(_in_order(work, itertools.compress(rows(report), chosen), workers)) as outcomes,
    ):
        writer = store.RowsWriter(partial / store.ROWS)
        for outcome in outcomes:
            bar.update()
            if isinstance(outcome, Example) and len(outcome) <= config.max_length:
                writer.add(outcome)
                tally.add(outcome)
            else:
                _drop(config, outcome, dropped, tally)
        writer.close()
    if report.made != len(chosen):
        raise InputError(f"{config.data} changed while it was read: {len(chosen)} rows, then {report.made}; run again")
    counts = {"read": report.made + report.rejected, "kept": len(tally.tokens)}
    counts |= {"rejected": report.rejected + tally.drops["rejected"], "too_long": tally.drops["too_long"]}
    counts |= {"left_out": int((~chosen).sum())}
    if not counts["kept"]:
        raise InputError(f"{config.data}: no row is left ({summary_of(counts)})")
    with (partial / store.REJECTS).open("ab") as rejects, (partial / "dropped").open("rb") as dropped:
        shutil.copyfileobj(dropped, rejects)
    (partial / "dropped").unlink()
    np.save(partial / store.LENGTHS, np.asarray([tally.tokens, tally.prompts], np.int32))
    manifest = {
        "format": store.FORMAT,
        "stage": config.stage,
        "target": "prompt" if config.stage == "grpo" else config.target,
        "fingerprint": tokenizer.fingerprint,
        "prompt": prompt and {"name": prompt.name, "sha256": hashlib.sha256(repr(prompt).encode()).hexdigest()},
        "config": dataclasses.asdict(config),
        "counts": counts,
        **tally.summary(),
        "files": store.facts_of_files(partial),
    }
    (partial / store.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _source(
    config: PrepareConfig, prompt: Prompt | None, rejects: Path
) -> Callable[[ReadReport], Iterator[PublishedRow | PreferencePair]]:
    """What reads the rows, each time from the first on."""
    paths = [locate(path) for path in ([config.data] if isinstance(config.data, str) else config.data)]
    for path in paths:
        _check_kind(path, pairs=prompt is not None)
    reading = {"on_bad_row": config.on_bad_row, "rejects": rejects if config.on_bad_row == "quarantine" else None}
    if prompt is None:
        return lambda report: read_published(paths, report=report, **reading)
    return lambda report: read_pairs(paths[0], seed=config.seed, report=report, **reading)


def _check_kind(path: Path, *, pairs: bool) -> None:
    """Rendered rows need no prompt, and pairs need one: told by the first row, said before anything is read."""
    first = next((row for row in read_rows(path) if isinstance(row, Row)), None)
    if first is None:
        raise InputError(f"{path}: holds no rows")
    if pairs and "context_messages" in first.value:
        raise InputError(f"{first.place}: these rows are rendered already; leave `prompt` out")
    if not pairs and "context_messages" not in first.value:
        raise InputError(
            f"{first.place}: no rendered row (context_messages, winner), it has {', '.join(map(repr, first.value))}; "
            "for pairs set `prompt` (cor, reasoning, or a prompt file)"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose(total: int, limit: int | None, seed: int) -> np.ndarray:
    """[total] bool: which rows are taken."""
    chosen = np.ones(total, bool)
    if limit is not None and limit < total:
        chosen[:] = False
        chosen[np.random.default_rng(seed).choice(total, limit, replace=False)] = True
    return chosen


@dataclasses.dataclass(frozen=True)
class Refused:
    """A good row that cannot be an example of this set, and why."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Tokenise:
    """The work of one process: rows -> examples, or why not."""

    directory: str
    fingerprint: str
    stage: str
    target: str
    prompt: Prompt | None

    def __call__(self, rows: Sequence[PublishedRow | PreferencePair]) -> list[Example | Refused]:
        tokenizer = _tokenizer(self.directory, self.fingerprint)
        found: list[Example | Refused] = []
        for row in rows:
            try:
                found.append(make_example(tokenizer, row, self.stage, self.target, self.prompt))
            except InputError as e:
                found.append(Refused(row.id, str(e)))
        return found


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: str, fingerprint: str) -> Tokenizer:
    """One a process. The fingerprint is there so that an edited directory is read again."""
    return Tokenizer(directory)


def _in_order(
    work: Callable[[Sequence], list], rows: Iterable[PublishedRow | PreferencePair], workers: int
) -> Iterator[Example | Refused]:
    """What `work` makes of the rows, in their order; only a few chunks a worker are in memory at any time."""
    rows = iter(rows)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    if workers == 1:
        yield from itertools.chain.from_iterable(map(work, chunks))
        return
    # Spawned, not forked: the parent has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        pending = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(work, chunk))
                if len(pending) >= 4 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # else a worker would wait for ever for one that was killed

    threading.Thread(target=end_with_parent, daemon=True).start()


def _drop(config: PrepareConfig, outcome: Example | Refused, dropped: IO[str], tally: Tally) -> None:
    """A row that is not kept: an error, or a line of the rejects."""
    if isinstance(outcome, Refused):
        kind, reason = "rejected", outcome.reason
        if config.on_bad_row == "error":
            raise InputError(f"{config.data}: {reason}; set on_bad_row=quarantine to go on without such rows")
    else:
        kind, reason = "too_long", f"longer than max_length={config.max_length}: {len(outcome)} tokens"
        if config.on_too_long == "error":
            raise InputError(
                f"{config.data}: row {outcome.id} has {len(outcome)} tokens, more than max_length={config.max_length}; "
                "raise max_length, or set on_too_long=drop"
            )
    tally.drops[kind] += 1
    dropped.write(json.dumps({"id": outcome.id, "reason": reason}) + "\n")
