"""Compare two judges on the same pairs: how often they agree, which is right where they differ, and tests of both.

    rmr1 compare runs/eval-7b runs/eval-14b

Pairs are matched by id. If the two runs showed a pair in different orders, verdicts are matched by the answer that they
name and not by its letter.

Next: `scores.py` for the tests and for the score, whose difference is taken item by item; `intervals.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rmr1_jax.errors import InputError
from rmr1_jax.eval.intervals import score_interval
from rmr1_jax.eval.logs import JUDGEMENTS, Judged, read_judgements
from rmr1_jax.eval.registry import scoring_of
from rmr1_jax.eval.scores import cohen_kappa, items_in, mcnemar, score
from rmr1_jax.eval.summary import percent, percents
from rmr1_jax.prompts.verdict import other_side

_CLASSES = ("A", "B", None)


class _Verdict(NamedTuple):
    better: str | None
    winner: str | None
    correct: bool


def compare(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Compare two runs of `rmr1 eval` or `rmr1 score`, given by their directories or by their judgements.jsonl; or two
    outputs of `rmr1 judge` for pairs whose better answer is known.

    Returns plain values; shares are percentages, and differences are points, a - b:
        a, b: the judges' names. n: pairs that both judged; only_in_a, only_in_b: pairs of one run alone.
        both, only_a, only_b, neither: how many of the n pairs each judge got right.
        accuracy_a, accuracy_b: of the pairs. score_a, score_b: the benchmark's score over the n pairs.
        difference, interval: of the scores, with its 95% interval over `items`, which the score counts.
        p, test: McNemar's test over the pairs. It treats pairs as independent, which those of one item are not.
        agreement, kappa: the share of equal verdicts (A, B or none), and Cohen's kappa of them.

    Raises:
        InputError: a file cannot be read, a row is not a judgement, an id appears twice, or no id is in both.
    """
    path_a, path_b = _judgements(a), _judgements(b)
    verdicts = {row["id"]: _verdict(row) for row in _rows(path_a)}
    right = [[0, 0], [0, 0]]  # [whether a is right][whether b is]
    table = [[0] * len(_CLASSES) for _ in _CLASSES]  # of the verdicts
    scoring, only_in_b = None, 0
    for row in _rows(path_b):
        of_a, of_b = verdicts.get(row["id"]), _verdict(row)
        if of_a is None:
            only_in_b += 1
            continue
        if scoring is None:
            scoring = scoring_of(row)
            items_a, items_b = scoring.items(), scoring.items()
        elif type(scoring_of(row)) is not type(scoring):
            raise InputError(f"{path_b} holds judgements of several benchmarks; compare one at a time")
        items_a.add(scoring.add(items_b, row), of_a.correct)
        right[of_a.correct][of_b.correct] += 1
        winner = of_b.winner if of_a.better == of_b.better else other_side(of_b.winner)
        table[_CLASSES.index(of_a.winner)][_CLASSES.index(winner)] += 1
    if scoring is None:
        raise InputError(f"{path_a} and {path_b} have no id in common; compare two runs on the same pairs")
    n, headline, kappa = sum(map(sum, right)), scoring.statistics(items_b)[0], cohen_kappa(table)
    score_a, score_b = score(items_a.strata_of(headline)), score(items_b.strata_of(headline))
    differences = items_a.strata_of(headline, minus=items_b)
    return {
        **_names(a, b),
        "n": n,
        "items": items_in(differences),
        "only_in_a": len(verdicts) - n,
        "only_in_b": only_in_b,
        "both": right[1][1],
        "only_a": right[1][0],
        "only_b": right[0][1],
        "neither": right[0][0],
        "accuracy_a": 100 * sum(right[1]) / n,
        "accuracy_b": 100 * (right[0][1] + right[1][1]) / n,
        "score_a": percent(score_a),
        "score_b": percent(score_b),
        "difference": percent(score_a - score_b),
        "interval": percents(score_interval(differences, difference=True)),
        "p": mcnemar(right[1][0], right[0][1]),
        "test": "McNemar, exact",
        "agreement": 100 * sum(table[k][k] for k in range(len(table))) / n,
        "kappa": None if math.isnan(kappa) else kappa,
    }


def _verdict(row: Judged) -> _Verdict:
    return _Verdict(row.get("better"), row["winner"], row["correct"])


def comparison_text(found: Mapping[str, Any]) -> str:
    """The result of `compare` as a table for a person to read."""
    low, high = found["interval"]
    interval = f"95% interval {low:+.2f} to {high:+.2f}"
    width = max(len(found["a"]), len(found["b"]), 8)
    kappa = "not defined" if found["kappa"] is None else f"{found['kappa']:.3f}"
    lines = [
        f"     {'judge':{width}}   score  accuracy of pairs",
        f"A    {found['a']:{width}}  {found['score_a']:6.2f}  {found['accuracy_a']:6.2f}",
        f"B    {found['b']:{width}}  {found['score_b']:6.2f}  {found['accuracy_b']:6.2f}",
        f"A-B  {'':{width}}  {found['difference']:+6.2f}  ({interval}, n = {found['items']})",
        "",
        f"pairs in both: {found['n']}, only in A: {found['only_in_a']}, only in B: {found['only_in_b']}",
        f"right: both {found['both']}, only A {found['only_a']}, only B {found['only_b']}, neither {found['neither']}",
        f"{found['test']}: p = {found['p']:.4g}",
        f"same verdict: {found['agreement']:.2f}%, Cohen's kappa {kappa}",
    ]
    return "\n".join(lines)


def _judgements(run: str | Path) -> Path:
    path = Path(run)
    return path / JUDGEMENTS if path.is_dir() else path


def _names(a: str | Path, b: str | Path) -> dict[str, str]:
    """The judges' names in the runs' summaries, otherwise the names of the files; with the path if both are equal."""
    names = [_name(_judgements(run)) for run in (a, b)]
    if names[0] == names[1]:
        names = [f"{name} ({run})" for name, run in zip(names, (a, b), strict=True)]
    return dict(zip("ab", names, strict=True))


def _name(judgements: Path) -> str:
    summary = judgements.with_name("summary.json")
    own = judgements.parent.name if judgements.name == JUDGEMENTS else judgements.stem
    try:
        return str(json.loads(summary.read_bytes()).get("judge") or own)
    except (OSError, ValueError, AttributeError):  # the summary is optional here
        return own


def _rows(path: Path) -> Iterator[Judged]:
    """The judgements or verdicts in a file, each id once."""
    seen: set[str] = set()
    for row in read_judgements(path, verdicts=True):
        if row["id"] in seen:
            raise InputError(f"{path}: two rows have the id {row['id']!r}; give a file that has each id once")
        seen.add(row["id"])
        yield row
