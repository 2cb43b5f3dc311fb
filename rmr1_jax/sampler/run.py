"""One call of the sampler: the queue, the banks of slots, the cache; from the first prefill to the last stop.

The loop is `Run.go`: admit prompts, reshape the cache where needed, decode a dispatch's worth of steps, hand on who has
finished. Next: `schedule.py` for who sits where, `programs.py` for what runs on the device.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from rmr1_jax.errors import InputError
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.config import Sample, SampleStats, SamplingConfig
from rmr1_jax.sampler.programs import STOP_ID_ROOM, Controls, Slots, Weights
from rmr1_jax.sampler.schedule import Bank, Seat
from rmr1_jax.sampler.shapes import CHUNKS, PREFILL_ROWS


class Run:
    """One call of an `engine.Engine`."""

    def __init__(self, engine, weights: Weights, prompts, sampling: SamplingConfig, stop_token_ids):
        self.engine, self.weights, self.sampling = engine, weights, sampling
        self.controls = make_controls(sampling, stop_token_ids)
        self.stops = set(map(int, stop_token_ids))
        self.prompts = [np.asarray(p, np.int32) for p in prompts]
        self.hashes = [zlib.crc32(p.tobytes()) for p in self.prompts]
        # Longest first: what is prefilled together is of like length, and memory trouble shows at once, not at the end.
        self.queue = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.prefix = _common_prefix(self.prompts)
        shapes = engine.shapes
        self.size, self.width = 0, 0  # places in shapes.sizes and shapes.widths
        self.banks = [Bank(*shapes.sizes[0]) for _ in range(shapes.banks)]
        self.stats = SampleStats(prompt_tokens=sum(map(len, prompts)), slots=shapes.banks * shapes.slots)

    def go(self) -> Iterator[Seat]:
        """Everything from the first prefill to the last stop; yields those who finish. `seconds` counts the time that
        passes in here, not what the caller does between."""
        mark, before = time.perf_counter(), compiled()
        with jax.set_mesh(self.engine.mesh):
            self.cache = self.engine.empty_cache(self.engine.shapes.widths[0])
        while self.queue or any(bank.live_count or bank.unseated for bank in self.banks):
            with jax.set_mesh(self.engine.mesh):
                self._admit()
                self._reshape()
                finished = self._decode()
            self.stats.compiles = compiled() - before
            self.stats.seconds += time.perf_counter() - mark
            yield from finished
            mark = time.perf_counter()

    def sample(self, seat: Seat) -> Sample:
        ids = np.concatenate(seat.tokens).tolist()
        reason = "stop" if ids[-1] in self.stops else "length"
        return Sample(ids, np.concatenate(seat.logp), np.concatenate(seat.sampled_logp), reason)

    def _admit(self) -> None:
        """Prompts from the queue into free entries, wherever there are slots for their samples."""
        admitted: list[list[tuple[int, np.ndarray]]] = [[] for _ in self.banks]
        while self.queue:
            x = max(range(len(self.banks)), key=lambda x: self.banks[x].open_slots)
            if self.banks[x].open_slots <= 0:
                break
            tokens = self.prompts[self.queue[0]]
            entry = self.banks[x].admit(self.queue[0], tokens, self.hashes[self.queue[0]], self.sampling.n)
            if entry is None:
                break
            self.queue.popleft()
            admitted[x].append((entry, tokens))
        if any(admitted):
            self._prefill(admitted)
        for bank in self.banks:
            bank.seat(self.sampling.n)

    def _prefill(self, admitted: list[list[tuple[int, np.ndarray]]]) -> None:
        if self.prefix and not self.stats.prefill_tokens:
            # Once, in each bank's first entry, and copied to all others: what comes later starts behind it.
            first = self.prompts[0][: self.prefix + 1]
            self._prefill_from(0, [[(0, first)] for _ in self.banks])
            self.cache = programs.share_prefix(self.cache, np.int32(self.prefix))
        self._prefill_from(self.prefix, admitted)

    def _prefill_from(self, start: int, prompts: list[list[tuple[int, np.ndarray]]]) -> None:
        """All of each bank's prompts but their last token, from position `start` on. Each prompt is cut into pieces by
        itself, and what is computed together are pieces of one size, of whichever prompts: in every layer they are all
        written before any is read, so that pieces of one prompt may be among them, the earlier ones first."""
        room = self.engine.shapes.room
        cut = [[(e, t, *piece) for e, t in bank for piece in _pieces(start, len(t) - 1, room)] for bank in prompts]
        for size in CHUNKS:
            banks = [[piece for piece in bank if piece[3] == size] for bank in cut]
            while any(banks):
                rows = PREFILL_ROWS if max(map(len, banks)) > PREFILL_ROWS // 2 else 1
                self._prefill_pieces([bank[:rows] for bank in banks], rows, size)
                banks = [bank[rows:] for bank in banks]

    def _prefill_pieces(self, banks: list[list[tuple[int, np.ndarray, int, int]]], rows: int, size: int) -> None:
        tokens = np.zeros((len(banks), rows, size), np.int32)
        entries, starts = np.zeros((2, len(banks), rows), np.int32)
        active = np.zeros((len(banks), rows), bool)
        for x, bank in enumerate(banks):
            for p, (entry, prompt, start, _) in enumerate(bank):
                part = prompt[start : start + size]
                tokens[x, p, : len(part)] = part
                entries[x, p], starts[x, p], active[x, p] = entry, start, True
        self.cache = programs.prefill(self.engine.config, self.weights, self.cache, tokens, entries, starts, active)
        self.stats.prefill_tokens += tokens.size

    def _reshape(self) -> None:
        """Rings wide enough for the next dispatch; no more rows than needed once nobody waits."""
        shapes = self.engine.shapes
        needed = min(max(bank.oldest for bank in self.banks) + programs.STEPS, self.sampling.max_new_tokens)
        while shapes.widths[self.width] < needed:
            self.width += 1
            self.cache = programs.grow(self.cache, width=shapes.widths[self.width])
        held = sum(x.nbytes for x in jax.tree.leaves(self.cache))
        self.stats.cache_bytes = max(self.stats.cache_bytes, held)
        live = max(bank.live_count for bank in self.banks)
        while live <= self._fewer:
            self.size += 1
            kept = [bank.compact(*shapes.sizes[self.size]) for bank in self.banks]
            self.cache = programs.compact(self.cache, *map(np.stack, zip(*kept, strict=True)))

    @property
    def _waiting(self) -> bool:
        return bool(self.queue) or any(bank.unseated for bank in self.banks)

    @property
    def _fewer(self) -> int:
        """The slots of the next smaller batch; 0 where there is none to go to: samples wait for their slots, or the
        last ones have so few tokens to go that it would not pay."""
        sizes = self.engine.shapes.sizes[self.size + 1 :]
        youngest = min((int(b.drawn[b.live].min()) for b in self.banks if b.live_count), default=0)
        short = self.sampling.max_new_tokens - youngest <= 2 * programs.STEPS
        return 0 if self._waiting or short or not sizes else sizes[0][0]

    def _decode(self) -> list[Seat]:
        config, waiting, fewer = self.engine.config, self._waiting, self._fewer
        # Several banks wait for the last of them anyway: what one leaves early for it would spend waiting.
        leave_at = [0 if len(self.banks) > 1 else self._leave_at(bank, waiting, fewer) for bank in self.banks]
        slots = to_slots(self.banks, leave_at)
        self.cache, drawn = programs.decode(config, self.weights, self.controls, self.cache, slots)
        tokens, logp, sampled_logp, steps = jax.device_get(drawn)
        finished = []
        for x, bank in enumerate(self.banks):
            finished += bank.take(
                tokens[x], logp[x], sampled_logp[x], int(steps[x]), self.stops, self.sampling.max_new_tokens
            )
        new, rows = int((tokens >= 0).sum()), int(steps.max()) * tokens.shape[0] * tokens.shape[1]
        self.stats.new_tokens += new
        self.stats.row_steps += rows
        if waiting:
            self.stats.busy_new_tokens += new
            self.stats.busy_row_steps += rows
        self.stats.dispatches += 1
        return finished

    @staticmethod
    def _leave_at(bank: Bank, waiting: bool, fewer: int) -> int:
        """How few live slots end a dispatch early: a few less than now while others wait for their places, or so few
        that they fit in the next smaller batch."""
        live = bank.live_count
        if waiting:
            return max(0, live - max(1, len(bank.seats) // 16))
        return fewer if live > fewer else 0


def to_slots(banks: list[Bank], leave_at: list[int]) -> Slots:
    """What the host knows of the banks' slots, as `programs.decode` takes it."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([getattr(bank, name) for bank in banks])

    arrays = {name: stacked(name) for name in Slots._fields if name not in ("step", "leave_at", "table")}
    table = np.maximum(stacked("table"), 0)  # where nobody sits any slot will do: nobody reads the result
    return Slots(
        **arrays,
        table=table,
        step=np.asarray([bank.step for bank in banks], np.int32),
        leave_at=np.asarray(leave_at, np.int32),
    )


def _common_prefix(prompts: list[np.ndarray]) -> int:
    """Tokens that all prompts begin with, in whole chunks of the smallest size, and less than any of them."""
    if len(prompts) < 2:
        return 0
    shortest = min(map(len, prompts)) - 1
    same = np.all([p[:shortest] == prompts[0][:shortest] for p in prompts], axis=0)
    return int(same.argmin() if not same.all() else shortest) // CHUNKS[-1] * CHUNKS[-1]


def _pieces(start: int, end: int, room: int) -> Iterator[tuple[int, int]]:
    """(position, size) of the pieces that cover positions `start` to `end` and stay within `room`, never growing: each
    the largest of which tokens fill three quarters, or the smallest there is."""
    while start < end:
        size = next((c for c in CHUNKS if end - start >= 0.75 * c and c <= room - start), CHUNKS[-1])
        yield start, size
        start += size


def make_controls(sampling: SamplingConfig, stop_token_ids: Sequence[int]) -> Controls:
    """The settings as `programs.decode` takes them.

    Raises:
        InputError: more than 16 stop ids.
    """
    if len(stop_token_ids) > STOP_ID_ROOM:
        raise InputError(f"{len(stop_token_ids)} stop token ids given; at most {STOP_ID_ROOM} are supported")
    stops = np.full(STOP_ID_ROOM, -1, np.int32)
    stops[: len(stop_token_ids)] = stop_token_ids
    return Controls(
        seed=np.uint32(sampling.seed % 2**32),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(sampling.top_k or 0),
        top_p=np.float32(sampling.top_p),
        stop_ids=stops,
        max_new=np.int32(sampling.max_new_tokens),
    )


def compiled() -> int:
    """Programs in the caches of the sampler's jitted functions."""
    return sum(program._cache_size() for program in programs.PROGRAMS)
