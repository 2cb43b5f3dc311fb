"""Judge a file of pairs into a file of verdicts, and go on where a killed run stopped: nothing lost, nothing twice.

Rows are appended batch by batch, in the order of the pairs, and are on the disk before the next batch begins. A side
file holds the settings they were made with, so that a run with others cannot continue them unnoticed.

Next: `judge.py`, which judges; `data/preferences.py`, which reads the pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rmr1_jax.config import config_differences
from rmr1_jax.data.preferences import PreferencePair
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.judge import STATUSES, Judge, Judgement


class Outcome(NamedTuple):
    """What is kept of a row once it is written. correct: None where the better answer is not known."""

    status: str
    correct: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts over all rows of a verdicts file. known: rows whose better answer is known; correct: of these. A tie, an
    invalid and a too long one are not correct."""

    ok: int
    tie: int
    invalid: int
    too_long: int
    known: int
    correct: int

    @property
    def pairs(self) -> int:
        return self.ok + self.tie + self.invalid + self.too_long

    def __str__(self) -> str:
        if not self.pairs:
            return "no pairs"
        shares = [f"{getattr(self, s) / self.pairs:.1%} {s.replace('_', ' ')}" for s in STATUSES]
        known = f"{self.correct / self.known:.1%} of {self.known}" if self.known else "not known"
        return f"{self.pairs} pairs: {', '.join(shares)}; accuracy {known}"


def judge_file(
    judge: Judge,
    pairs: Iterable[PreferencePair],
    output: str | Path,
    *,
    votes: int = 1,
    both_orders: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    total: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Summary:
    """Judge pairs into a JSONL file, one row a pair, in order; go on where an earlier run of the same call stopped.

    A row has `id`, `winner`, `status`, `votes`, `text`; `correct` where the better answer is known; `note` where there
    is one. Rows reach the disk after each batch. `output` + ".run.json" holds the settings they were made with.

    Args:
        batch_size: pairs judged, and rows written, at a time. total: of the progress bar.
        identity: what else must be the same to go on, such as which model and which input it is.

    Raises:
        InputError: `output` was made with other settings, or is not such a file; two pairs have the same id.
        RunError: the disk refuses a row. What was written before stands.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    output = Path(output)
    settings = {**(identity or {}), **judge.settings(votes, both_orders, seed)}
    done = _take_up(output, settings)
    seen: set[str] = set()
    with tqdm(total=total, desc="judge", unit="pair", dynamic_ncols=True) as bar:
        for batch in _batches(pairs, batch_size):
            for pair in batch:
                if pair.id in seen:
                    raise InputError(f"two pairs have the id {pair.id!r}; ids must differ to be told apart in {output}")
                seen.add(pair.id)
            if all(pair.id in done for pair in batch):
                bar.update(len(batch))
                continue
            # A batch that was half written is judged whole again: the same shapes give the same bits.
            judgements = judge.compare_many(batch, votes, both_orders, seed, on_done=bar.update)
            rows = [_row(pair, judgement) for pair, judgement in zip(batch, judgements, strict=True)]
            rows = [row for row in rows if row["id"] not in done]
            _append(output, rows)
            done |= {row["id"]: _outcome(row) for row in rows}
    return summarize(done.values())


def summarize(outcomes: Iterable[Outcome]) -> Summary:
    """The counts of outcomes."""
    outcomes = list(outcomes)
    by_status = {status: sum(outcome.status == status for outcome in outcomes) for status in STATUSES}
    known = [outcome.correct for outcome in outcomes if outcome.correct is not None]
    return Summary(**by_status, known=len(known), correct=sum(known))


def files_digest(files: Iterable[Path]) -> str:
    """A short hash of files for `identity`: it tells a retrained model or an edited input from the one before.

    It reads names, sizes and up to 256 blocks of 4 KiB spread evenly over each file, so it takes no time for weights.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(4096, size // 256)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def _row(pair: PreferencePair, judgement: Judgement) -> dict[str, Any]:
    row = {"id": pair.id} | {k: getattr(judgement, k) for k in ("winner", "status", "votes", "text")}
    if pair.better is not None:
        row["correct"] = judgement.winner == pair.better
    return row | ({"note": judgement.note} if judgement.note else {})


def _outcome(row: Mapping[str, Any]) -> Outcome:
    return Outcome(row["status"], row.get("correct"))


def _batches(pairs: Iterable[PreferencePair], size: int) -> Iterator[list[PreferencePair]]:
    rest = iter(pairs)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _take_up(output: Path, settings: Mapping[str, Any]) -> dict[str, Outcome]:
    """The outcomes that `output` holds, by id. Half a row at its end, left by a killed run, is cut off.

    Nothing is touched unless `output` is new, or was made with these settings.
    """
    side = output.with_name(output.name + ".run.json")
    settings = json.loads(json.dumps(settings))  # as it will be read back
    try:
        size = output.stat().st_size if output.exists() else 0
        if size and not side.is_file():
            raise InputError(
                f"{output} is there, but not {side.name} beside it, which says how it was made; give another output"
            )
        done, whole = _read_verdicts(output) if size else ({}, 0)
        if done:
            _refuse_changes(output, side, settings)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(side, json.dumps(settings, indent=2) + "\n")
        if whole < size:
            os.truncate(output, whole)
    except OSError as e:
        raise InputError(f"{e.filename or output}: {e.strerror}; give an output that can be read and written") from e
    return done


def _read_verdicts(output: Path) -> tuple[dict[str, Outcome], int]:
    """The outcomes by id, and how many bytes the whole lines take."""
    done: dict[str, Outcome] = {}
    whole = 0
    with output.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                if row["id"] in done:
                    raise ValueError(f"id {row['id']!r} for the second time")
                if row["status"] not in STATUSES:
                    raise ValueError(f"status {row['status']!r}")
                done[row["id"]] = _outcome(row)
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(
                    f"{output}:{number}: not a row of `rmr1 judge` ({e}); remove the line, or give another output"
                ) from e
            whole += len(line)
    return done, whole


def _refuse_changes(output: Path, side: Path, settings: Mapping[str, Any]) -> None:
    try:
        old = json.loads(side.read_bytes())
        changed = config_differences(old, settings)
    except (ValueError, AttributeError) as e:
        raise InputError(f"{side}: not the settings that `rmr1 judge` wrote ({e}); give another output") from e
    if changed:
        listed = "; ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise InputError(f"{output} was made with other settings ({listed}); give another output, or remove it")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _append(output: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        with output.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise RunError(f"{output}: {e.strerror}; the rows written so far stand, run the same command again") from e
