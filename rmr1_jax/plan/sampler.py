"""The sampler's programs on the chips of one host, at the most slots that fit beside what training keeps there.

A sampler never crosses hosts: each has its own copy of the weights, its own slots and its share of the prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmr1_jax.distributed.mesh import MeshConfig, activation_sharding, make_mesh, rows_divisor, sampling_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen, split
from rmr1_jax.plan.compile import Compiled, abstract, bytes_here, compile_program
from rmr1_jax.plan.slice import GIB
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.cache import Cache
from rmr1_jax.sampler.programs import make_controls, stack_slots
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.shapes import CHUNKS, PREFILL_ROWS, Shapes, cache_ways, plan_shapes
from rmr1_jax.sampler.slots import Bank
from rmr1_jax.sampler.weights import abstract_weights

WEIGHTS_SHARE = 0.5  # of the memory that training leaves, at most, before the tensor axis is made larger

OnTry = Callable[[Shapes, QwenConfig], None]


@dataclasses.dataclass(frozen=True)
class Demand:
    """What one host's sampler is asked for: `sampling` of `prompts` prompts of at most `longest` tokens, in `dtype`."""

    sampling: SamplingConfig
    prompts: int
    longest: int
    dtype: np.dtype


def say(shapes: Shapes, config: QwenConfig) -> None:
    print(f"compiling {config.num_layers} layers, {shapes.banks} x {shapes.slots} slots", file=sys.stderr, flush=True)


def fit(
    config: QwenConfig, mesh: Mesh, demand: Demand, limit: int, *, resident: int = 0, on_try: OnTry = say
) -> tuple[Shapes, dict[str, Compiled]]:
    """The most slots at which every program fits in `limit` bytes a chip, and what the programs take there.

    A model of two layers tells first what the programs need beside weights and cache; from then on it is the last try
    that did not fit. Where not even one slot does, that try is returned.

    Args:
        resident: bytes a chip of what else lies there.

    Raises:
        InputError: the weights and what the programs need leave no room for one slot.
    """
    banks, ways, itemsize = rows_divisor(mesh), cache_ways(config, mesh), demand.dtype.itemsize
    wanted, budget = demand.prompts * demand.sampling.n, demand.sampling.cache_gib or math.inf

    def shapes_beside(used: int) -> Shapes:
        room = min(budget, max(limit - used, 1) * ways / GIB)
        asked = dataclasses.replace(demand.sampling, slots=wanted, cache_gib=room)
        return plan_shapes(
            config, asked, prompts=demand.prompts, longest=demand.longest, banks=banks, itemsize=itemsize
        )

    def used_beside(config: QwenConfig, shapes: Shapes, compiled: dict[str, Compiled]) -> int:
        return max(c.total for c in compiled.values()) - shapes.cache_bytes(config, itemsize) // ways

    shallow = dataclasses.replace(config, num_layers=2)
    weights = weight_bytes(config, mesh, demand.dtype)
    shapes = shapes_beside(resident + weights)
    on_try(shapes, shallow)
    compiled = sampler_programs(shallow, mesh, shapes, demand.dtype, resident)
    used = weights + used_beside(shallow, shapes, compiled) - weight_bytes(shallow, mesh, demand.dtype)
    best = None
    while True:
        try:
            shapes = shapes_beside(used)
        except InputError:
            if best is None:
                raise
            return best
        on_try(shapes, config)
        compiled = sampler_programs(config, mesh, shapes, demand.dtype, resident)
        best = shapes, compiled
        if all(c.fits(limit) for c in compiled.values()):
            return best
        # At least a byte less for the cache than now, or the same shapes would come again.
        least = limit + 1 - shapes.cache_bytes(config, itemsize) // ways
        used = max(used_beside(config, shapes, compiled), least)


def sampler_programs(config: QwenConfig, mesh: Mesh, shapes: Shapes, dtype, resident: int = 0) -> dict[str, Compiled]:
    """Compile decode, prefill and the last growth of the rings for the mesh's devices, at the largest cache.

    Args:
        mesh: over devices that are there, or over those of a topology description.
    """
    devices = list(mesh.devices.flat)
    compile_here = functools.partial(compile_program, devices=devices, dynamic_trips=programs.STEPS)
    with jax.set_mesh(mesh):
        size = max(shapes.sizes, key=lambda s: s[0] * shapes.widths[-1] + s[1] * shapes.room)
        graphdef, weights = split(Qwen(config))[0], abstract_weights(Qwen(config), mesh, dtype)
        cache = abstract_cache(config, mesh, shapes, size, shapes.widths[-1], dtype)
        idle = [Bank(*size) for _ in range(shapes.banks)]
        controls = abstract(make_controls(SamplingConfig(), ()), NamedSharding(mesh, PartitionSpec()))
        by_bank = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
        slots = abstract(stack_slots(idle, [0] * shapes.banks), by_bank)
        compiled = {
            "decode": compile_here(programs.decode, graphdef, weights, controls, cache, slots, resident=resident)
        }

        per_prompt = np.zeros((shapes.banks, PREFILL_ROWS), np.int32)
        tokens = np.zeros((*per_prompt.shape, max(c for c in CHUNKS if c <= shapes.room)), np.int32)
        chunk = abstract((tokens, per_prompt, per_prompt, per_prompt > 0), by_bank)
        prompts = cache._replace(own_k=[], own_v=[])
        rings = bytes_here((cache.own_k, cache.own_v))
        compiled["prefill"] = compile_here(
            programs.prefill_prompts, graphdef, weights, prompts, *chunk, resident=resident + rings
        )

        if len(shapes.widths) > 1:
            grow = jax.jit(lambda layer: programs.grow(layer, width=shapes.widths[-1]))
            old = first_layer(abstract_cache(config, mesh, shapes, size, shapes.widths[-2], dtype))
            # One layer at a time: beside the new cache, the last layer of which is being made, lie its old rings.
            others = bytes_here((weights, cache)) - bytes_here(first_layer(cache))
            compiled["grow"] = compile_here(grow, old, resident=resident + others)
    # The engine keeps a decode program for every width and number of rows, and their code lies on the chip too.
    decodes, prefills = len(shapes.widths) * len(shapes.sizes), 2 * len(CHUNKS)
    code = decodes * compiled["decode"].code + prefills * compiled["prefill"].code
    return {name: dataclasses.replace(c, code=code) for name, c in compiled.items()}


def abstract_cache(
    config: QwenConfig, mesh: Mesh, shapes: Shapes, size: tuple[int, int, int], width: int, dtype
) -> Cache:
    """What `programs.empty_cache` makes, without making it. size: one of `shapes.sizes`."""
    slots, entries, _ = size
    sizes = {"banks": shapes.banks, "entries": entries, "room": shapes.room, "slots": slots, "width": width}
    cache = jax.eval_shape(lambda: programs.empty_cache(config, **sizes, dtype=dtype))
    return abstract(cache, activation_sharding(mesh, "BKCC", cache.own_k[0].shape))


def first_layer(cache: Cache) -> Cache:
    return Cache(*(part[:1] for part in cache))


def host_mesh(
    config: QwenConfig, devices: Sequence[jax.Device], limit: int, dtype, *, resident: int, tensor: int | None
) -> Mesh:
    """The mesh of one host's sampler over its `devices`.

    tensor: of the run's config. Where it is None, data-parallel replicas come before tensor parallelism: the smallest
    tensor axis at which the weights take no more than half of what is left of a chip. Axes that divide the key-value
    heads come first, as with others every chip has the whole cache.

    Raises:
        InputError: a tensor axis that reaches into another host.
    """
    whole = make_mesh(MeshConfig(), devices)
    if tensor:
        return sampling_mesh(whole, tensor)
    sizes = [t for t in range(1, whole.size + 1) if whole.size % t == 0]
    sizes.sort(key=lambda t: config.num_kv_heads % t != 0)
    for size in sizes:
        mesh = sampling_mesh(whole, size)
        if weight_bytes(config, mesh, dtype) <= WEIGHTS_SHARE * (limit - resident):
            break
    return mesh


def weight_bytes(config: QwenConfig, mesh: Mesh, dtype) -> int:
    """Of the sampling weights on one chip."""
    return bytes_here(abstract_weights(Qwen(config), mesh, dtype))
