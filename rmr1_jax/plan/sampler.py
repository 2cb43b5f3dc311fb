"""Compiles the sampler's programs for the chips of one host, with as many slots as fit beside the data of training.

A sampler stays within a host: each host has its own copy of the weights, its own slots and its share of the prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmr1_jax.distributed.chips import bytes_per_chip
from rmr1_jax.distributed.mesh import activation_sharding, rows_divisor
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen, split
from rmr1_jax.plan.compile import Compiled, abstract, compile_program
from rmr1_jax.plan.slice import GIB
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.cache import Cache
from rmr1_jax.sampler.layout import weight_bytes
from rmr1_jax.sampler.programs import make_controls, stack_slots
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.shapes import CHUNKS, PREFILL_ROWS, Shapes, cache_ways, plan_shapes
from rmr1_jax.sampler.slots import Bank
from rmr1_jax.sampler.weights import abstract_weights


@dataclasses.dataclass(frozen=True)
class SamplingTask:
    """The work of one host's sampler in a step. prompts: their number. dtype: that of the weights and the cache."""

    sampling: SamplingConfig
    prompts: int
    max_prompt_length: int
    dtype: np.dtype


def fit_slots(
    config: QwenConfig, mesh: Mesh, task: SamplingTask, limit: int, *, resident: int = 0
) -> tuple[Shapes, dict[str, Compiled]]:
    """Find the most slots with which every program fits in `limit` bytes per chip, beside `resident` bytes of other
    data; return them and the programs.

    Only a compiled program tells how much memory it needs beside weights and cache. The first estimate is from a model
    of two layers, each later one from the last attempt. If not even one slot fits, the last attempt is returned. Raises
    InputError if the weights and temporaries leave no memory for one slot.
    """
    banks, ways, itemsize = rows_divisor(mesh), cache_ways(config, mesh), task.dtype.itemsize
    wanted, budget = task.prompts * task.sampling.n, task.sampling.cache_gib or math.inf

    def shapes_beside(used: int) -> Shapes:
        room = min(budget, max(limit - used, 1) * ways / GIB)
        sampling = dataclasses.replace(task.sampling, slots=wanted, cache_gib=room)
        sizes = {"prompts": task.prompts, "longest": task.max_prompt_length, "banks": banks, "itemsize": itemsize}
        return plan_shapes(config, sampling, **sizes)

    def attempt(config: QwenConfig, shapes: Shapes) -> tuple[dict[str, Compiled], int]:
        """Compile; also return the bytes per chip that the programs use beside the cache."""
        text = f"compiling {config.num_layers} layers, {shapes.banks} x {shapes.slots} slots"
        print(text, file=sys.stderr, flush=True)
        compiled = sampler_programs(config, mesh, shapes, task.dtype, resident)
        return compiled, max(c.total for c in compiled.values()) - shapes.cache_bytes(config, itemsize) // ways

    shallow = dataclasses.replace(config, num_layers=2)
    weights = weight_bytes(Qwen(config), mesh, task.dtype)
    _, used = attempt(shallow, shapes_beside(resident + weights))
    used += weights - weight_bytes(Qwen(shallow), mesh, task.dtype)
    shapes = shapes_beside(used)
    while True:
        compiled, used = attempt(config, shapes)
        if all(c.fits(limit) for c in compiled.values()):
            return shapes, compiled
        # At least one byte less for the cache, or the next attempt would have the same shapes.
        used = max(used, limit + 1 - shapes.cache_bytes(config, itemsize) // ways)
        try:
            shapes = shapes_beside(used)
        except InputError:
            return shapes, compiled


def sampler_programs(config: QwenConfig, mesh: Mesh, shapes: Shapes, dtype, resident: int = 0) -> dict[str, Compiled]:
    """Compile decode, prefill and the last growth of the rings for the mesh's devices, at the largest cache."""
    compile_here = functools.partial(compile_program, devices=list(mesh.devices.flat), dynamic_trips=programs.STEPS)
    size = max(shapes.sizes, key=lambda s: s[0] * shapes.widths[-1] + s[1] * shapes.room)

    def abstract_cache(config: QwenConfig, width: int) -> Cache:
        sizes = {"banks": shapes.banks, "entries": size[1], "room": shapes.room, "slots": size[0], "width": width}
        cache = jax.eval_shape(lambda: programs.empty_cache(config, **sizes, dtype=dtype))
        return abstract(cache, activation_sharding(mesh, "BKCC", cache.own_k[0].shape))

    with jax.set_mesh(mesh):
        graphdef, weights = split(Qwen(config))[0], abstract_weights(Qwen(config), mesh, dtype)
        cache = abstract_cache(config, shapes.widths[-1])
        idle = [Bank(*size) for _ in range(shapes.banks)]
        controls = abstract(make_controls(SamplingConfig(), ()), NamedSharding(mesh, PartitionSpec()))
        by_bank = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
        slots = abstract(stack_slots(idle, [0] * shapes.banks), by_bank)
        inputs = (graphdef, weights, controls, cache, slots)
        compiled = {"decode": compile_here(programs.decode, *inputs, resident=resident)}

        per_prompt = np.zeros((shapes.banks, PREFILL_ROWS), np.int32)
        tokens = np.zeros((*per_prompt.shape, max(c for c in CHUNKS if c <= shapes.room)), np.int32)
        chunk = abstract((tokens, per_prompt, per_prompt, per_prompt > 0), by_bank)
        prompts = cache._replace(own_k=[], own_v=[])
        held = resident + bytes_per_chip((cache.own_k, cache.own_v))
        compiled["prefill"] = compile_here(programs.prefill_prompts, graphdef, weights, prompts, *chunk, resident=held)

        if len(shapes.widths) > 1:
            grow = jax.jit(lambda layer: programs.grow(layer, width=shapes.widths[-1]))
            old = abstract_cache(dataclasses.replace(config, num_layers=1), shapes.widths[-2])
            # Layers grow one at a time. At the last one, all others are in the new cache already.
            held = resident + bytes_per_chip((weights, cache)) - bytes_per_chip(cache) // config.num_layers
            compiled["grow"] = compile_here(grow, old, resident=held)
    # The engine keeps a decode program for each width and number of rows, and their code stays on the chip too.
    decodes, prefills = len(shapes.widths) * len(shapes.sizes), 2 * len(CHUNKS)
    code = decodes * compiled["decode"].code + prefills * compiled["prefill"].code
    return {name: dataclasses.replace(c, code=code) for name, c in compiled.items()}
