"""What to turn where a program does not fit: each setting with what it saves of a chip's memory.

The savings are estimates by formula. To know, plan again with the setting.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jax.sharding import Mesh

from rmr1_jax.mesh import rows_divisor
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.plan_compile import Compiled, bytes_here
from rmr1_jax.plan_sampler import weight_bytes
from rmr1_jax.plan_slice import GIB
from rmr1_jax.plan_train import Config, reference_bytes, rows_of, weights
from rmr1_jax.policy import DTYPES
from rmr1_jax.train.grpo import GrpoConfig


def training_knobs(
    config: Config, model: QwenConfig, mesh: Mesh, compiled: Compiled, over: int, *, update: bool
) -> list[str]:
    """Settings that make room for a program of training, the cheapest in speed first. over: bytes too much. update:
    whether it is the update, which has the moments on the chip wherever they lie otherwise."""
    knobs = [*_resident_knobs(config, model, mesh, update), *_activation_knobs(config, model, mesh, compiled)]
    return _texts(knobs, over)


def sampling_knobs(config: GrpoConfig, model: QwenConfig, mesh: Mesh, local: Mesh, limit: int) -> list[str]:
    """Settings that make room for the sampler beside training. mesh: of training; local: of the sampler on a host."""
    knobs = list(_resident_knobs(config, model, mesh, update=False))
    tensor = local.shape["tensor"]
    if local.size % (2 * tensor) == 0:
        dtype = DTYPES[config.dtype]
        knobs.append((f"sampling_tensor={2 * tensor}", weight_bytes(model, local, dtype) / 2))
    return [
        *_texts(knobs, limit),
        f"sampling.max_new_tokens below {config.sampling.max_new_tokens}: a slot has as many columns in the cache",
    ]


def _resident_knobs(config: Config, model: QwenConfig, mesh: Mesh, update: bool) -> Iterator[tuple[str, float]]:
    """What can lie elsewhere than on the chips, or in fewer bytes."""
    float32 = bytes_here(weights(model, mesh, jnp.float32))
    if isinstance(config, GrpoConfig) and (reference := reference_bytes(config, model, mesh)):
        yield "reference_memory=host", reference
    if config.optimizer.mu_dtype == "float32" and config.optimizer.memory == "device":
        yield "optimizer.mu_dtype=bfloat16", float32 / 2
    if config.optimizer.memory == "device" and not update:
        yield "optimizer.memory=host", (1.5 + 0.5 * (config.optimizer.mu_dtype == "float32")) * float32


def _activation_knobs(config: Config, model: QwenConfig, mesh: Mesh, compiled: Compiled) -> Iterator[tuple[str, float]]:
    rows, shards = rows_of(config), rows_divisor(mesh)
    mine = rows.micro // shards
    kept = model.num_layers * mine * rows.length * model.hidden_size * jnp.dtype(DTYPES[config.dtype]).itemsize
    moving = compiled.temporaries - kept  # a layer at work, the head, gradients: part of it goes with the rows
    if config.remat in ("none", "dots"):
        wide = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + 3 * model.intermediate_size
        yield "remat=full", kept * wide / model.hidden_size / mesh.shape["tensor"]
    elif config.remat == "full":
        yield "remat=offload", kept
    if mine > 1:
        yield f"micro_rows={shards} (one row a chip)", (kept + moving / 2) * (1 - 1 / mine)
    else:
        yield f"mesh.tensor={2 * mesh.shape['tensor']} micro_rows={max(1, rows.micro // 2)}", moving / 2
    if not isinstance(config, GrpoConfig):
        yield f"row_length={rows.length // 2}", (kept + moving / 2) / 2
    params = bytes_here(weights(model, mesh, jnp.float32))
    yield "a slice of twice as many chips", 2 * params


def _texts(knobs: list[tuple[str, float]], over: float) -> list[str]:
    enough = {True: ", enough by itself", False: ""}
    return [f"{name}: about {saved / GIB:.2f} GiB less{enough[saved >= over]}" for name, saved in knobs]
