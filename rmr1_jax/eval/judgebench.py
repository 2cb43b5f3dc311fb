"""JudgeBench (arXiv 2410.12784): a right and a wrong answer to a hard question, compared in both orders.

A pair counts as right if more of its two verdicts name the right answer than the wrong one. So one order is enough if
the other has no verdict, and orders that disagree are a tie, which is not right. With both orders and one vote our
judge settles it in the same way. The answers are shown in the order of the data set.

Next: `evaluate.py`, which judges and scores; `logs.py`, the parts of log entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rmr1_jax.eval import logs
from rmr1_jax.eval.benchmark import Benchmark, section_of
from rmr1_jax.eval.logs import OURS, ArrayFiles, Judged
from rmr1_jax.eval.scores import Items, Place, Statistic
from rmr1_jax.judge.judgement import Judgement, outcome, settle
from rmr1_jax.judge.rows import judgement_row
from rmr1_jax.pairs.containers import read_rows
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.rows import Row, describe, parse_rows
from rmr1_jax.prompts.trace import Trace, parse_trace
from rmr1_jax.prompts.verdict import other_side

LOG = "JudgeBench/dataset=judgebench,response_model={answers},judge_name=rmr1,judge_model={model}.jsonl"
SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")  # prefixes of a pair's `source`
_BETTER = MappingProxyType({"A>B": "A", "B>A": "B"})
_DECISION = MappingProxyType({"A": "A>B", "B": "B>A", None: None})


class JudgeBench(Benchmark):
    name = "judgebench"
    main_scores = "JudgeBench/score.json"
    log_names = ("*,judge_name=*.jsonl",)

    def read(self, path: Path) -> Iterator[PreferencePair]:
        # A folder may hold other files beside the data. A row with some of the fields is a bad row, not another file's.
        fields = {"pair_id", "label", "response_A", "response_B"}
        return parse_rows(read_rows(path), lambda row: [_pair(row)] if fields & set(row.value) else [])

    def section(self, meta: Mapping[str, Any]) -> str:
        return section_of(str(meta["subset"]), SOURCES, "source", "JudgeBench")

    def write_logs(self, files: ArrayFiles, rows: Iterable[Judged], judge: str) -> None:
        """Write one log for each model that wrote answers: the data's row and the decision in each order."""
        for row in rows:
            meta = row["meta"]
            entry = {"pair_id": meta["pair_id"], "original_id": meta["original_id"], "source": meta["subset"]}
            entry |= {"question": row["question"], "response_model": meta["response_model"]}
            entry |= {"response_A": row["response_a"], "response_B": row["response_b"]}
            entry |= {"label": _DECISION[row["better"]], "judge_name": "rmr1"}
            entry["judgments"] = [
                _judgment(judge, texts, verdicts, order)
                for order, (texts, verdicts) in enumerate(zip(row["texts"], row["verdicts"], strict=True))
            ]
            answers = meta["response_model"].replace("/", "_")
            files.add(LOG.format(answers=answers, model=judge), {**entry, OURS: logs.extras(row)})

    def judgements_of(self, entries: Iterable[Row]) -> Iterator[Judged]:
        for entry in entries:
            verdicts, texts = [], []
            for order, judgment in enumerate(entry.sequence("judgments")):
                fields = {} if judgment is None else entry.mapping(judgment, f"judgments[{order}]", ("decision",))
                verdict = _BETTER.get(str(fields.get("decision")))
                verdicts.append((other_side(verdict) if order else verdict,))
                inner = fields.get("judgment")
                texts.append((str(inner.get("response") or "") if isinstance(inner, dict) else "",))
            trace = parse_trace(texts[0][0]) if texts else Trace()
            judgement = Judgement(**outcome(verdicts), trace=trace, texts=tuple(texts), verdicts=tuple(verdicts))
            yield logs.with_ours(entry, judgement_row(_pair(entry), judgement), entry.value.get(OURS))

    def place(self, row: Mapping[str, Any]) -> Place:
        return Place(self.section(row["meta"]), row["id"])

    def statistics(self, items: Items) -> list[Statistic]:
        """The accuracy over all pairs, and by source."""
        sizes = {name: float(items.pairs(name)[1]) for name in SOURCES if name in items.strata}
        return [Statistic("headline", sizes), *(Statistic(name, {name: 1.0}) for name in sizes)]

    def score_files(self, items: Items) -> dict[str, Any]:
        """The accuracy by source and over all pairs."""
        counts = {name: items.pairs(name) for name in SOURCES if name in items.strata}
        right, n = items.pairs(*counts)
        return {self.main_scores: {**{name: own / of for name, (own, of) in counts.items()}, "overall": right / n}}


def _pair(row: Row) -> PreferencePair:
    if row.get("label") not in tuple(_BETTER):
        raise row.bad("label", f"is {describe(row.value['label'])}, expected 'A>B' or 'B>A'")
    source, answers, pair_id = row.text("source"), row.text("response_model"), row.identifier("pair_id")
    if not source.startswith(SOURCES):
        raise row.bad("source", f"{source!r} is none of JudgeBench's: {', '.join(SOURCES)}")
    meta = {"benchmark": JudgeBench.name, "subset": source}
    meta |= {"section": JudgeBench().section(meta), "response_model": answers}
    meta |= {"pair_id": pair_id, "original_id": row.value.get("original_id")}
    texts = (row.text("question"), row.text("response_A"), row.text("response_B"))
    return PreferencePair.from_answers(f"{answers}/{pair_id}", *texts, better=_BETTER[row.value["label"]], meta=meta)


def _judgment(model: str, texts: list[str], verdicts: list[str | None], order: int) -> dict[str, Any]:
    """The decision of one order's votes, in the letters that this order showed, and a text with this verdict."""
    winner, _ = settle([verdicts])
    text = texts[verdicts.index(winner) if winner in verdicts else 0]
    decision = _DECISION[other_side(winner) if order else winner]
    return {"judgment": {"judge_model": model, "response": text}, "decision": decision}
