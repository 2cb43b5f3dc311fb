"""Settles every shape that the sampler's programs can have, from the sizes of a call and a memory budget.

Few shapes, few compilations: rings double from one width to the next, and the last samples of a run are gathered into
three quarters, a half, a third of the slots and so on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from rmr1_jax.distributed.chips import free_memory
from rmr1_jax.distributed.mesh import rows_divisor
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.sampler.sample import SamplingConfig


def free_cache_gib(mesh: Mesh, config: QwenConfig) -> float | None:
    """The largest cache in GiB that `cache_gib_beside` allows in the devices' free memory; None where they do not
    report it, as CPUs do not."""
    free = free_memory(mesh.local_devices)
    return None if free is None else cache_gib_beside(free, mesh, config)


def cache_gib_beside(free: int, mesh: Mesh, config: QwenConfig) -> float:
    """The largest cache in GiB, on all devices together, where each has `free` bytes beside the weights: four fifths of
    them, because a step needs room for its temporaries."""
    return 0.8 * free * cache_ways(config, mesh) / 2**30


def common_prefix(prompts: list[np.ndarray]) -> int:
    """The number of tokens that all prompts begin with, in whole chunks of the smallest size, and below each length."""
    if len(prompts) < 2:
        return 0
    shortest = min(map(len, prompts)) - 1
    same = np.all([p[:shortest] == prompts[0][:shortest] for p in prompts], axis=0)
    return int(same.argmin() if not same.all() else shortest) // CHUNKS[-1] * CHUNKS[-1]


def pieces(start: int, end: int, room: int) -> Iterator[tuple[int, int]]:
    """Cuts positions `start` to `end` into (position, size) pieces of the sizes in CHUNKS that stay within `room`. Each
    has the largest size of which tokens fill three quarters, or the smallest size; sizes never grow."""
    while start < end:
        size = next((c for c in CHUNKS if end - start >= 0.75 * c and c <= room - start), CHUNKS[-1])
        yield start, size
        start += size


CHUNKS = (256, 64, 16)  # tokens of a prompt that one prefill computes
PREFILL_ROWS = 8  # prompts in one prefill, or one
SMALLEST_WIDTH = 64
WIDTHS = 4  # ring widths at most, each twice the one before
FEWER_ROWS = (4 / 3, 2, 8 / 3, 4, 6, 8, 16, 32, 64)  # parts of the slots that the last samples are gathered into


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Every shape that a run can have. A bank has `slots` slots and `entries` prompts of `room` tokens."""

    banks: int
    slots: int
    entries: int
    ranks: int
    room: int
    widths: tuple[int, ...]

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """(slots, entries, ranks), from all slots down to a few. Once few slots are left for each prompt, each slot has
        a copy of its prompt to itself."""
        fewer = dict.fromkeys(math.ceil(self.slots / part) for part in FEWER_ROWS)
        fewer.pop(self.slots, None)
        shrunk = [(b, b, 1) if b <= 2 * self.entries else (b, self.entries, self.ranks) for b in fewer]
        return [(self.slots, self.entries, self.ranks), *shrunk]

    def cache_bytes(self, config: QwenConfig, itemsize: int) -> int:
        """The size of the largest cache that a call can have, on all devices together."""
        column = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
        most = max(slots * self.widths[-1] + entries * self.room for slots, entries, _ in self.sizes)
        return self.banks * most * column


def plan_shapes(
    config: QwenConfig,
    sampling: SamplingConfig,
    *,
    prompts: int,
    longest: int,
    banks: int,
    itemsize: int,
    free_gib: float | None = None,
) -> Shapes:
    """The shapes for `prompts` prompts of at most `longest` tokens. free_gib: the budget where `cache_gib` sets none.

    Raises:
        InputError: not even one slot a bank fits in the budget.
    """
    longest_new, halvings = sampling.max_new_tokens, 0
    while halvings + 1 < WIDTHS and longest_new >> (halvings + 1) >= SMALLEST_WIDTH:
        halvings += 1
    narrowest = -(-longest_new // (16 << halvings)) * 16
    widths = [narrowest << i for i in range(halvings + 1)]

    def shapes(slots: int) -> Shapes:
        # Samples of a group end at different times, so more groups are open than slots / n: about three times as many.
        entries = min(slots, max(1, -(-prompts // banks)), -(-3 * slots // sampling.n))
        return Shapes(banks, slots, entries, min(sampling.n, slots), _bucket(max(1, longest - 1)), tuple(widths))

    slots = -(-min(sampling.slots, max(1, prompts) * sampling.n) // banks)
    budget = free_gib if sampling.cache_gib is None else sampling.cache_gib
    if budget is None:
        return shapes(slots)
    fitting = next((s for s in range(slots, 0, -1) if shapes(s).cache_bytes(config, itemsize) <= budget * 2**30), None)
    if fitting is None:
        least = math.ceil(shapes(1).cache_bytes(config, itemsize) / 2**30 * 1e6) / 1e6
        need = f"holds no sample of {longest} + {sampling.max_new_tokens} tokens on {banks} data-parallel devices"
        if sampling.cache_gib is not None:
            raise InputError(f"sampling.cache_gib={budget} {need}; give at least {least:g}, or fewer tokens")
        raise InputError(
            f"beside the weights, the devices have {budget:.3g} GiB for keys and values, which {need}; that takes "
            f"{least:.3g} GiB: ask for fewer tokens, or let more devices share a copy of the weights (a larger tensor)"
        )
    return shapes(fitting)


def cache_ways(config: QwenConfig, mesh: Mesh) -> int:
    """The number of devices over which the cache of all banks is split. A tensor axis that does not divide the
    key-value heads replicates it."""
    tensor = mesh.shape["tensor"]
    return rows_divisor(mesh) * (tensor if config.num_kv_heads % tensor == 0 else 1)


def _bucket(n: int) -> int:
    """The smallest of 16, 32, 64, 96, 128, 192, 256, 384, ... that holds n: above 64 at most a third is padding."""
    size = 16 * 2 ** max(0, math.ceil(math.log2(n / 16)))
    return size * 3 // 4 if size >= 128 and n <= size * 3 // 4 else size
