"""JudgeBench (arXiv 2410.12784): pairs of a right and a wrong answer to hard questions, asked about in both orders.

A pair counts as right where more of its two verdicts name the right answer than the wrong one; so one order is enough
where the other has no verdict, and orders that disagree are a tie, which is not right. With both orders and one vote
that is how our judge settles it too. The answers are shown as the data set has them.

Next: `run.py`, which judges and scores; `logs.py` for what rows are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import OURS, ArrayFiles, Judged, extras, log_files, with_meta, with_ours
from rmr1_jax.judge.judgement import count_votes, settle
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.rows import Row, describe, parse_rows, read_rows
from rmr1_jax.prompts.trace import parse_trace

NAME = "judgebench"


LOG = "JudgeBench/dataset=judgebench,response_model={answers},judge_name=rmr1,judge_model={model}.jsonl"


SCORE = "JudgeBench/score.json"


SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")  # how a pair's `source` begins


_BETTER = MappingProxyType({"A>B": "A", "B>A": "B"})


_DECISION = MappingProxyType({"A": "A>B", "B": "B>A", None: None})


_SWAP = MappingProxyType({"A": "B", "B": "A", None: None})


def load(path: Path) -> Iterator[PreferencePair]:
    """The pairs, answer A shown in A."""
    # A folder may hold other files beside the data; a row that has some of the fields is a bad one, not another.
    fields = {"pair_id", "label", "response_A", "response_B"}
    pairs = parse_rows(read_rows(path), lambda row: [_pair(row)] if fields & set(row.value) else [])
    for number, pair in enumerate(pairs):
        yield with_meta(pair, number=number)


def _pair(row: Row) -> PreferencePair:
    if row.get("label") not in tuple(_BETTER):
        raise row.bad("label", f"is {describe(row.value['label'])}, expected 'A>B' or 'B>A'")
    source, answers, pair_id = row.text("source"), row.text("response_model"), row.identifier("pair_id")
    if not source.startswith(SOURCES):
        raise row.bad("source", f"{source!r} is none of JudgeBench's: {', '.join(SOURCES)}")
    meta = {"benchmark": NAME, "subset": source, "section": _section(source), "response_model": answers}
    meta |= {"pair_id": pair_id, "original_id": row.value.get("original_id")}
    texts = (row.text("question"), row.text("response_A"), row.text("response_B"))
    return PreferencePair.from_answers(f"{answers}/{pair_id}", *texts, better=_BETTER[row.value["label"]], meta=meta)


def write_logs(files: ArrayFiles, rows: Iterable[Judged], model: str) -> None:
    """The published log, one for each model that wrote the answers: the data's row and the decision in each order."""
    for row in rows:
        meta = row["meta"]
        entry = {"pair_id": meta["pair_id"], "original_id": meta["original_id"], "source": meta["subset"]}
        entry |= {"question": row["question"], "response_model": meta["response_model"]}
        entry |= {"response_A": row["response_a"], "response_B": row["response_b"]}
        entry |= {"label": _DECISION[row["better"]], "judge_name": "rmr1"}
        entry["judgments"] = [
            _judgment(model, texts, verdicts, order)
            for order, (texts, verdicts) in enumerate(zip(row["texts"], row["verdicts"], strict=True))
        ]
        answers = meta["response_model"].replace("/", "_")
        files.add(LOG.format(answers=answers, model=model), {**entry, OURS: extras(row)})


def _judgment(model: str, texts: list[str], verdicts: list[str | None], order: int) -> dict[str, Any]:
    """What one order's votes say, in the letters that they saw, and a text that says so."""
    winner, _ = settle([verdicts])
    text = texts[verdicts.index(winner) if winner in verdicts else 0]
    told = {"judge_model": model, "response": text}
    return {"judgment": told, "decision": _DECISION[_shown(winner, order)]}


def find_logs(path: Path) -> list[Path]:
    """The log files that `path` stands for."""
    return log_files(
        path, lambda file: ",judge_name=" in file.name, "dataset=judgebench,*,judge_name=*.jsonl", "*.jsonl"
    )


def judgements_of(entries: Iterable[Row]) -> Iterator[Judged]:
    """Our rows for the entries of a published log."""
    for entry in entries:
        pair = _pair(entry)
        verdicts, texts = [], []
        for order, judgment in enumerate(entry.sequence("judgments")):
            told = {} if judgment is None else entry.mapping(judgment, f"judgments[{order}]", ("decision",))
            verdicts.append([_shown(_BETTER.get(str(told.get("decision"))), order)])
            said = told.get("judgment")
            texts.append([str(said.get("response") or "") if isinstance(said, dict) else ""])
        winner, status = settle(verdicts)
        row: Judged = {"id": pair.id, "better": pair.better, "winner": winner, "status": status}
        row |= {"correct": winner == pair.better, "votes": count_votes([own[0] for own in verdicts])}
        row |= {"question": pair.question, "response_a": pair.response_a, "response_b": pair.response_b}
        row |= {"meta": dict(pair.meta), "kind": parse_trace(texts[0][0]).kind if texts else None}
        row |= {"texts": texts, "verdicts": verdicts, "tokens": []}
        yield with_ours(entry, row, entry.value.get(OURS))


def record(row: Judged) -> dict[str, Any]:
    """What `score` needs of a row."""
    return {"source": row["meta"]["subset"], "correct": row["correct"]}


def score(records: Iterable[Mapping[str, Any]], compat: str | None = None) -> dict[str, Any]:
    """The accuracy by source and over all pairs, from records {source, correct}. `compat` changes nothing here.

    Raises:
        InputError: no records, or a source that JudgeBench does not have.
    """
    outcomes: dict[str, list[bool]] = {}
    for found in records:
        outcomes.setdefault(_section(found["source"]), []).append(found["correct"])
    if not outcomes:
        raise InputError("no judgements to score")
    every = [outcome for own in outcomes.values() for outcome in own]
    by_source = {name: sum(outcomes[name]) / len(outcomes[name]) for name in SOURCES if name in outcomes}
    return {SCORE: {**by_source, "overall": sum(every) / len(every)}}


def _shown(verdict: str | None, order: int) -> str | None:
    """A verdict in the letters of the other order, for order 1."""
    return _SWAP[verdict] if order else verdict


def _section(source: str) -> str:
    found = next((name for name in SOURCES if source.startswith(name)), None)
    if found is None:
        raise InputError(f"source {source!r} is none of JudgeBench's: {', '.join(SOURCES)}")
    return found
