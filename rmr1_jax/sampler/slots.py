"""Who sits in which slot: the host's bookkeeping of one bank, without a device in sight.

A bank has B slots and room for E prompts. A prompt is admitted to a free entry, its samples are seated in free slots as
these come, and its entry is free again when the last of them has finished. `run.py` moves what is said here to the
device and back.
"""

from __future__ import annotations

import dataclasses

import numpy as np

FREE = -1


@dataclasses.dataclass
class Seat:
    """A sample in flight: which it is, and what has been drawn so far (one array a dispatch)."""

    prompt: int
    number: int
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logp: list[np.ndarray] = dataclasses.field(default_factory=list)
    sampled_logp: list[np.ndarray] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Guest:
    """A prompt in the cache: its number, its tokens, how many of its samples are still to be seated and to finish."""

    prompt: int
    tokens: np.ndarray
    hash: int
    unseated: int
    unfinished: int


class Bank:
    """The slots and prompts of one bank. The arrays are those that `programs.Slots` describes, without its axis X."""

    def __init__(self, slots: int, entries: int, ranks: int):
        self.seats: list[Seat | None] = [None] * slots
        self.guests: list[Guest | None] = [None] * entries
        self.last, self.length, self.drawn, self.start, self.sample, self.entry, self.rank = np.zeros(
            (7, slots), np.int32
        )
        self.live = np.zeros(slots, bool)
        self.prompt_hash = np.zeros(slots, np.uint32)
        self.table = np.full((entries, ranks), FREE, np.int32)
        self.prompt_length = np.zeros(entries, np.int32)
        self.step = 0

    @property
    def live_count(self) -> int:
        return int(self.live.sum())

    @property
    def unseated(self) -> int:
        """Samples of admitted prompts that wait for a slot."""
        return sum(guest.unseated for guest in self.guests if guest)

    @property
    def open_slots(self) -> int:
        """Slots that no admitted sample will take."""
        return len(self.seats) - self.live_count - self.unseated

    @property
    def oldest(self) -> int:
        """How many columns of its ring the longest live sample has used."""
        return int((self.step - self.start[self.live]).max(initial=0))

    def admit(self, prompt: int, tokens: np.ndarray, hash_: int, samples: int) -> int | None:
        """Give the prompt a free entry, whose number is returned; None where there is none."""
        entry = next((e for e, guest in enumerate(self.guests) if guest is None), None)
        if entry is not None:
            self.guests[entry] = Guest(prompt, tokens, hash_, samples, samples)
            self.prompt_length[entry] = len(tokens) - 1
        return entry

    def seat(self, samples: int) -> None:
        """Seat samples of admitted prompts in free slots, as far as there are any. samples: of every prompt."""
        free = [slot for slot, seat in enumerate(self.seats) if seat is None]
        for entry, guest in enumerate(self.guests):
            while guest and guest.unseated and free and (self.table[entry] == FREE).any():
                slot, number = free.pop(0), samples - guest.unseated
                guest.unseated -= 1
                self.rank[slot] = rank = int(np.argmax(self.table[entry] == FREE))
                self.table[entry, rank] = slot
                self.seats[slot] = Seat(guest.prompt, number)
                self.entry[slot], self.sample[slot], self.prompt_hash[slot] = entry, number, guest.hash
                self.last[slot], self.length[slot] = guest.tokens[-1], len(guest.tokens)
                self.drawn[slot], self.start[slot], self.live[slot] = 0, self.step, True

    def take(self, tokens, logp, sampled_logp, steps: int, stops: set[int], max_new: int) -> list[Seat]:
        """Note what a dispatch drew (arrays [B, STEPS], of which `steps` columns count); returns who has finished."""
        self.step += steps
        finished = []
        counts = (tokens[:, :steps] >= 0).sum(axis=1)
        for slot in np.nonzero(self.live)[0]:
            count, seat = int(counts[slot]), self.seats[slot]
            if count == 0:
                continue
            seat.tokens.append(tokens[slot, :count])
            seat.logp.append(logp[slot, :count])
            seat.sampled_logp.append(sampled_logp[slot, :count])
            self.last[slot] = tokens[slot, count - 1]
            self.drawn[slot] += count
            if int(self.last[slot]) in stops or self.drawn[slot] >= max_new:
                finished.append(seat)
                self._leave(slot)
        return finished

    def _leave(self, slot: int) -> None:
        entry = self.entry[slot]
        self.seats[slot], self.live[slot] = None, False
        self.table[entry, self.rank[slot]] = FREE
        guest = self.guests[entry]
        guest.unfinished -= 1
        if not guest.unfinished:
            self.guests[entry], self.prompt_length[entry] = None, 0

    def compact(self, slots: int, entries: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
        """Go down to fewer slots, and to fewer prompts or (with ranks=1) to a copy of its prompt for every slot.

        Returns:
            The old numbers of the slots and of the entries that are kept, [slots] and [entries].
        """
        order = np.argsort(~self.live, kind="stable")[:slots].astype(np.int32)
        assert self.live_count <= slots and not self.unseated
        for name in ("last", "length", "drawn", "start", "sample", "entry", "rank", "live", "prompt_hash"):
            setattr(self, name, getattr(self, name)[order])
        self.seats = [self.seats[slot] for slot in order]
        if ranks > 1 and entries == len(self.guests):
            kept = np.arange(entries, dtype=np.int32)
        else:
            kept = self.entry.copy()
            # One slot a copy now: its guest has one sample left to finish.
            self.guests = [g and dataclasses.replace(g, unfinished=1) for g in (self.guests[e] for e in kept)]
            self.prompt_length = self.prompt_length[kept]
            self.entry, self.rank = np.arange(slots, dtype=np.int32), np.zeros(slots, np.int32)
        self.table = np.full((entries, ranks), FREE, np.int32)
        self.table[self.entry[self.live], self.rank[self.live]] = np.nonzero(self.live)[0]
        return order, kept
