"""What a program costs by formula, and the time that follows: bound by compute, by memory, or by links.

The formulas are lower bounds: each array that must pass through a chip's memory passes once, nothing waits for anything
else, and every link is used at once. What XLA counts itself (`cost_analysis`) is no help: a scanned body counts once
and a kernel not at all.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rmr1_jax.distributed.chips import chip_of
from rmr1_jax.distributed.mesh import rows_divisor
from rmr1_jax.model.attention import BLOCKS, block_size, choose
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.plan.traffic import Traffic
from rmr1_jax.policy import DTYPES
from rmr1_jax.sampler.programs import STEPS
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.shapes import CHUNKS, PREFILL_ROWS, Shapes
from rmr1_jax.train.logprobs import chunk_width
from rmr1_jax.train.metrics import forward_flops, layer_params, train_flops


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call on `chips` chips. model_flops: what the mathematics needs, of all chips. flops: what is computed,
    with what remat does twice and what a mask hides. memory: bytes that pass through one chip's memory."""

    model_flops: float
    flops: float
    memory: float
    chips: int
    tokens: int


class Bound(NamedTuple):
    """The least time of a call and what it is spent on: compute, memory or links."""

    name: str
    seconds: float
    mfu: float


def time_bound(cost: Cost, traffic: Traffic, device: jax.Device) -> Bound | None:
    """None for a device whose speeds are not known."""
    chip = chip_of(device)
    if chip is None or chip.memory is None or chip.links is None or chip.network is None:
        return None
    seconds = {
        "compute": cost.flops / cost.chips / chip.flops,
        "memory": cost.memory / chip.memory,
        "links": max(traffic.total / chip.links, traffic.slices / chip.network),
    }
    name = max(seconds, key=seconds.__getitem__)
    return Bound(name, seconds[name], cost.model_flops / (cost.chips * chip.flops * seconds[name]))


def update_cost(config: Any, model: QwenConfig, mesh: Mesh, rows: Any) -> Cost:
    """Of an optimizer update over `rows` (`plan_train.Rows`), each counted as one sequence of its whole length."""
    parts = _forward_parts(config, model, mesh, rows)
    again = int(config.remat in ("full", "offload"))
    attention_again = again or int(config.remat == "dots" and _splash(config, mesh))  # a kernel is no product to keep
    # Two products of the backward pass for each of the forward's; attention's scores and the logits are never kept.
    # What a layer gives is kept as the next one's input, so its last product is not done again.
    flops = parts["layers"] * (3 + again) - again * parts["last"]
    flops += parts["attention"] * (3.5 + attention_again) + parts["head"] * 4
    memory = _forward_memory(config, model, mesh, rows, passes=3 + again, head_passes=3)
    params, tensor = _params(model), mesh.shape["tensor"]
    memory += rows.count * 4 * params / tensor  # gradients, once a micro-batch
    memory += 28 * params / (mesh.shape["fsdp"] * tensor)  # weights and moments are read and written, gradients read
    tokens = rows.count * rows.micro * rows.length
    model_flops = train_flops(model, [rows.length] * (rows.count * rows.micro))
    return Cost(model_flops, flops, memory, mesh.size, tokens)


def forward_cost(config: Any, model: QwenConfig, mesh: Mesh, rows: Any) -> Cost:
    """Of log-probabilities of `rows`."""
    parts = _forward_parts(config, model, mesh, rows)
    memory = _forward_memory(config, model, mesh, rows, passes=1, head_passes=1)
    tokens = rows.count * rows.micro * rows.length
    model_flops = forward_flops(model, [rows.length] * (rows.count * rows.micro))
    return Cost(model_flops, sum(parts.values()) - parts["last"], memory, mesh.size, tokens)


def decode_cost(
    config: QwenConfig, mesh: Mesh, shapes: Shapes, sampling: SamplingConfig, longest: int, itemsize: int, ways: int
) -> Cost:
    """Of one dispatch, STEPS tokens for every slot, with the cache at its largest: each step reads the weights and the
    whole cache."""
    slots, heads = shapes.banks * shapes.slots, 4 * config.num_layers * config.num_heads * config.head_dim
    product = 2 * (config.num_layers * layer_params(config) + config.vocab_size * config.hidden_size)
    # A prompt is attended to for as many slots as a group has, whether they are taken or not.
    columns = shapes.banks * shapes.entries * shapes.ranks * shapes.room + slots * shapes.widths[-1]
    seen = slots * (longest + sampling.max_new_tokens / 2)
    memory = itemsize * product / 2 / mesh.shape["tensor"] + shapes.cache_bytes(config, itemsize) / ways
    flops = STEPS * (slots * product + heads * columns)
    model_flops = STEPS * (slots * product + heads * seen)
    return Cost(model_flops, flops, STEPS * memory, mesh.size, STEPS * slots)


def prefill_cost(config: QwenConfig, mesh: Mesh, shapes: Shapes, itemsize: int, ways: int) -> Cost:
    """Of a chunk of some prompts a bank, at the end of the longest prompt."""
    chunk = max(c for c in CHUNKS if c <= shapes.room)
    prompts = shapes.banks * PREFILL_ROWS
    layers = config.num_layers * layer_params(config)
    heads = 4 * config.num_layers * config.num_heads * config.head_dim
    column = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    flops = prompts * chunk * (2 * layers + heads * shapes.room)
    model_flops = prompts * chunk * (2 * layers + heads * (shapes.room - chunk / 2))
    memory = itemsize * layers / mesh.shape["tensor"] + prompts * shapes.room * column / ways
    return Cost(model_flops, flops, memory, mesh.size, prompts * chunk)


def grow_cost(config: QwenConfig, mesh: Mesh, shapes: Shapes, itemsize: int, ways: int) -> Cost:
    """Of the last growth of the rings, all layers: the old cache is read, the new one written."""
    new = shapes.cache_bytes(config, itemsize) / ways
    return Cost(0, 0, new + new * shapes.widths[-2] / shapes.widths[-1], mesh.size, 0)


def _forward_parts(config: Any, model: QwenConfig, mesh: Mesh, rows: Any) -> dict[str, float]:
    """FLOPs of one forward pass as it is computed: attention in blocks, of which the last of a row is not all seen.
    layers: of the weights' products, `last` the last one of each layer."""
    T, number = rows.length, rows.count * rows.micro
    block = next((b for b in BLOCKS if T % b == 0), BLOCKS[-1]) if _splash(config, mesh) else block_size(T)
    scores = number * T * (T + min(block, T)) / 2
    layers = 2 * model.num_layers * number * T
    return {
        "layers": layers * layer_params(model),
        "last": layers * model.intermediate_size * model.hidden_size,
        "attention": 4 * model.num_layers * model.num_heads * model.head_dim * scores,
        "head": 2 * model.vocab_size * model.hidden_size * number * T,
    }


def _splash(config: Any, mesh: Mesh) -> bool:
    return choose(config.attention, mesh) in ("splash", "interpret")


def _forward_memory(
    config: Any, model: QwenConfig, mesh: Mesh, rows: Any, *, passes: float, head_passes: float
) -> float:
    """Bytes through a chip's memory in `passes` passes over the layers and `head_passes` over the head: the weights
    once for each, every product's operands and result, and the logits in float32 (written and read)."""
    itemsize, tensor = DTYPES[config.dtype].dtype.itemsize, mesh.shape["tensor"]
    tokens = rows.micro * rows.length / rows_divisor(mesh)  # of a chip, in a micro-batch
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    wide = (2 * heads + 2 * model.num_heads * model.head_dim + 4 * model.intermediate_size) / tensor
    layer = itemsize * (layer_params(model) / tensor + tokens * (8 * model.hidden_size + wide))
    # The head goes through the vocabulary in chunks, each of which reads all positions (`logprobs.token_logprobs`).
    columns = model.vocab_size / tensor
    chunks = math.ceil(columns / chunk_width(math.ceil(columns), math.ceil(tokens)))
    head = itemsize * model.hidden_size * (columns + chunks * tokens) + 2 * 4 * tokens * columns
    return rows.count * (passes * model.num_layers * layer + head_passes * head)


def _params(model: QwenConfig) -> int:
    embeddings = 1 if model.tie_word_embeddings else 2
    return model.num_layers * layer_params(model) + embeddings * model.vocab_size * model.hidden_size
