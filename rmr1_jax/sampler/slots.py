"""The host's record of one bank: which sample each slot holds, and which prompts are in its cache.

A bank has B slots and room for E prompts. A prompt is admitted to a free entry of the cache, its samples take free
slots, and its entry is free again when the last of its samples has finished. No device is involved: `Bank.arrays` is
what `engine.py` sends to the compiled programs, and `Bank.record` takes what they drew.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

FREE = -1


class Slots(NamedTuple):
    """The state of the slots before a dispatch, int32 unless said otherwise. NumPy arrays in a `Bank`; on the device
    they have a leading axis X, the banks."""

    last: Any  # [B] the token to feed next
    length: Any  # [B] tokens of its prompt
    drawn: Any  # [B] tokens drawn so far
    start: Any  # [B] the bank's step at which its sample began
    live: Any  # [B] bool: the slot holds a sample
    prompt_hash: Any  # [B] uint32
    sample: Any  # [B] the number of the sample among those of its prompt
    entry: Any  # [B] the entry of the cache that holds its prompt
    rank: Any  # [B] its column in the table
    table: Any  # [E, R] the slots of each prompt, FREE where there are fewer
    prompt_length: Any  # [E] tokens in the prompt's cache: all but the last, which is fed first
    step: Any  # [] steps that the bank has decoded
    leave_at: Any  # [] the dispatch ends when as few slots are live


PER_SLOT = Slots._fields[: Slots._fields.index("table")]


@dataclasses.dataclass
class LiveSample:
    """A sample in a slot, and what has been drawn so far (one array a dispatch)."""

    prompt: int
    number: int
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logp: list[np.ndarray] = dataclasses.field(default_factory=list)
    sampled_logp: list[np.ndarray] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class CachedPrompt:
    """A prompt in the cache. waiting: its samples that have no slot yet; unfinished: those and the live ones."""

    prompt: int
    tokens: np.ndarray
    hash: int
    waiting: int
    unfinished: int


class Bank:
    """The slots and cached prompts of one bank: `slots` slots and `entries` prompts of at most `ranks` live samples."""

    def __init__(self, slots: int, entries: int, ranks: int):
        self.samples: list[LiveSample | None] = [None] * slots
        self.prompts: list[CachedPrompt | None] = [None] * entries
        last, length, drawn, start, sample, entry, rank = np.zeros((7, slots), np.int32)
        live, prompt_hash = np.zeros(slots, bool), np.zeros(slots, np.uint32)
        table, prompt_length = np.full((entries, ranks), FREE, np.int32), np.zeros(entries, np.int32)
        step, leave_at = np.zeros((), np.int32), np.zeros((), np.int32)
        by_slot = (last, length, drawn, start, live, prompt_hash, sample, entry, rank)
        self.arrays = Slots(*by_slot, table, prompt_length, step, leave_at)

    @property
    def live_count(self) -> int:
        return int(self.arrays.live.sum())

    @property
    def waiting(self) -> int:
        """Samples of admitted prompts that wait for a slot."""
        return sum(prompt.waiting for prompt in self.prompts if prompt)

    @property
    def open_slots(self) -> int:
        """Slots that no admitted sample will take."""
        return len(self.samples) - self.live_count - self.waiting

    @property
    def oldest(self) -> int:
        """The number of columns of its ring that the longest live sample has used."""
        return int((self.arrays.step - self.arrays.start[self.arrays.live]).max(initial=0))

    def admit(self, prompt: int, tokens: np.ndarray, hash_: int, samples: int) -> int | None:
        """Gives the prompt a free entry and returns its number; None where all are taken."""
        entry = next((e for e, cached in enumerate(self.prompts) if cached is None), None)
        if entry is not None:
            self.prompts[entry] = CachedPrompt(prompt, tokens, hash_, samples, samples)
            self.arrays.prompt_length[entry] = len(tokens) - 1
        return entry

    def fill(self, samples: int) -> None:
        """Puts waiting samples into free slots, as far as there are any. samples: the number of every prompt's."""
        slots = self.arrays
        free = [slot for slot, sample in enumerate(self.samples) if sample is None]
        for entry, cached in enumerate(self.prompts):
            while cached and cached.waiting and free and (slots.table[entry] == FREE).any():
                slot, number = free.pop(0), samples - cached.waiting
                cached.waiting -= 1
                slots.rank[slot] = rank = int(np.argmax(slots.table[entry] == FREE))
                slots.table[entry, rank] = slot
                self.samples[slot] = LiveSample(cached.prompt, number)
                slots.entry[slot], slots.sample[slot], slots.prompt_hash[slot] = entry, number, cached.hash
                slots.last[slot], slots.length[slot] = cached.tokens[-1], len(cached.tokens)
                slots.drawn[slot], slots.start[slot], slots.live[slot] = 0, slots.step, True

    def record(self, tokens, logp, sampled_logp, steps: int, stops: set[int], max_new: int) -> list[LiveSample]:
        """Records what a dispatch drew and frees the slots of the samples that have finished, which it returns.

        Args:
            tokens, logp, sampled_logp: [B, STEPS], of which the first `steps` columns count.
        """
        slots = self.arrays
        slots.step[...] += steps
        finished = []
        counts = (tokens[:, :steps] >= 0).sum(axis=1)
        for slot in np.nonzero(slots.live)[0]:
            count, sample = int(counts[slot]), self.samples[slot]
            if count == 0:
                continue
            sample.tokens.append(tokens[slot, :count])
            sample.logp.append(logp[slot, :count])
            sample.sampled_logp.append(sampled_logp[slot, :count])
            slots.last[slot] = tokens[slot, count - 1]
            slots.drawn[slot] += count
            if int(slots.last[slot]) in stops or slots.drawn[slot] >= max_new:
                finished.append(sample)
                self._free(slot)
        return finished

    def _free(self, slot: np.integer) -> None:
        slots, entry = self.arrays, self.arrays.entry[slot]
        self.samples[slot], slots.live[slot] = None, False
        slots.table[entry, slots.rank[slot]] = FREE
        cached = self.prompts[entry]
        cached.unfinished -= 1
        if not cached.unfinished:
            self.prompts[entry], slots.prompt_length[entry] = None, 0

    def compact(self, slots: int, entries: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
        """Shrinks to fewer slots, and to fewer prompts or (with ranks=1) to a copy of its prompt for every slot.

        Returns:
            The old numbers of the slots and of the entries that are kept, [slots] and [entries].
        """
        order = np.argsort(~self.arrays.live, kind="stable")[:slots].astype(np.int32)
        assert self.live_count <= slots and not self.waiting
        now = self.arrays._replace(**{name: getattr(self.arrays, name)[order] for name in PER_SLOT})
        self.samples = [self.samples[slot] for slot in order]
        if ranks > 1 and entries == len(self.prompts):
            kept = np.arange(entries, dtype=np.int32)
        else:
            kept = now.entry.copy()
            # Each copy of a prompt has one slot, and so one sample left to finish.
            self.prompts = [p and dataclasses.replace(p, unfinished=1) for p in (self.prompts[e] for e in kept)]
            now = now._replace(
                prompt_length=now.prompt_length[kept],
                entry=np.arange(slots, dtype=np.int32),
                rank=np.zeros(slots, np.int32),
            )
        table = np.full((entries, ranks), FREE, np.int32)
        table[now.entry[now.live], now.rank[now.live]] = np.nonzero(now.live)[0]
        self.arrays = now._replace(table=table)
        return order, kept
