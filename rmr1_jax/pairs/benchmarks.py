"""Makes preference pairs of the rows of RewardBench, RM-Bench and RMB, in the A/B order of the published evaluations;
and of RewardBench 2, whose published evaluations are not pairwise.

Next: `pairs/read.py`, which opens the files; `eval/`, which scores the judgements.
"""

from __future__ import annotations

import itertools

from rmr1_jax.pairs.benchmark_names import benchmark_of
from rmr1_jax.pairs.order import Order
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.pairs.rows import Row, describe

STYLES = 3  # RM-Bench: 0 concise, 1 detailed and plain, 2 detailed with markdown


def parse_rewardbench(row: Row, order: Order) -> list[PreferencePair]:
    """Row {prompt, chosen, rejected, subset, id} -> one pair, id `subset/id`; draw k for row k.

    The published ids alone are not unique: 3692 occurs in `donotanswer` and in `hep-python`.
    """
    subset, number = row.text("subset"), row.identifier("id")
    question, chosen, rejected = row.text("prompt"), row.text("chosen"), row.text("rejected")
    rest = {key: value for key, value in row.value.items() if key not in ("prompt", "chosen", "rejected")}
    pair = PreferencePair.from_preference(
        f"{subset}/{number}",
        [("user", question), ("assistant", chosen)],
        [("user", question), ("assistant", rejected)],
        chosen_in_b=order.by_number(row.place.index),
        meta={"benchmark": "rewardbench", **rest, "index": row.place.index},
    )
    return [pair]


def parse_rewardbench_2(row: Row, order: Order) -> list[PreferencePair]:
    """Row {prompt, chosen[], rejected[] [, subset, id, num_correct]} -> a pair `subset/id#i-j` for each chosen answer i
    and rejected answer j, ordered by (seed, id). `meta["item"]` is the same for all pairs of a row. The row may be of
    another set that lists its answers so; `meta` names the benchmark where it is of one.

    Most subsets have one chosen answer and three rejected ones; Ties has several right answers.
    """
    item, question = row.name(), row.text("prompt")
    if row.value.get("subset") is not None:
        item = f"{row.text('subset')}/{item}"
    chosen, rejected = (_texts(row, name) for name in ("chosen", "rejected"))
    for name, texts in (("chosen", chosen), ("rejected", rejected)):
        if not texts:
            raise row.bad(name, "is empty, expected at least one answer")
    if row.value.get("num_correct", len(chosen)) != len(chosen):
        raise row.bad("num_correct", f"is {describe(row.value['num_correct'])}, and chosen has {len(chosen)} answers")
    rest = {key: value for key, value in row.value.items() if key not in ("prompt", "chosen", "rejected")}
    if own := benchmark_of(row):
        rest = {"benchmark": own, **rest}
    return [
        PreferencePair.from_preference(
            name := f"{item}#{i}-{j}",
            [("user", question), ("assistant", chosen[i])],
            [("user", question), ("assistant", rejected[j])],
            chosen_in_b=order.by_id(name),
            meta={"item": item, **rest},
        )
        for i, j in itertools.product(range(len(chosen)), range(len(rejected)))
    ]


def parse_rm_bench(row: Row, order: Order) -> list[PreferencePair]:
    """Item {id, prompt, chosen[3], rejected[3], domain} -> nine pairs `id#i-j`: chosen style i, rejected style j.

    Style i of item k uses draw k + i x items in each of the three published files, which pair it with the rejected
    style j = i, i + 1, i + 2 (mod 3). `meta["file"]` is that file's number.
    """
    name, question, domain = row.identifier("id"), row.text("prompt"), row.text("domain")
    chosen, rejected = _styles(row, "chosen"), _styles(row, "rejected")
    pairs = []
    for file, i in itertools.product(range(STYLES), repeat=2):
        j = (i + file) % STYLES
        meta = {"benchmark": "rm-bench", "item": name, "domain": domain, "file": file + 1}
        pair = PreferencePair.from_preference(
            f"{name}#{i}-{j}",
            [("user", question), ("assistant", chosen[i])],
            [("user", question), ("assistant", rejected[j])],
            chosen_in_b=order.by_number(row.place.index + i * order.items),
            meta={**meta, "chosen_style": i, "rejected_style": j, "index": row.place.index},
        )
        pairs.append(pair)
    return pairs


def parse_rmb(row: Row, order: Order) -> list[PreferencePair]:
    """Pairwise or best-of-N item -> one pair, or one for each (best, loser); judgement k uses draw k.

    The ids are `category_path#pair_uid` and `category_path#bon_uid-loser`. `meta["item"]` is the same for all pairs of
    an item, which counts as right only if all of them are.
    """
    pairwise = "pair_uid" in row.value
    losers = row.value.get("loser_list")
    draw = order.reserve(len(losers) if isinstance(losers, list) else 1)  # first: a bad row keeps the others' draws
    category = row.text("category_path")
    item = f"{category}#{row.identifier('pair_uid' if pairwise else 'bon_uid')}"
    asked = row.conversation("conversation_input", last="user")
    best_field = "chosen" if pairwise else "bon_best"
    best, best_model = _answer(row, best_field, row.get(best_field))
    if pairwise:
        against = [_answer(row, "reject", row.get("reject"))]
    else:
        against = [_answer(row, f"loser_list[{k}]", value) for k, value in enumerate(row.sequence("loser_list"))]
    if not against:
        raise row.bad("loser_list", "is empty, expected at least one answer")
    kind = "pairwise" if pairwise else "best-of-n"
    meta = {"benchmark": "rmb", "kind": kind, "category": category, "item": item, "chosen_model": best_model}
    return [
        PreferencePair.from_preference(
            item if pairwise else f"{item}-{k}",
            [*asked, ("assistant", best)],
            [*asked, ("assistant", worse)],
            chosen_in_b=order.by_number(draw + k),
            meta={**meta, "rejected_model": model},
        )
        for k, (worse, model) in enumerate(against)
    ]


def _styles(row: Row, name: str) -> list[str]:
    styles = _texts(row, name)
    if len(styles) != STYLES:
        raise row.bad(name, f"has {len(styles)} answers, expected {STYLES}, one of each style")
    return styles


def _texts(row: Row, name: str) -> list[str]:
    return [row.checked_text(value, f"{name}[{k}]") for k, value in enumerate(row.sequence(name))]


def _answer(row: Row, name: str, value: object) -> tuple[str, object]:
    """Return the text of an RMB answer, and the model that wrote it."""
    answer = row.mapping(value, name, ("answer",))
    return row.checked_text(answer["answer"], f"{name}.answer"), answer.get("llm_name")
