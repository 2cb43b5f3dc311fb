"""Reads the judgements of training runs, and puts those of one question together into a card.

A judgement is a row of `samples.jsonl` or `verdicts.jsonl`, which an evaluation of a stage wrote, or of
`rollouts.jsonl`, which GRPO wrote while it trained. Every field but the text may be absent.

Read next: `training.py`, whose page shows the cards; `trace.py`, for the blocks of a text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rmr1_jax.eval.logs import whole_rows
from rmr1_jax.judge.judgement import CUT
from rmr1_jax.pairs.rows import Row, describe
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import why_unread
from rmr1_jax.report.reading import as_number, stage_order, text_of
from rmr1_jax.report.trace import blocks_of

SAMPLE_TEXTS = ("stage", "kind", "task", "question", "response_a", "response_b", "better", "status", "text")
FILTERS = ("run", "stage", "kind", "task", "temptation", "step", "outcome")
FILTER_OPTIONS = 24  # a field with more values than this gets no filter
WRONG_FIRST = ("wrong", "no verdict", "not known", "right")
CARD = ("run", "id", "step", "question", "response_a", "response_b")  # what the traces of one card have in common


def read_samples(file: Path, warnings: list[str]) -> Iterator[dict[str, Any]]:
    """Reads a file of judgements: rows with texts ("" if absent), `better` ("A", "B", "") and `outcome`.

    `outcome` is "right", "wrong", "no verdict", or "not known" if the row does not say which answer is better. `why`
    says why there is no verdict.

    Raises:
        InputError: a row is malformed (the message names file, line and field).
    """
    for row in whole_rows(file, warnings):
        yield _sample(row)


def _sample(row: Row) -> dict[str, Any]:
    sample: dict[str, Any] = {name: text_of(row, name) for name in SAMPLE_TEXTS}
    sample["question"] = sample["question"] or text_of(row, "prompt")
    sample["id"] = row.identifier("id") if row.value.get("id") is not None else ""
    sample["winner"] = text_of(row, "winner" if "winner" in row.value else "verdict")
    for name in ("winner", "better"):
        if sample[name] not in ("A", "B", ""):
            raise row.bad(name, f"is {sample[name]!r}, expected A or B")
    correct, tempted = (row.value.get(name) for name in ("correct", "tempted"))
    if not isinstance(correct, bool | None):
        raise row.bad("correct", f"is {describe(correct)}, expected true, false or null")
    if correct is None and sample["better"]:
        correct = sample["better"] == sample["winner"]
    known = {True: "right", False: "wrong", None: "not known"}[correct]
    sample["outcome"] = known if sample["winner"] else "no verdict"
    sample["temptation"] = {True: "tempted", False: "not tempted"}[tempted] if isinstance(tempted, bool) else ""
    step, reward, tokens = (as_number(row.value.get(name)) for name in ("step", "reward", "new_tokens"))
    sample |= {"step": "" if step is None else f"{step:g}", "reward": reward, "tokens": tokens}
    sample["why"] = "" if sample["winner"] else _why(row, sample)
    return sample


def _why(row: Row, sample: Mapping[str, Any]) -> str:
    """Returns the reason why a row has no verdict, one of `judgement.REASONS`; "" where the text was never made."""
    if reason := text_of(row, "reason"):
        return reason
    finish = row.value.get("finish_reason") or row.value.get("finish_reasons")
    if any(f'"{cut}"' in describe(finish) or finish == [[cut]] for cut in CUT):
        return "cut_off"
    return why_unread(sample["text"], "strict") if sample["status"] in ("", "invalid") else ""


def chosen_samples(file: Path, run: str, section: str, most: int, warnings: list[str]) -> tuple[list, Counter[str]]:
    """Returns up to `most` samples of a file in its order, spread evenly over stage, kind and outcome, and the counts
    of all outcomes.

    Args:
        run, section: the names of the run and of its part; the section is the stage of a row that does not name it.
    """
    buckets: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
    outcomes: Counter[str] = Counter()
    for number, sample in enumerate(read_samples(file, warnings)):
        sample |= {"run": run, "step": ""} | _of_text(sample, section)
        outcomes[sample["outcome"]] += 1
        bucket = buckets.setdefault((sample["stage"], sample["kind"], sample["outcome"]), [])
        if len(bucket) < most:  # memory does not grow with the file
            bucket.append((number, sample))
    # The first of every bucket is chosen, then the second of every bucket, and so on.
    turns = sorted((turn, number) for bucket in buckets.values() for turn, (number, _) in enumerate(bucket))
    chosen = {number for _, number in turns[:most]}
    kept = {number: sample for bucket in buckets.values() for number, sample in bucket if number in chosen}
    return [sample for _, sample in sorted(kept.items())], outcomes


def chosen_rollouts(file: Path, run: str, section: str, most: int, warnings: list[str]) -> tuple[list, int]:
    """Returns up to `most` rollouts, spread evenly over the file, which is in the order of the steps; and their number.
    See `chosen_samples` for the arguments."""
    total = sum(1 for _ in whole_rows(file, []))
    wanted = {round(i * (total - 1) / max(1, min(most, total) - 1)) for i in range(min(most, total))}
    found = []
    for number, row in enumerate(whole_rows(file, warnings)):
        if number in wanted:
            sample = _sample(row)
            found.append(sample | {"run": run} | _of_text(sample, section))
    return found, total


def _of_text(sample: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Returns the fields of a sample that come from its text, where the row does not have them."""
    trace = parse_trace(sample["text"])
    kind = (sample["kind"] or trace.kind or "").lower()
    return {"stage": sample["stage"] or section, "kind": kind, "flaws": trace.flaws}


def cards_of(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a card for each question: what its samples have in common, with "traces" in the order of the stages.

    "anchor" is the name that a link to the card has, "number" its place. "order" is the rank of the outcome of the
    last stage in `WRONG_FIRST`; "length" is that of the longest text in characters. Samples without an id are a card
    each.
    """
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for number, sample in enumerate(samples):
        key = tuple(sample[name] for name in CARD) if sample["id"] else (number,)
        grouped.setdefault(key, []).append(dict(sample, blocks=blocks_of(sample["text"])))
    cards, taken = [], Counter[str]()
    for number, traces in enumerate(grouped.values()):
        traces.sort(key=lambda trace: stage_order(trace["stage"]))
        card = {name: traces[0][name] for name in (*CARD, "better", "kind", "task", "temptation")}
        words = (card["id"], f"step {card['step']}" if card["step"] else "")
        anchor = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(filter(None, words)))[:60].strip("-") or "judgement"
        taken[anchor] += 1
        card["anchor"] = f"q-{anchor}" + (f"-{taken[anchor]}" if taken[anchor] > 1 else "")
        card["order"] = WRONG_FIRST.index(traces[-1]["outcome"])
        card["number"] = number
        card["length"] = max(len(trace["text"]) for trace in traces)
        cards.append(card | {"traces": traces})
    return cards


def filters_of(cards: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns the fields that tell the traces of the cards apart, with their values in order."""
    traces = [trace for card in cards for trace in card["traces"]]
    options = {name: sorted({trace[name] for trace in traces} - {""}, key=_option_order) for name in FILTERS}
    return {name: values for name, values in options.items() if 1 < len(values) <= FILTER_OPTIONS}


def _option_order(value: str) -> tuple[float, int, str]:
    return (float(value) if value.isdigit() else -1.0, *stage_order(value))
