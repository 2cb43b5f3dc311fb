"""Judge pairs into a JSONL file, and continue where a killed run stopped: no row is lost and none is made twice.

Rows are appended as they are made, in the order in which the judge finishes; once all are there, they are put in the
order of the pairs. A killed process loses no row; a machine that goes down may lose those of its last second. The
file's path with ".run.json" added holds the settings, so that a run with other settings cannot continue it unnoticed.

The result does not depend on whether a run was killed. A text depends on its prompt, its number and the seed, but the
last bits of a matrix product depend on the other rows in it. A batch that was interrupted is therefore judged again as
a whole, and the rows that it had written already are kept.

Of n processes, process i judges the items i, i + n, i + 2n, ..., by itself. An item is a pair, or the pairs of a
benchmark's item, which share their answers. A run may be continued by another number of processes; then the last bits
may differ too.

Next: `pairs/read.py`, which reads the pairs; `rows.py`, the rows; `distributed/rows.py`, which writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rmr1_jax.distributed.exchange import from_first, gather, this_process
from rmr1_jax.distributed.rows import SharedRows
from rmr1_jax.distributed.terminal import bar as progress_bar
from rmr1_jax.errors import InputError
from rmr1_jax.files.write import write_whole
from rmr1_jax.judge.judgement import AnyJudge, Judgement, Voting
from rmr1_jax.judge.rows import verdict_row
from rmr1_jax.judge.summary import Outcome, Summary
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.reply import Unanswered

SYNC_SECONDS = 1.0  # rows survive the process as soon as they are written, and the machine after at most this time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The file that a run writes.

    identity: what must be the same to continue the file besides the judge's settings, such as the model and the input.
    row_of: makes the row of a pair, which has at least `id`, `status` and, if known, `correct`. command: the command
    that errors name.
    """

    path: Path
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    row_of: Callable[[PreferencePair, Judgement], dict[str, Any]] = verdict_row
    command: str = "rmr1 judge"


def judge_file(
    judge: AnyJudge,
    pairs: Iterable[PreferencePair],
    output: Output,
    voting: Voting | None = None,
    *,
    batch_size: int = 1024,
    total: int | None = None,
) -> Summary:
    """Judge pairs into a JSONL file, one row a pair; continue where an earlier run of the same call stopped.

    In a run of several processes all call it with the same arguments, and each judges its share of the pairs.

    Args:
        voting: default: one vote, one order.
        batch_size: pairs that are given to the judges of all processes at a time, and held in memory. At the end of
            each batch, slots wait for its longest text.
        total: number of pairs, for the progress bar.

    Raises:
        InputError: the file was made with other settings, is not such a file, or is being written by another run; two
            pairs have the same id; the processes do not share the file's directory.
        RunError: a row cannot be written. The rows before it are kept. Unanswered: pairs without a judgement, after all
            others have their rows.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    voting = voting or Voting()
    index, count = this_process()
    done: dict[str, Outcome] = {}
    seen: dict[str, int] = {}
    unanswered: list[Unanswered] = []
    rows = _shared_rows(output, {**output.identity, **judge.settings(voting)}, done)
    title, own_total = "judge" if count == 1 else f"judge, process 0 of {count}", total and -(-total // count)
    with rows.open(), progress_bar(title, total=own_total, unit="pair") as bar:
        synced = time.monotonic()
        own = _own_items(_numbered(pairs, seen, output.path), index, count)
        while batch := list(itertools.islice(own, -(-batch_size // count))):
            missing = [pair for pair in batch if pair.id not in done]
            asked = batch if missing and judge.whole_batches else missing
            bar.update(len(batch) - len(asked))
            if not asked:
                continue
            try:
                for number, judgement in judge.stream(asked, voting):
                    bar.update()
                    if asked[number].id not in done:
                        sync = time.monotonic() - synced >= SYNC_SECONDS
                        rows.append(output.row_of(asked[number], judgement), sync=sync)
                        synced = time.monotonic() if sync else synced
            except Unanswered as e:  # the batches after this one are judged all the same
                unanswered.append(e)
            rows.append()  # wait for the disk

        bar.set_postfix_str("waiting for the other processes" * (count > 1))
        summary = rows.finish(functools.partial(_finish, output.path, done, seen))
    all_unanswered = itertools.chain.from_iterable(gather(unanswered))
    from_first(functools.partial(Unanswered.check, all_unanswered))
    return summary


def _finish(path: Path, done: Mapping[str, Outcome], seen: Mapping[str, int]) -> Summary:
    """Put the rows in the order of the pairs, if all are there, and count them."""
    if done.keys() == seen.keys():
        put_in_order(path, lambda row: seen[row["id"]])
    return Summary.of(done.values())


def put_in_order(path: Path, number: Callable[[dict[str, Any]], int]) -> None:
    """Sort the rows of a JSONL file by `number`. Memory holds two integers a row."""
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


def _numbered(pairs: Iterable[PreferencePair], seen: dict[str, int], output: Path) -> Iterator[PreferencePair]:
    """The pairs; each one's id is added to `seen` with its number."""
    for pair in pairs:
        if pair.id in seen:
            raise InputError(f"two pairs have the id {pair.id!r}; each pair needs an id of its own in {output}")
        seen[pair.id] = len(seen)
        yield pair


def _own_items(pairs: Iterable[PreferencePair], index: int, count: int) -> Iterator[PreferencePair]:
    """The pairs of the items index, index + count, ...; all pairs are read."""
    items = itertools.groupby(pairs, key=lambda pair: pair.meta.get("item", pair.id))
    for _, own in itertools.islice(items, index, None, count):
        yield from own


def _shared_rows(output: Output, settings: Mapping[str, Any], done: dict[str, Outcome]) -> SharedRows:
    """The file of rows. The outcome of each row is added to `done` by its id."""

    def parse(row: Mapping[str, Any]) -> tuple[str, Outcome]:
        return row["id"], Outcome.of(row)

    def add(found: tuple[str, Outcome]) -> None:
        if found[0] in done:
            raise ValueError(f"id {found[0]!r} for the second time")
        done.update([found])

    key = operator.itemgetter(0)
    return SharedRows(output.path, settings, parse=parse, add=add, key=key, command=output.command)
