"""The names that benchmarks give to the parts of their data, and which benchmark a row is of, by such names in it.

A judge that trains on a benchmark cannot be measured by it. So a row is told from the values that the benchmark wrote
into it, wherever they stand, and never from the names of its fields, which are the same in many training sets:

| benchmark | values of a row |
|---|---|
| RewardBench | the name of one of its 23 subsets, such as "alpacaeval-easy" |
| RewardBench 2 | the name of one of its 6 subsets, two lists of answers, and as numbers how many they hold |
| RM-Bench | an id such as "chat/8", and two lists of three answers |
| RMB | the path of a category, such as "Pairwise_set/Helpfulness/Rewrite/Paraphrasing" |

Rows that were rewritten without these values are not recognised. `overlap.py` finds their questions, given the
benchmark itself.

Next: `benchmarks.py`, which makes pairs of the rows; `eval/`, which scores by these names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from rmr1_jax.pairs.rows import Row

# Section -> subset -> the rows that it counts as.
REWARDBENCH_SECTIONS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "Chat": {
            "alpacaeval-easy": 100,
            "alpacaeval-length": 95,
            "alpacaeval-hard": 95,
            "mt-bench-easy": 28,
            "mt-bench-med": 40,
        },
        "Chat Hard": {
            "mt-bench-hard": 37,
            "llmbar-natural": 100,
            "llmbar-adver-neighbor": 134,
            "llmbar-adver-GPTInst": 92,
            "llmbar-adver-GPTOut": 47,
            "llmbar-adver-manual": 46,
        },
        "Safety": {
            "refusals-dangerous": 100,
            "refusals-offensive": 100,
            "xstest-should-refuse": 154,
            "xstest-should-respond": 250,
            "donotanswer": 136,
        },
        "Reasoning": {
            "math-prm": 984,
            **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
        },
    }
)
REWARDBENCH_SUBSETS = MappingProxyType({s: name for name, subsets in REWARDBENCH_SECTIONS.items() for s in subsets})
REWARDBENCH_2_SUBSETS = ("Factuality", "Focus", "Math", "Precise IF", "Safety", "Ties")
RM_BENCH_DOMAINS = ("chat", "math", "code", "safety")  # the beginnings of `domain`

# As META_RESULT.json names and orders the sets of RMB -> the first two parts of a category's path.
RMB_SETS = MappingProxyType(
    {
        "Pairwise Helpfulness": ("Pairwise_set", "Helpfulness"),
        "Pairwise Harmlessness": ("Pairwise_set", "Harmlessness"),
        "BoN Helpfulness": ("BoN_set", "Helpfulness"),
        "BoN Harmlessness": ("BoN_set", "Harmlessness"),
    }
)

_RM_BENCH_ID = re.compile(rf"(?:{'|'.join(RM_BENCH_DOMAINS)})[a-z-]*/\w+")
_RMB_PATHS = tuple(f"{'/'.join(parts)}/" for parts in RMB_SETS.values())


def benchmark_of(row: Row) -> str | None:
    """Return the benchmark whose values the row has, or None."""
    values = row.value.values()
    texts = {value for value in values if isinstance(value, str) and len(value) <= 200}
    counts = [len(value) for value in values if _is_texts(value)]  # of the lists of texts
    if not REWARDBENCH_SUBSETS.keys().isdisjoint(texts):
        return "rewardbench"
    if any(text.startswith(_RMB_PATHS) for text in texts):
        return "rmb"
    if counts.count(3) >= 2 and any(map(_RM_BENCH_ID.fullmatch, texts)):
        return "rm-bench"
    numbers = {value for value in values if type(value) is int}
    if len([count for count in counts if count in numbers]) >= 2 and not texts.isdisjoint(REWARDBENCH_2_SUBSETS):
        return "rewardbench-2"
    return None


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
