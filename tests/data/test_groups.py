"""Packing of groups, whose prompts count once a row."""

import json
from collections import Counter

import numpy as np
import pytest

from rmr1_jax.data.groups import pack_groups


def random_groups(seed: int, count: int = 40, longest: int = 30):
    """Prompts, the numbers of each one's responses (some have none), and the lengths of all responses."""
    rng = np.random.default_rng(seed)
    prompts, sizes = rng.integers(1, longest, count).tolist(), rng.integers(0, 9, count)
    ends = np.cumsum(sizes)
    groups = [list(range(end - n, end)) for end, n in zip(ends, sizes, strict=True)]
    return prompts, groups, rng.integers(1, longest, ends[-1]).tolist()


@pytest.mark.parametrize("limits", [{}, {"max_items": 3}, {"max_separate": 1.4}, {"max_items": 1, "max_separate": 1}])
def test_every_response_is_in_one_row_with_its_own_prompt(limits):
    for seed in range(5):
        prompts, groups, lengths = random_groups(seed)
        rows = pack_groups(prompts, groups, lengths, 64, **limits)
        held = Counter((piece.prompt, i) for row in rows for piece in row for i in piece.responses)
        assert held == Counter((g, i) for g, group in enumerate(groups) for i in group)
        for row in rows:
            assert row and len({piece.prompt for piece in row}) == len(row)  # a prompt counts once
            responses = [i for piece in row for i in piece.responses]
            assert sum(prompts[p.prompt] - 1 for p in row) + sum(1 + lengths[i] for i in responses) <= 64
            assert len(responses) <= limits.get("max_items", 99)
            separate = sum(prompts[p.prompt] + lengths[i] for p in row for i in p.responses)
            assert separate <= 64 * limits.get("max_separate", 99)


def test_a_group_is_split_only_where_it_must_be_or_saves_a_row():
    assert pack_groups([5, 5], [[0, 1], [2, 3]], [3, 3, 3, 3], 24) == [[(0, [0, 1]), (1, [2, 3])]]
    assert pack_groups([5, 5], [[0, 1], [2, 3]], [3, 3, 3, 3], 22) == [[(0, [0, 1])], [(1, [2, 3])]]
    assert pack_groups([5], [[0, 1, 2]], [9, 8, 7], 24) == [[(0, [0, 1])], [(0, [2])]]
    # Three groups of 31 tokens: rows of 52 hold them in two if one is split, which repeats its prompt.
    split = pack_groups([2] * 3, [[0, 1, 2], [3, 4, 5], [6, 7, 8]], [9] * 9, 52)
    assert split == [[(0, [0, 1, 2]), (1, [3, 4])], [(1, [5]), (2, [6, 7, 8])]]
    assert pack_groups([7, 9], [[], []], [], 64) == []


def test_rows_of_the_published_lengths(shared_data):
    """At the lengths of the published rows (see `test_packing.py`), 7 responses to each of 128 prompts: rows are full,
    and all have half of the positions that prompts of their own would take."""
    lines = (shared_data / "published_rows" / "distill_sft.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    characters = np.array([[sum(len(m["content"]) for m in r["context_messages"]), len(r["winner"])] for r in rows])
    tokens = (characters * ([1151, 700] / characters.mean(0))).astype(int)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        prompts = np.minimum(rng.choice(tokens[:, 0], 128), 4096).tolist()
        lengths = np.minimum(rng.choice(tokens[:, 1], 896), 8192).tolist()
        groups = np.arange(896).reshape(128, 7).tolist()
        packed = pack_groups(prompts, groups, lengths, 12288)
        distinct = sum(prompts) + sum(lengths)
        assert distinct / (12288 * len(packed)) > 0.9
        assert 12288 * len(packed) < 0.52 * (7 * sum(prompts) + sum(lengths))
