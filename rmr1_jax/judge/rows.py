"""The rows that a judge writes, one a pair: those of `rmr1 judge` and those of `rmr1 eval`; and verdicts read again.

Next: `file.py`, which writes them; `summary.py`, which counts them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rmr1_jax.judge.judgement import Judgement, main_reason, no_right_side, outcome, read_verdicts, why_no_verdict
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.verdict import other_side


def verdict_row(pair: PreferencePair, judgement: Judgement, *, with_pair: bool = True) -> dict[str, Any]:
    """A row of `rmr1 judge`.

    id, winner, status, votes, text; correct and better, if the better answer is known and is not the same as the other
    one; tokens, finish_reasons and, if there are several texts, texts and verdicts: by order, then by vote; reasons
    (the same), reason, prompt_tokens, scores and note if there are any (see `Judgement`). with_pair: also the pair's
    question and answers, as in `judgement_row`.
    """
    row = {"id": pair.id} | {k: getattr(judgement, k) for k in ("winner", "status", "votes", "text")}
    if pair.better is not None and not no_right_side(pair):
        row |= {"correct": judgement.winner == pair.better, "better": pair.better}
    if with_pair:
        row |= _pair_fields(pair)
    left_out = () if sum(map(len, judgement.texts)) > 1 else ("texts", "verdicts")
    return row | _text_fields(judgement, left_out) | _rare_fields(judgement)


def judgement_row(pair: PreferencePair, judgement: Judgement) -> dict[str, Any]:
    """A row of `rmr1 eval`: the pair and its judgement in full, for scores, logs and the report.

    id, better, winner, status, correct, votes; question, response_a, response_b, or conversation_a, conversation_b
    (lists of messages), in the order of the pair; meta: the pair's; kind: the trace's; texts, verdicts, tokens: by
    order, then by vote; finish_reasons, reasons: the same, if there are any; scores: [a, b], from a judge that gives
    scores; reason, prompt_tokens and note if there are any.
    """
    row: dict[str, Any] = {"id": pair.id, "better": pair.better}
    row |= {"winner": judgement.winner, "status": judgement.status, "correct": judgement.winner == pair.better}
    row["votes"] = dict(judgement.votes)
    row |= _pair_fields(pair) | {"meta": dict(pair.meta), "kind": judgement.trace.kind}
    row |= {name: [] for name in ("texts", "verdicts", "tokens")}
    return row | _text_fields(judgement) | _rare_fields(judgement)


def read_again(row: Mapping[str, Any], rule: str) -> dict[str, Any]:
    """The row, of either kind, with the verdicts that `rule` reads from its texts; a row without texts stays as it is.
    `correct` is left out where the better answer cannot be known."""
    texts = row.get("texts") or ([[row["text"]]] if row.get("text") else [])
    if not texts or (not row.get("texts") and sum(row["votes"].values()) > 1):
        return dict(row)
    verdicts = read_verdicts(texts, rule)
    found = outcome(verdicts)
    reasons = why_no_verdict(texts, verdicts, row.get("finish_reasons") or [], rule)
    new = {k: v for k, v in row.items() if k not in ("correct", "reason", "reasons")} | found
    better = row.get("better")
    if better is None and row.get("winner"):  # rows of earlier versions have `correct` alone
        better = {True: row["winner"], False: other_side(row["winner"])}.get(row.get("correct"))
    if better is not None:
        new["correct"] = found["winner"] == better
    flat, named, why = (list(itertools.chain(*each)) for each in (texts, verdicts, reasons))
    if "texts" in row:
        new["verdicts"] = verdicts
    if "text" in row:
        new["text"] = flat[named.index(found["winner"])] if found["winner"] else flat[0]
    fields = {"reasons": reasons if any(why) else None, "reason": main_reason(found["status"], reasons)}
    return new | {name: value for name, value in fields.items() if value}


def _pair_fields(pair: PreferencePair) -> dict[str, Any]:
    """The question and the answers, or the two conversations."""
    if pair.single_turn:
        return {name: getattr(pair, name) for name in ("question", "response_a", "response_b")}
    sides = ("conversation_a", "conversation_b")
    return {side: [message._asdict() for message in getattr(pair, side)] for side in sides}


def _text_fields(judgement: Judgement, left_out: Sequence[str] = ()) -> dict[str, list[list[Any]]]:
    """The fields that have a value for each text. Those that say nothing are absent."""
    names = ("texts", "verdicts", "tokens", "finish_reasons", "reasons")
    found = {name: [list(own) for own in getattr(judgement, name)] for name in names if name not in left_out}
    if not any(reason for own in judgement.reasons for reason in own):
        found.pop("reasons")
    return {name: value for name, value in found.items() if value}


def _rare_fields(judgement: Judgement) -> dict[str, Any]:
    """The fields that only some rows have."""
    scores = None if judgement.scores is None else list(judgement.scores)
    fields = {"scores": scores, "reason": judgement.reason, "prompt_tokens": judgement.prompt_tokens}
    fields["note"] = judgement.note
    return {name: value for name, value in fields.items() if value}
