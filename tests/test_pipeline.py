"""Packing and batches: nothing cut, nothing lost, and an order that the seed alone decides."""

from collections import Counter

import numpy as np
import pytest

from rmr1_jax.data.pipeline import assemble, pack, plan_rows, sft_batches
from rmr1_jax.data.tokens import Example
from rmr1_jax.errors import InputError


def lognormal(n: int, seed: int = 0) -> list[int]:
    """Lengths spread like those of real traces: most a fraction of a row, a long tail."""
    drawn = np.random.default_rng(seed).lognormal(mean=np.log(600), sigma=0.6, size=n)
    return np.clip(drawn, 1, 4096).astype(int).tolist()


def examples_of(lengths: list[int]) -> list[Example]:
    """Example i holds the token i + 1 throughout; its second half is trained."""
    return [Example(f"e{i}", np.full(n, i + 1, np.int32), np.arange(n) >= n // 2) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(3))
def test_pack_places_every_item_once_and_fills_rows(seed):
    lengths = lognormal(2000, seed)
    order = np.random.default_rng(seed).permutation(2000)
    for rows in (pack(lengths, 4096), pack(lengths, 4096, order)):
        assert sorted(i for row in rows for i in row) == list(range(2000))
        filled = [sum(lengths[i] for i in row) for row in rows]
        assert max(filled) <= 4096
        assert sum(filled) / (4096 * len(rows)) >= 0.9


def test_pack_is_first_fit():
    assert pack([5, 6, 3, 2, 4, 1], 10) == [[0, 2, 3], [1, 4], [5]]
    assert pack([5, 6, 3, 2, 4, 1], 10, [5, 4, 3]) == [[5, 4, 3]]
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([], 10) == []


def test_pack_closes_a_row_that_holds_its_most():
    assert pack([1] * 5, 10, most=2) == [[0, 1], [2, 3], [4]]
    assert pack([9, 1, 1, 1, 1], 10, most=2) == [[0, 1], [2, 3], [4]]


def test_a_plan_is_a_function_of_lengths_and_seed():
    lengths = lognormal(100)
    plan = plan_rows(lengths, 4096, epochs=3, seed=1)
    assert plan == plan_rows(lengths, 4096, epochs=3, seed=1)
    assert plan.rows != plan_rows(lengths, 4096, epochs=3, seed=2).rows
    shorter = plan_rows(lengths, 4096, epochs=2, seed=1).rows
    assert plan.rows[: len(shorter)] == shorter  # more epochs change nothing of the first ones


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
    lengths = [*lognormal(60), 5000]
    one, two, three = (plan_rows(lengths, 4096, epochs=n, seed=0) for n in (1, 2, 3))
    epochs = [one.rows, two.rows[len(one.rows) :], three.rows[len(two.rows) :]]
    for rows in epochs:
        assert Counter(i for row in rows for i in row) == Counter(range(60))
    assert len({str(rows) for rows in epochs}) == 3
    assert one.too_long == [60]


def test_emptier_rows_are_not_all_at_the_end():
    lengths = lognormal(3000)
    filled = [sum(lengths[i] for i in row) for row in plan_rows(lengths, 4096, epochs=1, seed=0).rows]
    assert np.argmin(filled) < 0.9 * len(filled)


def test_assemble():
    items = examples_of([3, 2, 4])
    scores = [np.asarray(x, np.float32) for x in ([1, 2, 3], [4, 5], [6, 7, 8, 9])]
    batch = assemble([[0, 1], [2], []], items, 6, scores=scores)
    expected = {
        "tokens": [[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 0, 0], [0] * 6],
        "positions": [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0], [0] * 6],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * 6],
        "scores": [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0], [0] * 6],
    }
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values)
        assert batch[name].dtype == (np.float32 if name == "scores" else np.int32)


LENGTHS = [30, 20, 17, 9, 33, 40, 12, 5, 26, 8, 14]
RUN = {"row_length": 48, "batch_rows": 2, "epochs": 2, "seed": 3}


def test_batches_of_a_run_are_the_set_once_an_epoch():
    examples = examples_of(LENGTHS)
    batches, total = sft_batches(examples, **RUN)
    batches = list(batches)
    assert len(batches) == total
    for batch in batches:
        assert sum(batch.lengths) == (batch.rows["segment_ids"] > 0).sum()
        assert batch.trained_tokens == batch.rows["trained"].sum()
    batches = [batch.rows for batch in batches]
    tokens = Counter(np.concatenate([b["tokens"].ravel() for b in batches]).tolist())
    trained = Counter(np.concatenate([b["tokens"][b["trained"] > 0] for b in batches]).tolist())
    del tokens[0]
    assert tokens == {i + 1: 2 * n for i, n in enumerate(LENGTHS)}
    assert trained == {i + 1: 2 * (n - n // 2) for i, n in enumerate(LENGTHS)}
    for batch in batches:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: ((2, 48), np.float32 if k == "trained" else np.int32)
            for k in ("tokens", "positions", "segment_ids", "trained")
        }


def test_the_last_batch_is_filled_up_with_empty_rows():
    batches, total = sft_batches(examples_of([48, 48, 48]), **RUN | {"epochs": 1})
    *_, last = (batch.rows for batch in batches)
    assert total == 2
    assert (last["segment_ids"][0] == 1).all() and not any(v[1].any() for v in last.values())


def test_start_drops_batches_and_changes_nothing_else():
    examples = examples_of(LENGTHS)
    whole, total = sft_batches(examples, **RUN)
    whole = list(whole)
    for start in range(total + 1):
        rest, same = sft_batches(examples, **RUN, start=start)
        rest = list(rest)
        assert same == total and len(rest) == total - start
        for a, b in zip(rest, whole[start:], strict=True):
            assert a[1:] == b[1:]
            for name in b.rows:
                np.testing.assert_array_equal(a.rows[name], b.rows[name])


@pytest.mark.parametrize("own", [[0, 1], [2], [1, 3]], ids=str)
def test_a_process_assembles_its_own_rows_and_knows_the_sums_of_all(own):
    """A part may be without any example: the last batch is filled up."""
    examples = examples_of(LENGTHS)
    sizes = RUN | {"batch_rows": 4}
    empty = False
    for part, whole in zip(sft_batches(examples, **sizes, own=own)[0], sft_batches(examples, **sizes)[0], strict=True):
        assert part[1:] == whole[1:]
        for name, rows in part.rows.items():
            np.testing.assert_array_equal(rows, whole.rows[name][own])
        empty |= not part.rows["segment_ids"].any()
    assert empty == (own == [2])


def test_the_first_token_of_a_segment_is_never_trained():
    """Nothing of its own stands before it: packed, its prediction would come from another example."""
    examples = [Example(str(i), np.full(10, i, np.int32), np.ones(10, bool)) for i in range(6)]
    for batch in (batch.rows for batch in sft_batches(examples, **RUN)[0]):
        np.testing.assert_array_equal(batch["trained"], (batch["positions"] > 0) & (batch["segment_ids"] > 0))


def test_what_is_refused():
    with pytest.raises(InputError, match="nothing to train on"):
        sft_batches([], **RUN)
    with pytest.raises(
        InputError, match=r"2 examples .* row_length=48 tokens \(the longest, e1, has 60\).*on_too_long"
    ):
        sft_batches(examples_of([49, 60, 48]), **RUN)
