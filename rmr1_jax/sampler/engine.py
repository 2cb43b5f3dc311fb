"""The sampler: a slot engine. A fixed number of samples is in flight, and who finishes makes room for the next.

A prompt is prefilled once, in chunks, and all its samples read the same cache; a prefix that all prompts share is
computed once. Decode runs many steps a dispatch, over rings that are as wide as the oldest live sample needs, and when
the queue is empty and few samples are left, over fewer rows. All shapes come from a short list (`shapes.py`), so that
after `warm_up` nothing compiles. A sample is a function of (seed, prompt, sample, step): its slot and its neighbours do
not matter.

Read `run.py` for what happens in a call, `schedule.py` for who sits where, `programs.py` for what runs on the device;
`policy.py` puts a tokenizer on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rmr1_jax.errors import InputError
from rmr1_jax.mesh import rows_divisor
from rmr1_jax.model.cache import Cache
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.config import Sample, SampleStats, SamplingConfig
from rmr1_jax.sampler.programs import Weights
from rmr1_jax.sampler.run import Run, compiled, make_controls, to_slots
from rmr1_jax.sampler.schedule import Bank
from rmr1_jax.sampler.shapes import CHUNKS, PREFILL_ROWS, cache_ways, plan_shapes


class Engine:
    """A sampler for prompts up to a length, with all its shapes settled.

    Args:
        sampling: `n`, `max_new_tokens`, `slots` and `cache_gib` settle the shapes; the rest are the settings of a run
            when it brings none of its own.
        prompts: how many prompts a run has (more may come: they queue). longest: the tokens of the longest.

    Raises:
        InputError: see `plan_shapes`.
    """

    def __init__(
        self, config: QwenConfig, sampling: SamplingConfig, *, prompts: int, longest: int, mesh: Mesh, dtype=jnp.float32
    ):
        self.config, self.sampling, self.mesh, self.dtype = config, sampling, mesh, jnp.dtype(dtype)
        self.longest = longest
        banks = rows_divisor(mesh)
        sizes = {"prompts": prompts, "longest": longest, "banks": banks, "itemsize": self.dtype.itemsize}
        self.shapes = plan_shapes(config, sampling, **sizes, free_gib=_free_gib(mesh, config))
        self.stats = SampleStats()

    def warm_up(self, weights: Weights) -> int:
        """Compile every program that a run can need; returns how many were compiled."""
        before, shapes = compiled(), self.shapes
        controls = make_controls(self.sampling, ())
        with jax.set_mesh(self.mesh):
            for width, wider in zip(shapes.widths, (*shapes.widths[1:], None), strict=True):
                cache = self.empty_cache(width)
                for i, size in enumerate(shapes.sizes):
                    idle = [Bank(*size) for _ in range(shapes.banks)]
                    cache, _ = programs.decode(
                        self.config, weights, controls, cache, to_slots(idle, [0] * shapes.banks)
                    )
                    if wider:
                        programs.grow(Cache(*map(list, cache)), width=wider)  # uses its lists up
                    if i + 1 < len(shapes.sizes):
                        kept = [bank.compact(*shapes.sizes[i + 1]) for bank in idle]
                        cache = programs.compact(cache, *map(np.stack, zip(*kept, strict=True)))
            cache = programs.share_prefix(self.empty_cache(shapes.widths[0]), np.int32(0))
            for chunk in (c for c in CHUNKS if c <= shapes.room):
                for rows in (1, PREFILL_ROWS):
                    nothing = np.zeros((shapes.banks, rows), np.int32)
                    tokens = np.zeros((shapes.banks, rows, chunk), np.int32)
                    cache = programs.prefill(self.config, weights, cache, tokens, nothing, nothing, nothing > 0)
            jax.block_until_ready(cache)
        return compiled() - before

    def stream(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        stop_token_ids: Sequence[int],
        *,
        sampling: SamplingConfig | None = None,
        bar: bool = False,
    ) -> Iterator[tuple[int, int, Sample]]:
        """Sample `n` completions of every prompt, and yield (prompt, number, sample) as they finish.

        Args:
            weights: from `programs.sampling_weights`. prompts: token ids, not empty. stop_token_ids: at most 16.
            sampling: other settings than the engine's own; n and max_new_tokens must not be larger than those.
            bar: show a progress bar with tokens a second and live slots.

        `self.stats` says what the run took, also while it goes on.
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
        with tqdm(total=len(prompts) * sampling.n, unit="text", desc="sampling", disable=not bar, leave=False) as shown:
            for seat in run.go():
                shown.update()
                rate = run.stats.new_tokens / max(1e-9, run.stats.seconds)
                live = sum(bank.live_count for bank in run.banks)
                shown.set_postfix_str(f"{rate:.0f} tok/s, {live} live", refresh=False)
                yield seat.prompt, seat.number, run.sample(seat)

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        stop_token_ids: Sequence[int],
        *,
        sampling: SamplingConfig | None = None,
        on_done: Callable[[int], None] | None = None,
        bar: bool = False,
    ) -> tuple[list[list[Sample]], SampleStats]:
        """All of `stream`: for each prompt, in order, its n samples; and what it took. on_done: called with 1 for every
        prompt whose samples are all there (a progress bar)."""
        n = (sampling or self.sampling).n
        results: list[list] = [[None] * n for _ in prompts]
        left = [n] * len(prompts)
        for prompt, number, sample in self.stream(weights, prompts, stop_token_ids, sampling=sampling, bar=bar):
            results[prompt][number] = sample
            left[prompt] -= 1
            if on_done and not left[prompt]:
                on_done(1)
        return results, self.stats

    def empty_cache(self, width: int) -> Cache:
        """All slots and prompts, with rings of `width` columns."""
        s = self.shapes
        sizes = {"banks": s.banks, "entries": s.entries, "room": s.room, "slots": s.slots}
        return programs.empty_cache(self.config, **sizes, width=width, dtype=self.dtype)


def generate(
    config: QwenConfig,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_token_ids: Sequence[int],
    *,
    mesh: Mesh,
    on_done: Callable[[int], None] | None = None,
    bar: bool = False,
) -> tuple[list[list[Sample]], SampleStats]:
    """`Engine.generate` with an engine made for just these prompts."""
    engine = engine_for(config, weights, prompts, sampling, mesh=mesh)
    return engine.generate(weights, prompts, stop_token_ids, on_done=on_done, bar=bar)


def engine_for(
    config: QwenConfig, weights: Weights, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *, mesh: Mesh
) -> Engine:
    """An engine made for just these prompts."""
    longest = max(map(len, prompts), default=1)
    dtype = weights["final_norm"].dtype
    return Engine(config, sampling, prompts=len(prompts), longest=longest, mesh=mesh, dtype=dtype)


def _check_prompts(
    config: QwenConfig, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, longest: int
) -> None:
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


def _free_gib(mesh: Mesh, config: QwenConfig) -> float | None:
    """The largest cache for which there is room in four fifths of what is free on the devices, where they tell (a CPU
    does not): the rest is for a step's temporaries."""
    told = [d.memory_stats() for d in mesh.local_devices]
    if not all(told):
        return None
    free = min(t["bytes_limit"] - t["bytes_in_use"] for t in told)
    return 0.8 * free * cache_ways(config, mesh) / 2**30
