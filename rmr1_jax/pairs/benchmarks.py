"""The rows of RewardBench, RM-Bench and RMB as preference pairs, in the A/B order of the published evaluations.

Which of the two answers the chosen one is shown as decides up to 8 points on RMB, so the order is part of the data: a
draw for every judgement, in data-set order. The published runs drew from NumPy's legacy generator with seed 0.

Next: `data/preferences.py`, which opens the files; `eval/`, which scores the judgements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import ROLES, PreferencePair
from rmr1_jax.pairs.rows import Row

STYLES = 3  # RM-Bench: 0 concise, 1 detailed and plain, 2 detailed with markdown


class OrderFlags(Protocol):
    """flags[k]: whether judgement k shows the chosen answer in B. A list of bools is one."""

    def __getitem__(self, draw: int, /) -> bool: ...


class LegacyFlags:
    """flags[k] is `rand() > 0.5` at draw k of NumPy's legacy generator, as the published evaluations drew them."""

    def __init__(self, seed: int = 0):
        if not 0 <= seed < 2**32:
            raise InputError(f"seed={seed}: NumPy's legacy generator takes 0 to {2**32 - 1}")
        self._random = np.random.RandomState(seed)
        self._flags: list[bool] = []

    def __getitem__(self, draw: int) -> bool:
        while draw >= len(self._flags):
            self._flags += (self._random.rand(4096) > 0.5).tolist()
        return self._flags[draw]


def rewardbench_parser(flags: OrderFlags) -> Callable[[Row], list[PreferencePair]]:
    """Row {prompt, chosen, rejected, subset, id} -> one pair, id `subset/id`; draw k for row k.

    The published ids alone will not do: 3692 stands in `donotanswer` and in `hep-python`.
    """

    def parse(row: Row) -> list[PreferencePair]:
        subset, number = row.text("subset"), row.identifier("id")
        question, chosen, rejected = row.text("prompt"), row.text("chosen"), row.text("rejected")
        rest = {key: value for key, value in row.value.items() if key not in ("prompt", "chosen", "rejected")}
        meta = {"benchmark": "rewardbench", **rest, "index": row.place.index}
        return [
            PreferencePair.from_preference(
                f"{subset}/{number}",
                [("user", question), ("assistant", chosen)],
                [("user", question), ("assistant", rejected)],
                chosen_in_b=_flag(flags, row.place.index),
                meta=meta,
            )
        ]

    return parse


def rm_bench_parser(flags: OrderFlags, items: int) -> Callable[[Row], list[PreferencePair]]:
    """Item {id, prompt, chosen[3], rejected[3], domain} -> nine pairs `id#i-j`: chosen style i, rejected style j.

    `items` is the number of items in the data set: style i of item k uses draw k + i x items, in each of the three
    published files, which pair rejected style j = i, i + 1, i + 2 (mod 3). `meta["file"]` is that file's number.
    """

    def parse(row: Row) -> list[PreferencePair]:
        name, question, domain = row.identifier("id"), row.text("prompt"), row.text("domain")
        chosen, rejected = _three_styles(row, "chosen"), _three_styles(row, "rejected")
        pairs = []
        for file in range(STYLES):
            for i in range(STYLES):
                j = (i + file) % STYLES
                meta = {"benchmark": "rm-bench", "item": name, "domain": domain, "file": file + 1}
                pair = PreferencePair.from_preference(
                    f"{name}#{i}-{j}",
                    [("user", question), ("assistant", chosen[i])],
                    [("user", question), ("assistant", rejected[j])],
                    chosen_in_b=_flag(flags, row.place.index + i * items),
                    meta={**meta, "chosen_style": i, "rejected_style": j, "index": row.place.index},
                )
                pairs.append(pair)
        return pairs

    return parse


def rmb_parser(flags: OrderFlags) -> Callable[[Row], list[PreferencePair]]:
    """Pairwise or best-of-N item -> one pair, or one for each (best, loser); judgement k uses draw k.

    The ids are `category_path#pair_uid` and `category_path#bon_uid-loser`; `meta["item"]` is the same for all pairs of
    an item, which counts as right only if all of them are.
    """
    drawn = 0

    def parse(row: Row) -> list[PreferencePair]:
        nonlocal drawn
        pairwise = "pair_uid" in row.value
        losers = row.value.get("loser_list")
        draw = drawn
        drawn += len(losers) if isinstance(losers, list) else 1  # a rejected item keeps the others' draws in place
        category = row.text("category_path")
        item = f"{category}#{row.identifier('pair_uid' if pairwise else 'bon_uid')}"
        asked = row.messages("conversation_input", ROLES, last="user")
        best_field = "chosen" if pairwise else "bon_best"
        best, best_model = _rmb_answer(row, best_field, row.get(best_field))
        if pairwise:
            against = [_rmb_answer(row, "reject", row.get("reject"))]
        else:
            worse_ones = row.sequence("loser_list")
            against = [_rmb_answer(row, f"loser_list[{k}]", value) for k, value in enumerate(worse_ones)]
        if not against:
            raise row.bad("loser_list", "is empty, expected at least one answer")
        kind = "pairwise" if pairwise else "best-of-n"
        meta = {"benchmark": "rmb", "kind": kind, "category": category, "item": item, "chosen_model": best_model}
        return [
            PreferencePair.from_preference(
                item if pairwise else f"{item}-{k}",
                [*asked, ("assistant", best)],
                [*asked, ("assistant", worse)],
                chosen_in_b=_flag(flags, draw + k),
                meta={**meta, "rejected_model": model},
            )
            for k, (worse, model) in enumerate(against)
        ]

    return parse


def _three_styles(row: Row, name: str) -> Sequence[str]:
    styles = [row.checked_text(value, f"{name}[{k}]") for k, value in enumerate(row.sequence(name))]
    if len(styles) != STYLES:
        raise row.bad(name, f"has {len(styles)} answers, expected {STYLES}, one of each style")
    return styles


def _rmb_answer(row: Row, name: str, value: object) -> tuple[str, object]:
    answer = row.mapping(value, name, ("answer",))
    return row.checked_text(answer["answer"], f"{name}.answer"), answer.get("llm_name")


def _flag(flags: OrderFlags, draw: int) -> bool:
    try:
        return bool(flags[draw])
    except IndexError as error:
        raise InputError(f"the A/B order flags end before draw {draw}; give one for every judgement") from error
