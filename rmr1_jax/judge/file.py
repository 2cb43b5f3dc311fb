"""Judge a file of pairs into a file of verdicts, and go on where a killed run stopped: nothing lost, nothing twice.

Rows are appended as they are made, so in the order in which the judge finishes; when all are there they are put in the
order of the pairs. A killed run loses none; where the machine itself goes down, it may lose those of its last second. A
side file holds the settings they were made with, so that a run with others cannot continue them unnoticed.

What a run gives does not depend on whether it was killed. A text depends on its prompt, its number and the seed, but
the last bits of a matrix product depend on what is computed with it; a batch that was cut is therefore judged whole
again, and what it had already written is left as it stands.

Next: `judge.py`, which judges; `data/preferences.py`, which reads the pairs; `data/appending.py`, which writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rmr1_jax.errors import InputError
from rmr1_jax.files.append import append_rows, lock_for_writing, resume_rows
from rmr1_jax.files.write import write_whole
from rmr1_jax.judge.judgement import STATUSES, AnyJudge, Judgement
from rmr1_jax.pairs.pair import PreferencePair

__all__ = [
    "Outcome",
    "Summary",
    "judge_file",
    "judgement_row",
    "put_in_order",
    "summarize",
    "verdict_row",
]

SYNC_SECONDS = 1.0  # rows outlive the process as soon as they are written, and the machine after that long


RowOf = Callable[[PreferencePair, Judgement], dict[str, Any]]


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


def verdict_row(pair: PreferencePair, judgement: Judgement) -> dict[str, Any]:
    """The row of `rmr1 judge`: `id`, `winner`, `status`, `votes`, `text`; `correct` where the better answer is known;
    `note` where there is one."""
    row = {"id": pair.id} | {k: getattr(judgement, k) for k in ("winner", "status", "votes", "text")}
    if pair.better is not None:
        row["correct"] = judgement.winner == pair.better
    return row | ({"note": judgement.note} if judgement.note else {})


def judgement_row(pair: PreferencePair, judgement: Judgement) -> dict[str, Any]:
    """The row of `rmr1 eval`: all that there is to know of one judgement, for scores, logs and the report.

    id, better, winner, status, correct, votes; question, response_a, response_b, or conversation_a, conversation_b
    (message lists), as shown first; meta: the pair's; kind: of the trace; texts, verdicts, tokens: by order, then by
    vote; scores: [a, b] of a judge that gives scores; note where there is one.
    """
    row: dict[str, Any] = {"id": pair.id, "better": pair.better}
    row |= {"winner": judgement.winner, "status": judgement.status, "correct": judgement.winner == pair.better}
    row["votes"] = dict(judgement.votes)
    if pair.single_turn:
        row |= {"question": pair.question, "response_a": pair.response_a, "response_b": pair.response_b}
    else:
        for side in ("conversation_a", "conversation_b"):
            row[side] = [message._asdict() for message in getattr(pair, side)]
    row |= {"meta": dict(pair.meta), "kind": judgement.trace.kind}
    row |= {name: [list(own) for own in getattr(judgement, name)] for name in ("texts", "verdicts", "tokens")}
    if judgement.scores is not None:
        row["scores"] = list(judgement.scores)
    return row | ({"note": judgement.note} if judgement.note else {})


def judge_file(
    judge: AnyJudge,
    pairs: Iterable[PreferencePair],
    output: str | Path,
    *,
    votes: int = 1,
    both_orders: bool = False,
    seed: int = 0,
    batch_size: int = 1024,
    total: int | None = None,
    identity: Mapping[str, Any] | None = None,
    row_of: RowOf = verdict_row,
    command: str = "rmr1 judge",
) -> Summary:
    """Judge pairs into a JSONL file, one row a pair; go on where an earlier run of the same call stopped.

    A row is written as soon as its judgement is made; in the end the rows are in the order of the pairs. `output` +
    ".run.json" holds the settings they were made with.

    Args:
        batch_size: pairs that are handed to the judge at a time. Memory holds that many, whatever there is in all; at
            the end of each, slots wait for its longest text.
        total: of the progress bar.
        identity: what else must be the same to go on, such as which model and which input it is.
        row_of: what is written of a pair; it has at least `id`, `status`, `correct`. command: that errors name.

    Raises:
        InputError: `output` was made with other settings, is not such a file, or is being written by another run; two
            pairs have the same id.
        RunError: the disk refuses a row. What was written before stands.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    output = Path(output)
    settings = {**(identity or {}), **judge.settings(votes, both_orders, seed)}
    seen: dict[str, int] = {}
    synced = time.monotonic()
    with lock_for_writing(output), tqdm(total=total, desc="judge", unit="pair", dynamic_ncols=True) as bar:
        done = _take_up(output, settings, command)
        for batch in _batches(_numbered(pairs, seen, output), batch_size):
            missing = [pair for pair in batch if pair.id not in done]
            asked = batch if missing and judge.whole_batches else missing
            bar.update(len(batch) - len(asked))
            if not asked:
                continue
            for number, judgement in judge.stream(asked, votes, both_orders, seed):
                bar.update()
                if asked[number].id not in done:
                    row = row_of(asked[number], judgement)
                    synced = _append(output, row, synced)
                    done[row["id"]] = _outcome(row)
            append_rows(output, [])
        if done.keys() == seen.keys():
            put_in_order(output, lambda row: seen[row["id"]])
    return summarize(done.values())


def _numbered(pairs: Iterable[PreferencePair], seen: dict[str, int], output: Path) -> Iterator[PreferencePair]:
    """The pairs, each noted in `seen` with its number."""
    for pair in pairs:
        if pair.id in seen:
            raise InputError(f"two pairs have the id {pair.id!r}; ids must differ to be told apart in {output}")
        seen[pair.id] = len(seen)
        yield pair


def _append(output: Path, row: Mapping[str, Any], synced: float) -> float:
    """Write a row; `synced`, and what is returned, is when the disk was last waited for."""
    now = time.monotonic()
    sync = now - synced >= SYNC_SECONDS
    append_rows(output, [row], sync=sync)
    return now if sync else synced


def put_in_order(path: Path, number: Callable[[dict[str, Any]], int]) -> None:
    """Rewrite a JSONL file in the order of its rows' numbers. Memory holds two integers a row."""
    numbers, offsets = array("q"), array("q")
    with path.open("rb") as file:
        offset = 0
        for line in file:
            numbers.append(number(json.loads(line)))
            offsets.append(offset)
            offset += len(line)
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        if order == list(range(len(order))):
            return

        def lines() -> Iterator[str]:
            for k in order:
                file.seek(offsets[k])
                yield file.readline().decode()

        write_whole(path, lines())


def summarize(outcomes: Iterable[Outcome]) -> Summary:
    """The counts of outcomes."""
    outcomes = list(outcomes)
    by_status = {status: sum(outcome.status == status for outcome in outcomes) for status in STATUSES}
    known = [outcome.correct for outcome in outcomes if outcome.correct is not None]
    return Summary(**by_status, known=len(known), correct=sum(known))


def _outcome(row: Mapping[str, Any]) -> Outcome:
    return Outcome(row["status"], row.get("correct"))


def _batches(pairs: Iterable[PreferencePair], size: int) -> Iterator[list[PreferencePair]]:
    rest = iter(pairs)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _take_up(output: Path, settings: Mapping[str, Any], command: str) -> dict[str, Outcome]:
    """The outcomes that `output` holds, by id."""
    done: dict[str, Outcome] = {}

    def parse(row: Mapping[str, Any]) -> None:
        if row["id"] in done:
            raise ValueError(f"id {row['id']!r} for the second time")
        if row["status"] not in STATUSES:
            raise ValueError(f"status {row['status']!r}")
        done[row["id"]] = _outcome(row)

    resume_rows(output, settings, parse, command=command)
    return done
