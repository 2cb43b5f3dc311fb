"""Two judges on the same pairs: how often they agree, who is right where they differ, and whether that is chance.

    rmr1 compare runs/eval-7b runs/eval-14b

Pairs are matched by id. Where the two runs showed a pair in different orders, verdicts are told apart by the answer
that they name, not by its letter.

Next: `stats.py` for the tests; `items.py` for the benchmark's score, whose difference is resampled item by item.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import JUDGEMENTS, Judged, read_judgements
from rmr1_jax.eval.scores import Items, bootstrap_interval, cohen_kappa, mcnemar, place_of, score, statistics
from rmr1_jax.eval.summary import percent, percents

_CLASSES = ("A", "B", None)


_OTHER = {"A": "B", "B": "A", None: None}


class _Verdict(NamedTuple):
    better: str | None
    winner: str | None
    correct: bool


def compare(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Compare two runs of `rmr1 eval` or `rmr1 score`, given by their directories or by their judgements.jsonl; or two
    outputs of `rmr1 judge` for pairs whose better answer is known.

    Returns plain values; shares are percent, differences are points, a - b:
        a, b: the judges' names. n: pairs that both judged; only_in_a, only_in_b: pairs of one run alone.
        both, only_a, only_b, neither: how many of the n pairs each got right.
        accuracy_a, accuracy_b: of pairs. score_a, score_b: the benchmark's own, over the n pairs.
        difference, interval: of the scores, and its 95% bootstrap interval over paired items.
        p, test: McNemar's, over the pairs. It takes pairs as independent, which those of one item are not.
        agreement, kappa: the share of the same verdicts (A, B or none), and Cohen's kappa of them.

    Raises:
        InputError: no such file, a row that is no judgement, an id for the second time, or no id in both.
    """
    path_a, path_b = _judgements(a), _judgements(b)
    verdicts = {row["id"]: _Verdict(row.get("better"), row["winner"], row["correct"]) for row in _rows(path_a)}
    items_a, items_b = Items(), Items()
    right = [[0, 0], [0, 0]]  # [whether a is right][whether b is]
    said = [[0] * len(_CLASSES) for _ in _CLASSES]
    benchmarks, only_in_b = set(), 0
    for row in _rows(path_b):
        of_a, of_b = verdicts.get(row["id"]), _Verdict(row.get("better"), row["winner"], row["correct"])
        if of_a is None:
            only_in_b += 1
            continue
        benchmarks.add((row.get("meta") or {}).get("benchmark"))
        place = place_of(row)
        items_a.add(place, of_a.correct)
        items_b.add(place, of_b.correct)
        right[of_a.correct][of_b.correct] += 1
        mapped = of_b.winner if of_a.better == of_b.better else _OTHER[of_b.winner]
        said[_CLASSES.index(of_a.winner)][_CLASSES.index(mapped)] += 1
    n = sum(map(sum, right))
    if not n:
        raise InputError(f"{path_a} and {path_b} have no id in common; compare two runs on the same pairs")
    if len(benchmarks) > 1:
        raise InputError(f"{path_b} holds judgements of several benchmarks: {', '.join(map(str, benchmarks))}")
    headline = statistics(benchmarks.pop(), items_b)[0]
    score_a, score_b = (score(items.strata_of(headline)) for items in (items_a, items_b))
    return {
        **_names(a, b),
        "n": n,
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
        "interval": percents(bootstrap_interval(items_a.differences(items_b, headline))),
        "p": mcnemar(right[1][0], right[0][1]),
        "test": "McNemar, exact",
        "agreement": 100 * sum(said[k][k] for k in range(len(_CLASSES))) / n,
        "kappa": _number(cohen_kappa(said)),
    }


def comparison_text(found: Mapping[str, Any]) -> str:
    """What `compare` found, as a small table and a sentence or two."""
    low, high = found["interval"]
    width = max(len(found["a"]), len(found["b"]), 8)
    kappa = "not defined" if found["kappa"] is None else f"{found['kappa']:.3f}"
    lines = [
        f"     {'judge':{width}}   score  accuracy of pairs",
        f"A    {found['a']:{width}}  {found['score_a']:6.2f}  {found['accuracy_a']:6.2f}",
        f"B    {found['b']:{width}}  {found['score_b']:6.2f}  {found['accuracy_b']:6.2f}",
        f"A-B  {'':{width}}  {found['difference']:+6.2f}  (95% interval {low:+.2f} to {high:+.2f})",
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
    """What the runs' summaries call the judges, else the runs' own names; told apart where they are the same."""
    names = [_name(_judgements(run)) for run in (a, b)]
    if names[0] == names[1]:
        names = [f"{name} ({run})" for name, run in zip(names, (a, b), strict=True)]
    return dict(zip("ab", names, strict=True))


def _name(judgements: Path) -> str:
    summary = judgements.with_name("summary.json")
    own = judgements.parent.name if judgements.name == JUDGEMENTS else judgements.stem
    try:
        return str(json.loads(summary.read_bytes()).get("judge") or own)
    except (OSError, ValueError, AttributeError):  # a summary is a convenience here
        return own


def _rows(path: Path) -> Iterator[Judged]:
    """The judgements or verdicts in a file, each id once."""
    seen: set[str] = set()
    for row in read_judgements(path, verdicts=True):
        if row["id"] in seen:
            raise InputError(f"{path}: two rows have the id {row['id']!r}; give a file that has each id once")
        seen.add(row["id"])
        yield row


def _number(value: float) -> float | None:
    """None for NaN, which JSON has no word for."""
    return None if value != value else value
