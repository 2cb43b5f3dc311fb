"""Packing and batches: no example is truncated or lost, and the seed alone decides the order."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from rmr1_jax.data.examples import Example
from rmr1_jax.data.packing import View, assemble, lengths_of, pack, plan_rows, sft_batches, trained_lengths_of
from rmr1_jax.errors import InputError


def lognormal(n: int, seed: int = 0) -> list[int]:
    """Lengths distributed like those of real traces: most are a fraction of a row, with a long tail."""
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


def test_pack_closes_a_row_with_max_items():
    assert pack([1] * 5, 10, max_items=2) == [[0, 1], [2, 3], [4]]
    assert pack([9, 1, 1, 1, 1], 10, max_items=2) == [[0, 1], [2, 3], [4]]


def test_a_plan_is_a_function_of_lengths_and_seed():
    lengths = lognormal(100)
    plan = plan_rows(lengths, 4096, epochs=3, seed=1)
    assert plan == plan_rows(lengths, 4096, epochs=3, seed=1)
    assert plan != plan_rows(lengths, 4096, epochs=3, seed=2)
    shorter = plan_rows(lengths, 4096, epochs=2, seed=1)
    assert plan[: len(shorter)] == shorter  # more epochs change nothing of the first ones


def test_every_epoch_has_every_example_once_in_a_different_order():
    lengths = [*lognormal(60), 5000]
    one, two, three = (plan_rows(lengths, 4096, epochs=n, seed=0) for n in (1, 2, 3))
    epochs = [one, two[len(one) :], three[len(two) :]]
    for rows in epochs:
        assert Counter(i for row in rows for i in row) == Counter(range(60))
    assert len({str(rows) for rows in epochs}) == 3


def test_the_emptiest_rows_are_not_all_at_the_end():
    lengths = lognormal(3000)
    filled = [sum(lengths[i] for i in row) for row in plan_rows(lengths, 4096, epochs=1, seed=0)]
    assert np.argmin(filled) < 0.9 * len(filled)


def test_rows_of_the_published_lengths_are_97_percent_full(shared_data):
    """The lengths are those of published rows in characters, scaled to the mean tokens of the paper's rows (1,151 in a
    prompt, 626 in a trace), for as many rows as the published set has. Every row is packed, whole."""
    lines = (shared_data / "published_rows" / "distill_sft.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    characters = np.array([[sum(len(m["content"]) for m in r["context_messages"]), len(r["winner"])] for r in rows])
    tokens = (characters * ([1151, 626] / characters.mean(0))).sum(1).astype(int)
    for seed in range(3):
        lengths = np.random.default_rng(seed).choice(tokens, 8700)
        packed = plan_rows(lengths, 12288, epochs=1, seed=seed)
        assert lengths.sum() / (12288 * len(packed)) >= 0.97
        assert sorted(i for row in packed for i in row) == list(range(8700))
        assert max(lengths[row].sum() for row in packed) <= 12288


def test_epochs_do_not_pack_the_same_examples_together():
    """Only windows are sorted, so the examples that share a row differ between epochs."""
    lengths = lognormal(2000)
    one, two = plan_rows(lengths, 4096, epochs=1, seed=0), plan_rows(lengths, 4096, epochs=2, seed=0)
    pairs = [{(a, b) for row in rows for a in row for b in row if a < b} for rows in (one, two[len(one) :])]
    assert len(pairs[0] & pairs[1]) < 0.05 * len(pairs[0])


def test_assemble():
    scores = [np.asarray(x, np.float32) for x in ([1, 2, 3], [4, 5], [6, 7, 8, 9])]
    a, b, c = (
        SimpleNamespace(tokens=example.tokens, scores=x)
        for example, x in zip(examples_of([3, 2, 4]), scores, strict=True)
    )
    batch = assemble([[a, b], [c], []], 6, ["scores"])
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


def test_the_batches_of_a_run_contain_the_set_once_an_epoch():
    examples = examples_of(LENGTHS)
    batches, total = sft_batches(examples, **RUN)
    batches = list(batches)
    assert len(batches) == total
    for batch in batches:
        assert sum(batch.lengths) == (batch.rows[0].arrays["segment_ids"] > 0).sum()
        assert batch.trained_tokens == batch.rows[0].arrays["trained"].sum()
    batches = [batch.rows[0].arrays for batch in batches]
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
    *_, last = (batch.rows[0].arrays for batch in batches)
    assert total == 2
    assert (last["segment_ids"][0] == 1).all() and not any(v[1].any() for v in last.values())


def test_start_skips_batches_and_changes_nothing_else():
    examples = examples_of(LENGTHS)
    whole, total = sft_batches(examples, **RUN)
    whole = list(whole)
    for start in range(total + 1):
        rest, same = sft_batches(examples, **RUN, start=start)
        rest = list(rest)
        assert same == total and len(rest) == total - start
        for a, b in zip(rest, whole[start:], strict=True):
            assert a[1:] == b[1:]
            for name in b.rows[0].arrays:
                np.testing.assert_array_equal(a.rows[0].arrays[name], b.rows[0].arrays[name])


@pytest.mark.parametrize("own", [[0, 1], [2], [1, 3]], ids=str)
def test_a_process_assembles_only_its_own_rows_and_knows_the_totals(own):
    """A process may have no example in the last batch, which is filled up with empty rows."""
    examples = examples_of(LENGTHS)
    sizes = RUN | {"batch_rows": 4}
    empty = False
    for part, whole in zip(sft_batches(examples, **sizes, own=own)[0], sft_batches(examples, **sizes)[0], strict=True):
        assert part[1:] == whole[1:]
        for name, rows in part.rows[0].arrays.items():
            np.testing.assert_array_equal(rows, whole.rows[0].arrays[name][own])
        empty |= not part.rows[0].arrays["segment_ids"].any()
    assert empty == (own == [2])


class Counted:
    """Examples with known lengths, like a prepared set; records which of them were read."""

    def __init__(self, examples):
        self.examples, self.read = examples, []
        self.lengths, self.trained_lengths = lengths_of(examples), trained_lengths_of(examples)

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        self.read.append(int(index))
        return self.examples[index]


def hosts_rows(hosts: int, host: int, rows: int) -> list[int]:
    return list(range(host * rows // hosts, (host + 1) * rows // hosts))


def run_on(examples, hosts: int, start: int = 0, **sizes) -> list[dict]:
    """The global batches of a run on some hosts, concatenated from the parts that each host assembles."""
    parts = [
        sft_batches(examples, **sizes, start=start, own=hosts_rows(hosts, host, sizes["batch_rows"]))[0]
        for host in range(hosts)
    ]
    joined = []
    for batches in zip(*parts, strict=True):
        assert len({str(batch[1:]) for batch in batches}) == 1  # all hosts know the same totals
        joined.append(
            {k: np.concatenate([batch.rows[0].arrays[k] for batch in batches]) for k in batches[0].rows[0].arrays}
        )
    return joined


def test_global_batches_do_not_depend_on_the_number_of_hosts_even_if_it_changes():
    examples = examples_of(lognormal(40))
    sizes = {"row_length": 4096, "batch_rows": 4, "epochs": 3, "seed": 5}
    whole = run_on(examples, 1, **sizes)
    assert len(whole) > 4
    for hosts in (2, 4):
        for start in range(len(whole)):  # a run on another number of hosts stopped there
            rest = run_on(examples, hosts, start, **sizes)
            assert len(rest) == len(whole) - start
            for a, b in zip(rest, whole[start:], strict=True):
                for name in b:
                    np.testing.assert_array_equal(a[name], b[name])


def test_a_host_reads_only_the_rows_that_it_assembles():
    examples = examples_of(lognormal(200))
    sizes = {"row_length": 4096, "batch_rows": 4, "epochs": 1, "seed": 0}
    read = []
    for host in range(4):
        counted = Counted(examples)
        batches, _ = sft_batches(counted, **sizes, own=[host])
        assert not counted.read  # planning reads no example
        whole = [batch.items for batch in batches]
        read.append(counted.read)
    assert sorted(i for part in read for i in part) == list(range(200)) == sorted(i for items in whole for i in items)


def test_a_view_knows_its_lengths_without_reading():
    examples = Counted(examples_of(lognormal(50)))
    chosen = np.flatnonzero(lengths_of(examples) < 600)
    view = View(examples, chosen, lambda example: example.id)
    assert 0 < len(view) < 50
    np.testing.assert_array_equal(lengths_of(view), examples.lengths[chosen])
    np.testing.assert_array_equal(trained_lengths_of(view), examples.trained_lengths[chosen])
    assert not examples.read
    assert list(view) == [f"e{i}" for i in chosen] and examples.read == chosen.tolist()
    nested = View(view, np.array([2, 0]))
    assert list(nested) == [view[2], view[0]] and nested.lengths.tolist() == view.lengths[[2, 0]].tolist()


def test_the_first_token_of_a_segment_is_never_trained():
    """No token precedes it in its example: in a packed row another example would predict it."""
    examples = [Example(str(i), np.full(10, i, np.int32), np.ones(10, bool)) for i in range(6)]
    for batch in (batch.rows[0].arrays for batch in sft_batches(examples, **RUN)[0]):
        np.testing.assert_array_equal(batch["trained"], (batch["positions"] > 0) & (batch["segment_ids"] > 0))


def test_what_is_refused():
    with pytest.raises(InputError, match="nothing to train on"):
        sft_batches([], **RUN)
    with pytest.raises(
        InputError, match=r"2 examples .* row_length=48 tokens \(the longest, e1, has 60\).*on_too_long"
    ):
        sft_batches(examples_of([49, 60, 48]), **RUN)
