"""The sampler: continuous batching over a fixed number of slots. `Engine` holds the settled shapes, `Run` is one call.

A prompt is prefilled once, in chunks, and all its samples read the same cache; a prefix that all prompts share is
computed once. Decode runs many steps a dispatch, over rings that are as wide as the oldest live sample needs, and when
the queue is empty and few samples are left, over fewer rows. All shapes come from a short list (`shapes.py`), so that
after `warm_up` nothing compiles. A sample is a function of (seed, prompt, sample, step): its slot and its neighbours do
not matter.

Read `slots.py` for the host's record of the slots, `programs.py` for the compiled programs, `cache.py` for the cache;
`policy.py` puts a tokenizer on top.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rmr1_jax.distributed.mesh import rows_divisor
from rmr1_jax.distributed.terminal import pace
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen, split
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.cache import Cache
from rmr1_jax.sampler.programs import compiled, make_controls, stack_slots
from rmr1_jax.sampler.sample import Sample, SampleStats, SamplingConfig
from rmr1_jax.sampler.shapes import CHUNKS, PREFILL_ROWS, common_prefix, free_cache_gib, pieces, plan_shapes
from rmr1_jax.sampler.slots import Bank, LiveSample
from rmr1_jax.sampler.weights import Weights

Prompts = Sequence[Sequence[int] | np.ndarray]  # token ids of each prompt


class Run:
    """One call of an engine: the queue of prompts, the banks, the cache, and the statistics."""

    def __init__(self, engine, weights: Weights, prompts, sampling: SamplingConfig, stop_token_ids):
        self.engine, self.weights, self.sampling = engine, weights, sampling
        self.controls = make_controls(sampling, stop_token_ids)
        self.stops = set(map(int, stop_token_ids))
        self.prompts = [np.asarray(p, np.int32) for p in prompts]
        self.hashes = [zlib.crc32(p.tobytes()) for p in self.prompts]
        # Longest first: prompts of like length are prefilled together, and memory runs out at once or never.
        self.queue = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.prefix = common_prefix(self.prompts)
        shapes = engine.shapes
        self.size, self.width = 0, 0  # indices into shapes.sizes and shapes.widths
        self.banks = [Bank(*shapes.sizes[0]) for _ in range(shapes.banks)]
        self.stats = SampleStats(prompt_tokens=sum(map(len, prompts)), slots=shapes.banks * shapes.slots)

    def go(self) -> Iterator[LiveSample]:
        """Runs from the first prefill to the last stop; yields each sample when it has finished. `stats.seconds` counts
        the time that passes in here, not what the caller does between two samples."""
        mark, before = time.perf_counter(), compiled()
        with jax.set_mesh(self.engine.mesh):
            self.cache = self.engine.empty_cache(self.engine.shapes.widths[0])
        while self.queue or any(bank.live_count or bank.waiting for bank in self.banks):
            with jax.set_mesh(self.engine.mesh):
                self._admit()
                self._reshape()
                finished = self._decode()
            self.stats.compiles = compiled() - before
            self.stats.seconds += time.perf_counter() - mark
            self.stats.samples += len(finished)
            yield from finished
            mark = time.perf_counter()

    def finish(self, live: LiveSample) -> Sample:
        """The sample as the caller gets it."""
        ids = np.concatenate(live.tokens).tolist()
        reason = "stop" if ids[-1] in self.stops else "length"
        return Sample(ids, np.concatenate(live.logp), np.concatenate(live.sampled_logp), reason)

    def _admit(self) -> None:
        """Moves prompts from the queue to free entries of the cache, as long as slots are open for their samples."""
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
            bank.fill(self.sampling.n)

    def _prefill(self, admitted: list[list[tuple[int, np.ndarray]]]) -> None:
        if self.prefix and not self.stats.prefill_tokens:
            # Computed once, in each bank's first entry, and copied to all others: every prompt then starts behind it.
            first = self.prompts[0][: self.prefix + 1]
            self._prefill_from(0, [[(0, first)] for _ in self.banks])
            self.cache = programs.share_prefix(self.cache, np.int32(self.prefix))
        self._prefill_from(self.prefix, admitted)

    def _prefill_from(self, start: int, prompts: list[list[tuple[int, np.ndarray]]]) -> None:
        """Prefills each bank's prompts, all but their last token, from position `start` on.

        Each prompt is cut into pieces by itself, and pieces of one size are computed together, of whichever prompts: in
        every layer all are written before any is read, so that pieces of one prompt may be among them, in order.
        """
        room = self.engine.shapes.room
        cut = [[(e, t, *piece) for e, t in bank for piece in pieces(start, len(t) - 1, room)] for bank in prompts]
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
        self.cache = programs.prefill(self.engine.graphdef, self.weights, self.cache, tokens, entries, starts, active)
        self.stats.prefill_tokens += tokens.size

    def _reshape(self) -> None:
        """Widens the rings for the next dispatch, and shrinks the batch once no sample waits for a slot."""
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
        return bool(self.queue) or any(bank.waiting for bank in self.banks)

    @property
    def _fewer(self) -> int:
        """The slots of the next smaller batch; 0 where samples wait for slots, there is no smaller batch, or the last
        samples have so few tokens to go that shrinking would not pay."""
        sizes = self.engine.shapes.sizes[self.size + 1 :]
        youngest = min((int(b.arrays.drawn[b.arrays.live].min()) for b in self.banks if b.live_count), default=0)
        short = self.sampling.max_new_tokens - youngest <= 2 * programs.STEPS
        return 0 if self._waiting or short or not sizes else sizes[0][0]

    def _decode(self) -> list[LiveSample]:
        """One dispatch; returns the samples that it finished."""
        waiting, fewer = self._waiting, self._fewer
        # Several banks wait for the slowest of them anyway, so none gains by leaving early.
        leave_at = [0 if len(self.banks) > 1 else self._leave_at(bank, waiting, fewer) for bank in self.banks]
        slots = stack_slots(self.banks, leave_at)
        self.cache, drawn = programs.decode(self.engine.graphdef, self.weights, self.controls, self.cache, slots)
        tokens, logp, sampled_logp, steps = jax.device_get(drawn)
        finished = []
        for x, bank in enumerate(self.banks):
            finished += bank.record(
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
        """The number of live slots at which a dispatch ends early: a few less than now while samples wait for slots, or
        so few that they fit in the next smaller batch."""
        live = bank.live_count
        if waiting:
            return max(0, live - max(1, len(bank.samples) // 16))
        return fewer if live > fewer else 0


class Engine:
    """A sampler for prompts up to a length, with all its shapes settled.

    Args:
        model: only its structure is used, so it need not hold arrays. sampling: `n`, `max_new_tokens`, `slots` and
            `cache_gib` settle the shapes; the rest are the settings of a call that brings none of its own.
        prompts: the number of prompts of a call (more queue). longest: the tokens of the longest prompt.
    """

    def __init__(
        self, model: Qwen, sampling: SamplingConfig, *, prompts: int, longest: int, mesh: Mesh, dtype=jnp.float32
    ):
        self.graphdef, self.config, self.sampling = split(model)[0], model.config, sampling
        self.mesh, self.dtype, self.longest = mesh, jnp.dtype(dtype), longest
        banks = rows_divisor(mesh)
        sizes = {"prompts": prompts, "longest": longest, "banks": banks, "itemsize": self.dtype.itemsize}
        self.shapes = plan_shapes(self.config, sampling, **sizes, free_gib=free_cache_gib(mesh, self.config))
        self.stats = SampleStats()

    @classmethod
    def for_prompts(
        cls, model: Qwen, weights: Weights, prompts: Prompts, sampling: SamplingConfig, *, mesh: Mesh
    ) -> Engine:
        """An engine whose shapes are settled for just these prompts."""
        longest, dtype = max(map(len, prompts), default=1), weights["final_norm"].dtype
        return cls(model, sampling, prompts=len(prompts), longest=longest, mesh=mesh, dtype=dtype)

    def warm_up(self, weights: Weights) -> int:
        """Compiles every program that a call can need; returns how many were compiled."""
        before, shapes = compiled(), self.shapes
        controls = make_controls(self.sampling, ())
        with jax.set_mesh(self.mesh):
            for width, wider in zip(shapes.widths, (*shapes.widths[1:], None), strict=True):
                cache = self.empty_cache(width)
                for i, size in enumerate(shapes.sizes):
                    idle = [Bank(*size) for _ in range(shapes.banks)]
                    cache, _ = programs.decode(
                        self.graphdef, weights, controls, cache, stack_slots(idle, [0] * shapes.banks)
                    )
                    if wider:
                        programs.grow(Cache(*map(list, cache)), width=wider)  # consumes its lists
                    if i + 1 < len(shapes.sizes):
                        kept = [bank.compact(*shapes.sizes[i + 1]) for bank in idle]
                        cache = programs.compact(cache, *map(np.stack, zip(*kept, strict=True)))
            cache = programs.share_prefix(self.empty_cache(shapes.widths[0]), np.int32(0))
            for chunk in (c for c in CHUNKS if c <= shapes.room):
                for rows in (1, PREFILL_ROWS):
                    nothing = np.zeros((shapes.banks, rows), np.int32)
                    tokens = np.zeros((shapes.banks, rows, chunk), np.int32)
                    cache = programs.prefill(self.graphdef, weights, cache, tokens, nothing, nothing, nothing > 0)
            jax.block_until_ready(cache)
        return compiled() - before

    def stream(
        self,
        weights: Weights,
        prompts: Prompts,
        stop_token_ids: Sequence[int],
        *,
        sampling: SamplingConfig | None = None,
        bar: bool = False,
    ) -> Iterator[tuple[int, int, Sample]]:
        """Samples `n` completions of every prompt, and yields (prompt, number, sample) as they finish.

        Args:
            weights: from `weights.sampling_weights`. prompts: token ids, not empty. stop_token_ids: at most 16.
            sampling: other settings than the engine's own; n and max_new_tokens must not be larger than those.
            bar: show a progress bar with tokens a second and live slots.

        `self.stats` has the statistics of the call, also while it goes on.
        """
        sampling = sampling or self.sampling
        if sampling.n > self.sampling.n or sampling.max_new_tokens > self.sampling.max_new_tokens:
            raise InputError(
                f"n={sampling.n}, max_new_tokens={sampling.max_new_tokens} are more than the engine was made for "
                f"({self.sampling.n}, {self.sampling.max_new_tokens})"
            )
        _check_prompts(self.config, prompts, sampling, self.longest)
        run = Run(self, weights, prompts, sampling, stop_token_ids)
        self.stats = run.stats
        options = {"unit": "text", "desc": "sampling", "disable": not bar, "leave": False, "dynamic_ncols": True}
        with tqdm(total=len(prompts) * sampling.n, **options, **pace(brief=True)) as shown:
            for live in run.go():
                shown.update()
                rate = run.stats.new_tokens / max(1e-9, run.stats.seconds)
                count = sum(bank.live_count for bank in run.banks)
                shown.set_postfix_str(f"{rate:.0f} tok/s, {count} live", refresh=False)
                yield live.prompt, live.number, run.finish(live)

    def generate(
        self,
        weights: Weights,
        prompts: Prompts,
        stop_token_ids: Sequence[int],
        *,
        sampling: SamplingConfig | None = None,
        bar: bool = False,
    ) -> tuple[list[list[Sample]], SampleStats]:
        """Everything that `stream` yields: the n samples of each prompt, in order, and the statistics of the call."""
        results: list[list] = [[None] * (sampling or self.sampling).n for _ in prompts]
        for prompt, number, sample in self.stream(weights, prompts, stop_token_ids, sampling=sampling, bar=bar):
            results[prompt][number] = sample
        return results, self.stats

    def empty_cache(self, width: int) -> Cache:
        """A cache for all slots and prompts, with rings of `width` columns."""
        s = self.shapes
        sizes = {"banks": s.banks, "entries": s.entries, "room": s.room, "slots": s.slots}
        return programs.empty_cache(self.config, **sizes, width=width, dtype=self.dtype)


def _check_prompts(config: QwenConfig, prompts: Prompts, sampling: SamplingConfig, longest: int) -> None:
    window = config.sliding_window or math.inf
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {i} has no tokens; a prompt needs at least one")
        if len(prompt) > longest:
            raise InputError(f"prompt {i} has {len(prompt)} tokens; this engine was made for at most {longest}")
        lowest, highest = np.min(prompt), np.max(prompt)
        if lowest < 0 or highest >= config.vocab_size:
            raise InputError(f"prompt {i} has ids from {lowest} to {highest}; the model has {config.vocab_size} tokens")
        if len(prompt) + sampling.max_new_tokens > window:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={sampling.max_new_tokens} it is longer than "
                f"the model's sliding window ({window}), which is not implemented; ask for fewer tokens"
            )
