"""The cost of a program by formula, and the time that follows: bound by compute, by memory, or by links between chips.

The formulas are lower bounds: each array that must pass through a chip's memory passes once, all work overlaps, and
every link is in use. XLA's own counts are of no use here: a loop's body counts once and a kernel not at all.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.distributed.chips import chip_of
from rmr1_jax.distributed.mesh import rows_divisor, single_device_mesh
from rmr1_jax.model.attention import block_size, choose
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.packed_blocks import visited_scores
from rmr1_jax.plan.sampler import SamplingTask
from rmr1_jax.plan.traffic import Traffic
from rmr1_jax.plan.train import BatchShape, Config
from rmr1_jax.policy import DTYPES
from rmr1_jax.sampler.programs import STEPS
from rmr1_jax.sampler.shapes import CHUNKS, PREFILL_ROWS, Shapes, cache_ways
from rmr1_jax.train.logprobs import chunk_width
from rmr1_jax.train.metrics import forward_flops, layer_params, train_flops

SAMPLED_ROWS = 8  # rows in which the blocks of attention are counted


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one call on `chips` chips.

    model_flops: FLOPs that the mathematics needs, on all chips. flops: FLOPs that are computed, which adds those that
    are recomputed and those that a mask hides. memory: bytes through the memory of one chip. tokens: on all chips.
    """

    model_flops: float
    flops: float
    memory: float
    chips: int
    tokens: int


class Bound(NamedTuple):
    """The least time of a call, the resource that takes it (compute, memory or links), and the MFU at that time."""

    name: str
    seconds: float
    mfu: float


def time_bound(cost: Cost, traffic: Traffic, device: jax.Device) -> Bound | None:
    """Return the bound on a device's kind of chip; None if its speeds are not known."""
    chip = chip_of(device)
    if chip is None or chip.memory is None or chip.links is None or chip.network is None:
        return None
    seconds = {
        "compute": cost.flops / cost.chips / chip.flops,
        "memory": cost.memory / chip.memory,
        "links": max(traffic.total / chip.links, traffic.network / chip.network),
    }
    name = max(seconds, key=seconds.__getitem__)
    return Bound(name, seconds[name], cost.model_flops / (cost.chips * chip.flops * seconds[name]))


def update_cost(config: Config, model: QwenConfig, mesh: Mesh, batch: BatchShape) -> Cost:
    """Return the cost of an optimizer update."""
    parts = _forward_flops(config, model, mesh, batch)
    recomputed = int(config.remat in ("full", "offload"))
    # The backward pass has two products for each of the forward pass. Attention's scores and the logits are always
    # recomputed. The last product of a layer never is: its result is kept as the input of the next layer.
    flops = parts["layers"] * (3 + recomputed) - recomputed * parts["last"]
    flops += parts["attention"] * (3.5 + recomputed) + parts["head"] * 4
    memory = _forward_memory(config, model, mesh, batch, passes=3 + recomputed, head_passes=3)
    embeddings = 1 if model.tie_word_embeddings else 2
    params = model.num_layers * layer_params(model) + embeddings * model.vocab_size * model.hidden_size
    memory += batch.micro_batches * 4 * params / mesh.shape["tensor"]  # gradients, once per micro-batch
    # Weights and moments are read and written, gradients are read.
    memory += 28 * params / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return Cost(train_flops(model, *batch.sequences), flops, memory, mesh.size, batch.tokens)


def forward_cost(config: Config, model: QwenConfig, mesh: Mesh, batch: BatchShape) -> Cost:
    """Return the cost of the log-probabilities of a batch."""
    parts = _forward_flops(config, model, mesh, batch)
    flops = sum(parts.values()) - parts["last"]
    memory = _forward_memory(config, model, mesh, batch, passes=1, head_passes=1)
    return Cost(forward_flops(model, *batch.sequences), flops, memory, mesh.size, batch.tokens)


def decode_cost(config: QwenConfig, mesh: Mesh, shapes: Shapes, task: SamplingTask) -> Cost:
    """Return the cost of one dispatch, STEPS tokens for every slot, at the largest cache. Each step reads the weights
    and the whole cache."""
    slots, heads = shapes.banks * shapes.slots, 4 * config.num_layers * config.num_heads * config.head_dim
    product = 2 * (config.num_layers * layer_params(config) + config.vocab_size * config.hidden_size)
    # Each prompt is attended to from as many slots as a group has, free ones included.
    columns = shapes.banks * shapes.entries * shapes.ranks * shapes.room + slots * shapes.widths[-1]
    seen = slots * (task.max_prompt_length + task.sampling.max_new_tokens / 2)
    memory = task.dtype.itemsize * product / 2 / mesh.shape["tensor"] + _cache_bytes(config, mesh, shapes, task)
    flops = STEPS * (slots * product + heads * columns)
    model_flops = STEPS * (slots * product + heads * seen)
    return Cost(model_flops, flops, STEPS * memory, mesh.size, STEPS * slots)


def prefill_cost(config: QwenConfig, mesh: Mesh, shapes: Shapes, task: SamplingTask) -> Cost:
    """Return the cost of the last chunk of the longest prompts, several per bank."""
    chunk, itemsize = max(c for c in CHUNKS if c <= shapes.room), task.dtype.itemsize
    prompts = shapes.banks * PREFILL_ROWS
    layers = config.num_layers * layer_params(config)
    heads = 4 * config.num_layers * config.num_heads * config.head_dim
    column = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    flops = prompts * chunk * (2 * layers + heads * shapes.room)
    model_flops = prompts * chunk * (2 * layers + heads * (shapes.room - chunk / 2))
    memory = itemsize * layers / mesh.shape["tensor"] + prompts * shapes.room * column / cache_ways(config, mesh)
    return Cost(model_flops, flops, memory, mesh.size, prompts * chunk)


def grow_cost(config: QwenConfig, mesh: Mesh, shapes: Shapes, task: SamplingTask) -> Cost:
    """Return the cost of widening the rings of all layers to the last width: the old cache is read, the new written."""
    new = _cache_bytes(config, mesh, shapes, task)
    return Cost(0, 0, new + new * shapes.widths[-2] / shapes.widths[-1], mesh.size, 0)


def _cache_bytes(config: QwenConfig, mesh: Mesh, shapes: Shapes, task: SamplingTask) -> float:
    return shapes.cache_bytes(config, task.dtype.itemsize) / cache_ways(config, mesh)


def _forward_flops(config: Config, model: QwenConfig, mesh: Mesh, batch: BatchShape) -> dict[str, float]:
    """Return the FLOPs of one forward pass as it is computed: attention in blocks, the last of which is partly masked.
    layers: all products with weights of layers; last: the last product of each layer, which `layers` includes."""
    T, rows = batch.row_length, batch.rows
    chosen = choose(config.attention, mesh.devices.flat[0], dtype=DTYPES[config.dtype], head_dim=model.head_dim)
    in_kernel = chosen in ("pallas", "interpret")
    scores = kernel_scores(batch) if in_kernel else rows * T * (T + min(block_size(T), T)) / 2
    layers = 2 * model.num_layers * rows * T
    return {
        "layers": layers * layer_params(model),
        "last": layers * model.intermediate_size * model.hidden_size,
        "attention": 4 * model.num_layers * model.num_heads * model.head_dim * scores,
        "head": 2 * model.vocab_size * model.hidden_size * rows * batch.head_positions,
    }


def kernel_scores(batch: BatchShape) -> float:
    """Return the scores per head that the Pallas kernel computes for a batch. They are counted in a sample of its rows,
    which are filled in order with whole groups: a segment and those that see it."""
    (alone, *seeing), T = batch.segments or ((batch.rows, batch.row_length, 0),), batch.row_length
    ids, parents = np.zeros((2, min(batch.rows, SAMPLED_ROWS), T), np.int32)
    row = at = last = placed = 0
    for i in range(alone[0]):
        sizes = [alone[1]]
        for number, tokens, _ in seeing:
            sizes += [tokens] * ((i + 1) * number // alone[0] - i * number // alone[0])
        while sum(sizes) > T:
            sizes.pop()
        if at + sum(sizes) > T:
            row, at, last = row + 1, 0, 0
        if row == len(ids):
            break
        parent = last + 1
        for size in sizes:
            last += 1
            ids[row, at : at + size], parents[row, at : at + size] = last, parent * (last > parent)
            at += size
        placed += sum(sizes)
    with jax.set_mesh(single_device_mesh()):  # not on the slice that is planned for, which cannot compute
        counted = np.asarray(visited_scores(jnp.asarray(ids), jnp.asarray(parents)), float).sum()
    return counted * sum(number * tokens for number, tokens, _ in (alone, *seeing)) / placed


def _forward_memory(
    config: Config, model: QwenConfig, mesh: Mesh, batch: BatchShape, *, passes: float, head_passes: float
) -> float:
    """Return the bytes through a chip's memory in `passes` over the layers and `head_passes` over the head. Each reads
    the weights once, every product's operands and result, and reads and writes the float32 logits."""
    itemsize, tensor = DTYPES[config.dtype].dtype.itemsize, mesh.shape["tensor"]
    tokens = batch.micro_rows * batch.row_length / rows_divisor(mesh)  # of one chip, in one micro-batch
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    wide = (2 * heads + 2 * model.num_heads * model.head_dim + 4 * model.intermediate_size) / tensor
    layer = itemsize * (layer_params(model) / tensor + tokens * (8 * model.hidden_size + wide))
    # The head is computed in chunks of the vocabulary, each of which reads all positions (`logprobs.token_logprobs`).
    columns, read = model.vocab_size / tensor, tokens * batch.head_positions / batch.row_length
    chunks = math.ceil(columns / chunk_width(math.ceil(columns), math.ceil(read)))
    head = itemsize * model.hidden_size * (columns + chunks * read) + 2 * 4 * read * columns
    return batch.micro_batches * (passes * model.num_layers * layer + head_passes * head)
