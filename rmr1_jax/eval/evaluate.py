"""Run a benchmark: load its pairs, judge them, write the published logs, compute the scores; or score existing logs.

    OUT/judgements.jsonl      every judgement (`judge/rows.judgement_row`), written as it is made; at the end the rows
                              are put in the order of the data
    OUT/summary.json          the scores with intervals, and more (`summary.py`)
    OUT/about.json            the package's version and the time
    OUT/reward_bench, RM-Bench, RMB, JudgeBench     logs and score files with the published names and keys

A killed run continues where it stopped and gives the same files, but for about.json. Everything but judging works
without JAX.

Next: `benchmark.py`, what a benchmark is; `logs.py` for its logs; `summary.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rmr1_jax.distributed.exchange import from_first
from rmr1_jax.errors import InputError
from rmr1_jax.eval.benchmark import Benchmark
from rmr1_jax.eval.logs import JUDGEMENTS, ArrayFiles, is_ours, log_files, read_judgements, settings_of
from rmr1_jax.eval.registry import BENCHMARKS
from rmr1_jax.eval.summary import write_summary
from rmr1_jax.files.append import files_digest, settings_file
from rmr1_jax.files.write import to_json, write_whole, writing
from rmr1_jax.judge.file import Output, judge_file, put_in_order
from rmr1_jax.judge.judgement import AnyJudge, Voting
from rmr1_jax.judge.rows import judgement_row, read_again
from rmr1_jax.judge.summary import Summary
from rmr1_jax.pairs.pair import PreferencePair

_MADE_BY = "rmr1 score"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedJudge:
    """A judge under evaluation. name: in file names and the summary. identity: what tells the judge from others besides
    its settings, such as a hash of its weights."""

    judge: AnyJudge
    name: str
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cut(self) -> Callable[[str, int], str] | None:
        """(text, n) -> the first n tokens of the text; None for a judge without a tokenizer."""
        tokenizer = getattr(getattr(self.judge, "policy", None), "tokenizer", None)
        return None if tokenizer is None else lambda text, n: tokenizer.decode(tokenizer.encode_trace(text)[:n])

    def output(self, out: Path, benchmark: str, command: str) -> Output:
        """The file of judgements of a benchmark in the directory `out`."""
        identity = {"benchmark": benchmark, "judge": self.name, **self.identity}
        return Output(path=out / JUDGEMENTS, identity=identity, row_of=judgement_row, command=command)


def load(benchmark: str, data: Path, limit: int | None = None) -> Iterator[PreferencePair]:
    """The pairs of a benchmark, or those of `limit` of its items, spread evenly over the data set.

    An item is a row of the data: a pair, RM-Bench's nine pairs, or the pairs of an answer that RMB calls the best of N.
    The A/B order of an item does not depend on the limit.
    """
    if limit is None:
        return BENCHMARKS[benchmark].load(data)
    if limit < 1:
        raise InputError(f"limit={limit} must be at least 1")
    total = sum(1 for _ in _items(benchmark, data))
    return (pair for k, own in enumerate(_items(benchmark, data)) if chosen(k, limit, total) for pair in own)


def chosen(k: int, limit: int, total: int) -> bool:
    """Whether number k is among `limit` numbers that are spread evenly over `total`."""
    return k * limit % total < limit


def _items(benchmark: str, data: Path) -> Iterator[Iterator[PreferencePair]]:
    pairs = BENCHMARKS[benchmark].load(data)
    return (own for _, own in itertools.groupby(pairs, key=lambda pair: pair.meta.get("item", pair.id)))


def evaluate(
    benchmark: str,
    judge: NamedJudge,
    pairs: Iterable[PreferencePair],
    out: Path,
    voting: Voting | None = None,
    *,
    batch_size: int = 1024,
    total: int | None = None,
) -> tuple[Summary, dict[str, Any]]:
    """Judge the pairs of a benchmark (see `load`) and write all files; continue where an earlier run stopped.

    In a run of several processes each judges its share of the pairs, and process 0 writes all other files.

    Args:
        benchmark: a key of `BENCHMARKS`. out: the directory to write. voting, batch_size, total: see `judge_file`.

    Returns:
        The counts, and the contents of the published score files by path.
    """
    output = judge.output(out, benchmark, "rmr1 eval")
    counts = judge_file(judge.judge, pairs, output, voting, batch_size=batch_size, total=total)

    def score() -> dict[str, Any]:
        # The file may also hold rows of an earlier run with another limit.
        put_in_order(output.path, lambda row: row["meta"]["number"])
        found = BENCHMARKS[benchmark]
        with ArrayFiles(out) as files:
            found.write_logs(files, read_judgements(output.path), judge.name)
        return _score(found, out, judge.name, judge.cut)

    return counts, from_first(score)


def score_logs(
    benchmark: str, logs: Path, out: Path, *, released: bool = False, rule: str | None = None
) -> tuple[dict[str, Any], list[InputError]]:
    """Compute scores from logs alone: our judgements, or published logs, which become judgements.jsonl in `out`.

    Args:
        logs: a log file, or a folder with all logs of a run.
        released: reproduce the mistake of the released RM-Bench scorer.
        rule: read the verdicts from the texts again, by "eval" or "strict". By default the logs' own results count.

    Returns:
        The contents of the published score files by path, and the errors of the log files that cannot be read and so
        do not count.

    Raises:
        InputError: there is no log, none can be read, or `out` holds judgements that `rmr1 eval` made.
    """
    found = BENCHMARKS[benchmark]
    paths = log_files(logs, found.log_names)
    output = out / JUDGEMENTS
    failures: list[InputError] = []
    if [path.resolve() for path in paths] == [output.resolve()] and rule is None:
        for _ in found.judgements(output):  # all rows must belong to the benchmark
            pass
    else:
        failures = _convert(found, paths, output, rule)
    try:
        judge = str(settings_of(paths[0]).get("judge") or paths[0].resolve().parent.name)
        scores = _score(found.as_released() if released else found, out, judge)
    except InputError as e:
        if not failures:
            raise _located(logs, e) from e
        return {}, [*failures, InputError(f"no score without them: {e}")]
    return scores, failures


def _score(benchmark: Benchmark, out: Path, judge: str, cut: Callable[[str, int], str] | None = None) -> dict[str, Any]:
    """Write the score files and the summary of the judgements in `out`; returns the contents of the score files."""
    scores = benchmark.scores(read_judgements(out / JUDGEMENTS))
    for name, content in scores.items():
        with writing(out / name):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, to_json(content, indent=1))
    write_summary(out, scores[benchmark.main_scores], judge=judge, scoring=benchmark, cut=cut)
    return scores


def _convert(benchmark: Benchmark, paths: list[Path], output: Path, rule: str | None) -> list[InputError]:
    """Write the judgements of log files into judgements.jsonl. Returns the errors of the files that cannot be read; no
    row of them is kept."""
    side = settings_file(output)
    if output.exists() and settings_of(output).get("made_by") != _MADE_BY:
        raise InputError(f"{output} holds judgements that `{_MADE_BY}` did not make; give another --out")
    good: list[Path] = []
    failures: list[InputError] = []
    count = 0
    partial = output.with_name(f"{JUDGEMENTS}.partial")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for path in paths:
                start, number = file.tell(), count
                try:
                    for number, row in enumerate(benchmark.judgements(path), count):
                        row = row if rule is None else read_again(row, rule)
                        row["meta"].setdefault("number", number)
                        file.write(to_json(row).encode() + b"\n")
                except InputError as e:
                    failures.append(_located(path, e))
                    file.seek(start)
                    file.truncate()
                else:
                    good.append(path)
                    count = number + 1
        if not good:
            partial.unlink()
            raise failures[0]
        old = settings_of(good[0]) if is_ours(good[0]) else {}
        new = {"rule": rule or old.get("rule", "eval"), "made_by": _MADE_BY}
        new |= {"logs": [path.name for path in good], "logs_sha256": files_digest(good)}
        write_whole(side, json.dumps({"benchmark": benchmark.name, **old, **new}, indent=2) + "\n")
        partial.replace(output)
    return failures


def _located(path: Path, error: InputError) -> InputError:
    """The error with the path of the file that it is about."""
    return error if str(path) in str(error) else InputError(f"{path}: {error}")
