"""The host's record of slots and prompts: a bank by itself, and the whole engine over a simulated device."""

import functools
import zlib

import numpy as np
import pytest

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh, single_device_mesh
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import module_for
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.cache import Cache
from rmr1_jax.sampler.engine import Engine
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.slots import FREE, Bank

STOP, STEPS = 1, programs.STEPS


@functools.cache
def script(hash_: int, sample: int, max_new: int, mean: float) -> np.ndarray:
    """What a simulated model writes: tokens that no other sample has, a stop after a random number of them."""
    length = int(np.random.default_rng([hash_, sample]).geometric(1 / mean))
    tokens = 100 + (hash_ % 9973 * 31 + sample) * 1000 + np.arange(min(length, max_new))
    if length <= max_new:
        tokens[-1] = STOP
    return tokens.astype(np.int32)


def simulate(slots, leave_at: int, max_new: int, mean: float):
    """`programs.decode` for one bank: tokens, and values that say which token they belong to; [B, STEPS] each."""
    live, drawn = slots.live.copy(), slots.drawn.copy()
    tokens = np.full((len(live), STEPS), -1, np.int32)
    steps = 0
    while steps < STEPS and live.sum() > leave_at:
        for b in np.nonzero(live)[0]:
            text = script(int(slots.prompt_hash[b]), int(slots.sample[b]), max_new, mean)
            tokens[b, steps] = text[drawn[b]]
            drawn[b] += 1
            live[b] = drawn[b] < len(text)
        steps += 1
    return tokens, tokens / 2, tokens / 4, steps


def check(bank: Bank) -> None:
    """The arrays that go to the device agree with the record."""
    assert [live is not None for live in bank.samples] == bank.arrays.live.tolist()
    for slot in np.nonzero(bank.arrays.live)[0]:
        live, cached = bank.samples[slot], bank.prompts[bank.arrays.entry[slot]]
        assert live.prompt == cached.prompt and live.number == bank.arrays.sample[slot]
        assert bank.arrays.table[bank.arrays.entry[slot], bank.arrays.rank[slot]] == slot
        assert (bank.arrays.prompt_hash[slot], bank.arrays.length[slot]) == (cached.hash, len(cached.tokens))
        assert bank.arrays.drawn[slot] == sum(map(len, live.tokens)) == bank.arrays.step - bank.arrays.start[slot]
        assert bank.arrays.last[slot] == (live.tokens[-1] if live.tokens else cached.tokens)[-1]
        assert bank.arrays.prompt_length[bank.arrays.entry[slot]] == len(cached.tokens) - 1
    assert (bank.arrays.table != FREE).sum() == bank.live_count


# ---- one bank


def test_prompts_are_admitted_to_free_entries_only():
    bank = Bank(slots=4, entries=2, ranks=2)
    assert bank.open_slots == 4 and bank.oldest == 0
    assert bank.admit(7, np.arange(5), 70, 3) == 0
    assert (bank.waiting, bank.open_slots, bank.live_count) == (3, 1, 0)
    assert bank.admit(8, np.arange(9), 80, 1) == 1
    assert bank.admit(9, np.arange(2), 90, 1) is None
    assert (bank.waiting, bank.open_slots) == (4, 0)
    assert bank.arrays.prompt_length.tolist() == [4, 8]  # the last token is the first to be fed


def test_more_samples_than_ranks_and_slots_take_slots_as_they_are_freed():
    bank = Bank(slots=3, entries=2, ranks=2)
    bank.admit(0, np.array([5, 6]), 10, 4)
    bank.fill(4)
    check(bank)
    assert [live and (live.prompt, live.number) for live in bank.samples] == [(0, 0), (0, 1), None]  # two ranks
    bank.admit(1, np.array([7]), 20, 2)
    bank.fill(2)
    check(bank)
    assert [(live.prompt, live.number) for live in bank.samples] == [(0, 0), (0, 1), (1, 0)]  # three slots
    assert bank.waiting == 3 and bank.arrays.last.tolist() == [6, 6, 7] and bank.arrays.length.tolist() == [2, 2, 1]

    tokens = np.array([[11, 12, -1], [11, STOP, -1], [STOP, -1, -1]], np.int32)
    finished = bank.record(tokens, tokens / 2, tokens / 4, 2, {STOP}, 10)
    check(bank)
    assert [(live.prompt, live.number) for live in finished] == [(0, 1), (1, 0)]
    assert np.concatenate(finished[0].tokens).tolist() == [11, STOP]
    assert np.concatenate(finished[0].logp).tolist() == [5.5, STOP / 2]
    assert np.concatenate(finished[0].sampled_logp).tolist() == [2.75, STOP / 4]
    assert (bank.arrays.step, bank.oldest, bank.live_count, bank.open_slots) == (2, 2, 1, -1)
    assert bank.arrays.last[0] == 12 and bank.arrays.drawn[0] == 2 and bank.arrays.prompt_length.tolist() == [1, 0]


def test_an_entry_is_free_when_its_last_sample_has_finished():
    bank = Bank(slots=2, entries=1, ranks=2)
    bank.admit(0, np.array([5, 6]), 10, 3)
    bank.fill(3)
    ends = np.full((2, 1), STOP, np.int32)
    assert len(bank.record(ends, ends, ends, 1, {STOP}, 10)) == 2
    assert bank.admit(1, np.array([5]), 20, 1) is None  # its third sample has not even begun
    bank.fill(3)
    check(bank)
    assert bank.samples[0].number == 2 and bank.arrays.start[0] == 1 and bank.oldest == 0
    ends[1] = -1
    assert [live.number for live in bank.record(ends, ends, ends, 1, {STOP}, 10)] == [2]
    assert bank.admit(1, np.array([5]), 20, 1) == 0


def test_the_limit_ends_a_sample_and_idle_slots_take_nothing():
    bank = Bank(slots=2, entries=1, ranks=2)
    bank.admit(0, np.array([5]), 10, 1)
    bank.fill(1)
    tokens = np.array([[11, 12, 13, 14], [-1] * 4], np.int32)
    assert bank.record(tokens[:, :2], tokens, tokens, 2, {STOP}, 3) == []
    (live,) = bank.record(tokens[:, 2:], tokens, tokens, 1, {STOP}, 3)  # of the two columns one counts
    assert np.concatenate(live.tokens).tolist() == [11, 12, 13]
    assert bank.live_count == 0 and bank.samples == [None, None] and bank.prompts == [None]


@pytest.mark.parametrize(("slots", "entries", "ranks"), [(4, 3, 2), (4, 4, 1), (3, 3, 1)], ids=str)
def test_a_smaller_bank_keeps_its_live_slots(slots, entries, ranks):
    """With the prompts as they are, or with a copy for every slot, of which there may be as many as there were prompts
    before."""
    bank = Bank(slots=5, entries=3, ranks=2)
    for prompt in range(3):
        bank.admit(prompt, np.arange(prompt + 2), 10 * prompt, 2)
    bank.fill(2)
    tokens = np.array([[STOP], [21], [STOP], [23], [24]], np.int32)
    bank.record(tokens, tokens, tokens, 1, {STOP}, 10)
    bank.fill(2)  # the sixth sample comes in where the first has left
    tokens = np.array([[31], [STOP], [-1], [33], [34]], np.int32)
    bank.record(tokens, tokens, tokens, 1, {STOP}, 10)
    check(bank)
    before = {(bank.samples[slot].prompt, bank.samples[slot].number): slot for slot in np.nonzero(bank.arrays.live)[0]}
    was = {
        name: getattr(bank.arrays, name).copy() for name in ("last", "length", "drawn", "start", "entry", "prompt_hash")
    }
    lengths = bank.arrays.prompt_length.copy()
    assert sorted(before) == [(1, 1), (2, 0), (2, 1)]

    order, kept = bank.compact(slots, entries, ranks)
    check(bank)
    assert order.shape == (slots,) and kept.shape == (entries,) and bank.arrays.table.shape == (entries, ranks)
    assert bank.arrays.live.tolist() == [True, True, True, False][:slots]
    for slot in range(3):
        live = bank.samples[slot]
        old = before[live.prompt, live.number]
        assert order[slot] == old and kept[bank.arrays.entry[slot]] == was["entry"][old]
        for name in ("last", "length", "drawn", "start", "prompt_hash"):
            assert getattr(bank.arrays, name)[slot] == was[name][old], name
    np.testing.assert_array_equal(bank.arrays.prompt_length, lengths[kept])
    if ranks == 1:
        assert bank.arrays.entry[:3].tolist() == [0, 1, 2]  # each slot has its own
    else:
        np.testing.assert_array_equal(kept, np.arange(3))
    # All end where they are, and the bank is empty.
    tokens = np.full((slots, 1), STOP, np.int32)
    assert len(bank.record(tokens, tokens, tokens, 1, {STOP}, 10)) == 3
    assert bank.live_count == 0 and (bank.arrays.table == FREE).all()


def test_a_smaller_bank_refuses_to_drop_live_or_waiting_samples():
    bank = Bank(slots=3, entries=2, ranks=2)
    bank.admit(0, np.array([5]), 10, 2)
    bank.fill(2)
    with pytest.raises(AssertionError):
        bank.compact(1, 1, 1)
    bank.admit(1, np.array([5]), 10, 3)
    with pytest.raises(AssertionError):
        bank.compact(2, 2, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("slots", "entries", "n"), [(1, 1, 3), (5, 3, 4), (8, 6, 1), (7, 7, 7)], ids=str)
def test_every_sample_gets_its_own_tokens_and_no_other_s(slots, entries, n, seed):
    """Random admissions: what a sample holds when it finishes is what was drawn for that prompt and number."""
    rng = np.random.default_rng(seed)
    bank, max_new, mean = Bank(slots, entries, min(n, slots)), 40, 12
    prompts = [rng.integers(0, 9, rng.integers(1, 6)) for _ in range(12)]
    queue, done = list(range(len(prompts))), {}
    while queue or bank.live_count or bank.waiting:
        while queue and bank.open_slots > 0 and bank.admit(queue[0], prompts[queue[0]], queue[0], n) is not None:
            queue.pop(0)
        bank.fill(n)
        check(bank)
        leave_at = rng.integers(0, bank.live_count) if bank.live_count else 0
        for live in bank.record(*simulate(bank.arrays, leave_at, max_new, mean), {STOP}, max_new):
            assert (live.prompt, live.number) not in done
            done[live.prompt, live.number] = live
            values = (np.concatenate(x) for x in (live.tokens, live.logp, live.sampled_logp))
            text = script(live.prompt, live.number, max_new, mean)
            for value, expected in zip(values, (text, text / 2, text / 4), strict=True):
                np.testing.assert_array_equal(value, expected)
        check(bank)
    assert len(done) == len(prompts) * n and bank.prompts == [None] * entries


# ---- the engine over a simulated device

TINY = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
CONFIG = QwenConfig(
    **(TINY | {"model_type": "qwen2", "vocab_size": 50, "max_position_embeddings": 512, "rope_theta": 1e4}),
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "qkv_bias": False, "qk_norm": False},
)


class Device:
    """Stands in for the programs. It computes nothing, but its cache holds which tokens were prefilled where, and every
    shape, width and entry that it is given is checked."""

    def __init__(self, monkeypatch, engine: Engine, texts: list[list[int]], mean: float):
        self.engine, self.mean, self.samples = engine, mean, len(texts) * engine.sampling.n
        self.texts = {zlib.crc32(np.asarray(text, np.int32).tobytes()): text for text in texts}
        self.size, self.sizes = engine.shapes.sizes[0], engine.shapes.sizes[1:]
        self.begun, self.prefilled, self.busy_drawn, self.busy_steps = set(), 0, 0, 0
        for name in ("decode", "prefill", "share_prefix", "grow", "compact"):
            monkeypatch.setattr(programs, name, getattr(self, name))
        monkeypatch.setattr(engine, "empty_cache", self.empty)

    def empty(self, width: int) -> Cache:
        """Prompts of tokens, [X, E, S], and rings that have a width and nothing in them."""
        shapes = self.engine.shapes
        return Cache([np.full((shapes.banks, shapes.entries, shapes.room), -1)], [], [np.zeros((0, 1, 1, width))], [])

    def prefill(self, config, weights, cache, tokens, entry, start, active):
        for x, p in np.argwhere(active):
            row = cache.prompt_k[0][x, entry[x, p], start[x, p] :]
            row[: tokens.shape[2]] = tokens[x, p]  # an error where the chunk is longer than the room
        for x in range(len(entry)):
            pieces = list(zip(entry[x][active[x]].tolist(), start[x][active[x]].tolist(), strict=True))
            assert len(pieces) == len(set(pieces))
        self.prefilled += tokens.size
        return cache

    def share_prefix(self, cache, prefix):
        cache.prompt_k[0][:, :, :prefix] = cache.prompt_k[0][:, :1, :prefix]
        return cache

    def grow(self, cache, *, width):
        assert width > cache.width and width % cache.width == 0 and width in self.engine.shapes.widths
        return cache._replace(own_k=[np.zeros((0, 1, 1, width))])

    def compact(self, cache, slots, entries):
        assert (slots < self.size[0]).all()
        self.size = self.sizes.pop(0)
        assert (slots.shape[1], entries.shape[1]) == self.size[:2]
        return cache._replace(prompt_k=[np.stack([x[e] for x, e in zip(cache.prompt_k[0], entries, strict=True)])])

    def decode(self, config, weights, controls, cache, slots):
        assert slots.table.shape[1:] == self.size[1:] and slots.last.shape[1:] == self.size[:1]
        max_new, (banks, B) = int(controls.max_new), slots.last.shape
        results = []
        for x in range(banks):
            bank = programs.Slots(*(part[x] for part in slots))
            for b in np.nonzero(bank.live)[0]:
                text, e = self.texts[int(bank.prompt_hash[b])], bank.entry[b]
                assert bank.table[e, bank.rank[b]] == b
                assert bank.prompt_length[e] == len(text) - 1 == bank.length[b] - 1
                assert cache.prompt_k[0][x, e, : len(text) - 1].tolist() == text[:-1]
                assert bank.drawn[b] or bank.last[b] == text[-1]
                self.begun.add((int(bank.prompt_hash[b]), int(bank.sample[b])))
            drawn = simulate(bank, int(bank.leave_at), max_new, self.mean)
            age = int((bank.step - bank.start)[bank.live].max(initial=0)) + drawn[3]
            assert min(age, max_new) <= cache.width, "a ring is too narrow for what its slot draws"
            results.append(drawn)
        tokens, logp, sampled_logp, steps = (np.stack(part) for part in zip(*results, strict=True))
        assert steps.max() > 0, "a dispatch that does nothing"
        if len(self.begun) < self.samples:
            self.busy_drawn += (tokens >= 0).sum()
            self.busy_steps += steps.max() * banks * B
        return cache, programs.Drawn(tokens, logp, sampled_logp, steps)


def run_simulated(monkeypatch, texts, *, slots, n, mean, max_new, mesh=None):
    """Sample on a simulated device, and check that every sample is complete and its own."""
    settings = SamplingConfig(n=n, max_new_tokens=max_new, slots=slots)
    mesh = make_mesh(mesh) if mesh else single_device_mesh()
    engine = Engine(module_for(CONFIG), settings, prompts=len(texts), longest=max(map(len, texts)), mesh=mesh)
    device = Device(monkeypatch, engine, texts, mean)
    groups, stats = engine.generate({}, texts, [STOP])
    for text, group in zip(texts, groups, strict=True):
        hash_ = zlib.crc32(np.asarray(text, np.int32).tobytes())
        for number, sample in enumerate(group):
            expected = script(hash_, number, max_new, mean)
            assert sample.token_ids == expected.tolist()
            assert sample.finish_reason == ("stop" if expected[-1] == STOP else "length")
            np.testing.assert_array_equal(sample.logprobs, expected / 2)
            np.testing.assert_array_equal(sample.sampled_logprobs, expected / 4)
    assert {sample.finish_reason for group in groups for sample in group} == {"stop", "length"}
    assert stats.new_tokens == sum(len(sample.token_ids) for group in groups for sample in group)
    assert (stats.busy_new_tokens, stats.busy_row_steps) == (device.busy_drawn, device.busy_steps)
    assert stats.prefill_tokens == device.prefilled and stats.prompt_tokens == sum(map(len, texts))
    assert len(device.sizes) < len(engine.shapes.sizes) - 1  # the last samples ran in fewer rows
    return stats


@pytest.mark.parametrize(
    ("slots", "n", "prompts", "mesh", "mean"),
    [
        (8, 4, 40, None, 40),
        (8, 1, 60, None, 40),
        (64, 7, 30, None, 40),
        (5, 7, 6, None, 40),
        # Several banks run whole dispatches: half of one is lost at a text's end.
        (64, 3, 60, MeshConfig(replica=2, fsdp=2, tensor=2), 200),
        (64, 7, 64, MeshConfig(fsdp=8), 200),
    ],
    ids=str,
)
def test_slots_are_busy_until_the_queue_is_empty(monkeypatch, slots, n, prompts, mesh, mean):
    """Groups and single samples, more slots than a group and fewer, several banks."""
    rng = np.random.default_rng(slots)
    texts = [rng.integers(2, 50, rng.integers(1, 40)).tolist() for _ in range(prompts)]
    stats = run_simulated(monkeypatch, texts, slots=slots, n=n, mean=mean, max_new=3 * mean, mesh=mesh)
    assert stats.occupancy == stats.busy_new_tokens / stats.busy_row_steps
    assert stats.occupancy >= 0.9


@pytest.mark.parametrize(
    ("shortest", "longest", "prefix"), [(448, 512, 0), (448, 512, 160), (1000, 1151, 699), (20, 1200, 0)]
)
@pytest.mark.parametrize(("slots", "n", "prompts"), [(56, 7, 8), (56, 1, 56), (8, 4, 30)], ids=str)
def test_prompts_are_prefilled_once_and_with_little_padding(monkeypatch, slots, n, prompts, shortest, longest, prefix):
    rng = np.random.default_rng(slots + prefix)
    head = rng.integers(2, 50, prefix).tolist()
    texts = [head + rng.integers(2, 50, rng.integers(shortest, longest + 1) - prefix).tolist() for _ in range(prompts)]
    stats = run_simulated(monkeypatch, texts, slots=slots, n=n, mean=40, max_new=120)
    unique = sum(map(len, texts)) - prefix * (prompts - 1)
    assert unique - prompts <= stats.prefill_tokens <= 1.25 * unique, stats.prefill_tokens / unique
