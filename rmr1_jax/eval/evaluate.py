"""A benchmark from its data to its scores: load, judge, write the published logs, score; or score logs that are there.

    OUT/judgements.jsonl      every judgement (`judge_file.judgement_row`), written when it is made; at the end the rows
                              are put in the order of the data
    OUT/summary.json          the scores, with intervals and what else there is to say (`summary.py`)
    OUT/reward_bench, RM-Bench, RMB, JudgeBench     logs and score files with the published names and keys

A killed run goes on where it stopped and gives the same files. All but judging needs no JAX.

Next: `rewardbench.py`, `rm_bench.py`, `rmb.py`, `judgebench.py`, which have the same functions each; `logs.py`;
`summary.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.eval import judgebench, rewardbench, rm_bench, rmb
from rmr1_jax.eval.logs import JUDGEMENTS, ArrayFiles, Judged, is_ours, read_judgements
from rmr1_jax.files.append import files_digest
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.judge.file import Summary, judge_file, judgement_row, put_in_order
from rmr1_jax.judge.judgement import AnyJudge, count_votes, read_verdicts, settle
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.rows import BadRow, Row, read_rows

BENCHMARKS = MappingProxyType({module.NAME: module for module in (rewardbench, rm_bench, rmb, judgebench)})


_MADE_BY = "rmr1 score"


def load(benchmark: str, data: Path, limit: int | None = None) -> Iterator[PreferencePair]:
    """The pairs of a benchmark, or those of `limit` of its items, spread evenly over the data set.

    An item is a row of the data: a pair, RM-Bench's nine, RMB's best-of-N. Which items are left out moves no A/B draw.
    """
    if limit is None:
        return BENCHMARKS[benchmark].load(data)
    if limit < 1:
        raise InputError(f"limit={limit} must be at least 1")
    total = sum(1 for _ in _items(benchmark, data))
    return (pair for k, own in enumerate(_items(benchmark, data)) if k * limit % total < limit for pair in own)


def _items(benchmark: str, data: Path) -> Iterator[Iterator[PreferencePair]]:
    pairs = BENCHMARKS[benchmark].load(data)
    return (own for _, own in itertools.groupby(pairs, key=lambda pair: pair.meta.get("item", pair.id)))


def evaluate(
    benchmark: str,
    judge: AnyJudge,
    data: Path,
    out: Path,
    *,
    name: str,
    votes: int = 1,
    both_orders: bool = False,
    seed: int = 0,
    batch_size: int = 1024,
    limit: int | None = None,
    total: int | None = None,
    identity: Mapping[str, Any] | None = None,
    cut: Callable[[str, int], str] | None = None,
) -> tuple[Summary, dict[str, Any]]:
    """Judge a benchmark and write all its files under `out`; go on where an earlier run of the same call stopped.

    Args:
        benchmark: one of `BENCHMARKS`. data: its file or folder. name: of the judge, in file names and the summary.
        limit: items to judge, for a look; see `load`. total: of the progress bar.
        votes, both_orders, seed, batch_size, identity: see `judge_file`.
        cut: (text, n) -> its first n tokens, for the token budgets of the summary.

    Returns the counts, and the published score files by path.
    """
    pairs, output = load(benchmark, data, limit), out / JUDGEMENTS
    counts = judge_file(
        judge,
        pairs,
        output,
        votes=votes,
        both_orders=both_orders,
        seed=seed,
        batch_size=batch_size,
        total=total,
        identity={"benchmark": benchmark, "judge": name, **(identity or {})},
        row_of=judgement_row,
        command="rmr1 eval",
    )
    module = BENCHMARKS[benchmark]
    put_in_order(output, lambda row: row["meta"]["number"])  # after a look, rows of other runs stand in it too
    with ArrayFiles(out) as files:
        module.write_logs(files, read_judgements(output), name)
    scores = module.score(module.record(row) for row in read_judgements(output))
    _write_scores(out, scores)
    _summarize(module, out, scores, judge=name, cut=cut)
    return counts, scores


def score_logs(
    benchmark: str, logs: Path, out: Path, *, compat: str | None = None, rule: str | None = None
) -> tuple[dict[str, Any], list[InputError]]:
    """Scores from logs alone: our judgements, or published logs, which become our judgements under `out`.

    Args:
        logs: a log file, or a folder with all of a run's.
        compat: "released" reproduces the released RM-Bench scorer's slip.
        rule: read the verdicts again from the texts, "eval" or "strict". Default: the results that the logs have.

    Returns the published score files by path, and the errors of the log files that could not be read: the others count.

    Raises:
        InputError: no log, none that can be read, or `out` holds judgements that `rmr1 eval` made.
    """
    module = BENCHMARKS[benchmark]
    paths = module.find_logs(logs)
    output = out / JUDGEMENTS
    failures: list[InputError] = []
    if [path.resolve() for path in paths] == [output.resolve()] and rule is None:
        records = [module.record(row) for row in _ours(benchmark, output)]
    else:
        records = _convert(benchmark, paths, output, rule, failures)
    try:
        scores = module.score(records, compat)
    except InputError as e:
        if not failures:
            raise _placed(logs, e) from e
        return {}, [*failures, InputError(f"no score without them: {e}")]
    _write_scores(out, scores)
    _summarize(module, out, scores, judge=_name_of(paths), slip=compat == "released")
    return scores, failures


def _convert(
    benchmark: str, paths: list[Path], output: Path, rule: str | None, failures: list[InputError]
) -> list[dict[str, Any]]:
    """Write the judgements of log files into one of ours; returns their records. Of a file that cannot be read nothing
    is kept, and its error goes into `failures`."""
    side = output.with_name(f"{JUDGEMENTS}.run.json")
    if output.exists() and _settings(side).get("made_by") != _MADE_BY:
        raise InputError(f"{output} holds judgements that `{_MADE_BY}` did not make; give another --out")
    records: list[dict[str, Any]] = []
    good: list[Path] = []
    partial = output.with_name(f"{JUDGEMENTS}.partial")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for path in paths:
                start, own = file.tell(), []
                try:
                    for row in _judgements(benchmark, path):
                        row = row if rule is None else _read_again(row, rule)
                        row["meta"].setdefault("number", len(records) + len(own))
                        file.write(json.dumps(row).encode() + b"\n")
                        own.append(BENCHMARKS[benchmark].record(row))
                except InputError as e:
                    failures.append(_placed(path, e))
                    file.seek(start)
                    file.truncate()
                else:
                    good.append(path)
                    records += own
        if not good:
            partial.unlink()
            raise failures[0]
        old = _settings(good[0].with_name(side.name)) if is_ours(good[0]) else {}
        told = {"rule": rule or old.get("rule", "eval"), "made_by": _MADE_BY}
        told |= {"logs": [path.name for path in good], "logs_sha256": files_digest(good)}
        write_whole(side, json.dumps({"benchmark": benchmark, **old, **told}, indent=2) + "\n")
        partial.replace(output)
    return records


def _placed(path: Path, error: InputError) -> InputError:
    """The error with the file that it is about."""
    return error if str(path) in str(error) else InputError(f"{path}: {error}")


def _judgements(benchmark: str, path: Path) -> Iterator[Judged]:
    """The judgements in a log file, ours or published."""
    if is_ours(path):
        return _ours(benchmark, path)
    return BENCHMARKS[benchmark].judgements_of(_good(read_rows(path)))


def _ours(benchmark: str, path: Path) -> Iterator[Judged]:
    for row in read_judgements(path):
        if row["meta"]["benchmark"] != benchmark:
            raise InputError(f"{path}: holds judgements of {row['meta']['benchmark']}, not of {benchmark}")
        yield row


def _good(rows: Iterator[Row | BadRow]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, BadRow):
            raise row
        yield row


def _read_again(row: Judged, rule: str) -> Judged:
    """The row with its texts' verdicts by another rule; one that has no texts stays."""
    if not row.get("texts"):
        return row
    verdicts = read_verdicts(row["texts"], rule)
    winner, status = settle(verdicts)
    votes = count_votes(list(itertools.chain(*verdicts)))
    told = {"winner": winner, "status": status, "correct": winner == row["better"], "votes": votes}
    return {**row, **told, "verdicts": verdicts}


def _write_scores(out: Path, scores: Mapping[str, Any]) -> None:
    for name, content in scores.items():
        with writing(out / name):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, json.dumps(content, indent=1))


def _summarize(module: Any, out: Path, scores: Mapping[str, Any], **options: Any) -> None:
    from rmr1_jax.eval.summary import write_summary

    write_summary(out, scores[module.SCORE], **options)


def _settings(side: Path) -> dict[str, Any]:
    """What a side file holds; nothing where there is none."""
    try:
        found = json.loads(side.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _name_of(paths: list[Path]) -> str:
    """The judge that made the logs, where they say."""
    told = _settings(paths[0].with_name(f"{JUDGEMENTS}.run.json")).get("judge")
    return str(told or paths[0].resolve().parent.name)
