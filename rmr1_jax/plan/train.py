"""The programs of training, as a run would compile them: the update, and in GRPO the log-probabilities before it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rmr1_jax.distributed.mesh import MeshConfig, activation_sharding, make_mesh, rows_divisor
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen, abstract_params, split
from rmr1_jax.plan.compile import Compiled, bytes_here, compile_program
from rmr1_jax.plan.costs import Cost, forward_cost, update_cost
from rmr1_jax.policy import DTYPES
from rmr1_jax.train.config import GrpoConfig, SftConfig
from rmr1_jax.train.grpo import batch_logprobs, grpo_micro_loss
from rmr1_jax.train.logprobs import forward_options
from rmr1_jax.train.losses import policy_loss
from rmr1_jax.train.optim import abstract_state, compile_update, in_memory, make_optimizer
from rmr1_jax.train.sft import sft_micro_loss

Config = SftConfig | GrpoConfig
UPDATES = 1000  # of a run; the number is in the learning rate's formula and changes no shape


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of an update: `count` micro-batches of `micro` rows of `length` tokens, in arrays of `room`."""

    count: int
    room: int
    micro: int
    length: int


def rows_of(config: Config) -> Rows:
    """The rows of one update. In GRPO they depend on how long the texts get: half of the longest prompt and response
    is taken, packed without gaps."""
    if isinstance(config, SftConfig):
        count = config.rows_per_step // config.micro_rows
        return Rows(count, count, config.micro_rows, config.row_length)
    tokens = config.mini_batch_prompts * config.sampling.n * mean_length(config)
    count = max(1, math.ceil(tokens / config.row_length / config.micro_rows))
    return Rows(count, 2 ** (count - 1).bit_length(), config.micro_rows, config.row_length)


def mean_length(config: GrpoConfig) -> int:
    """Tokens of a prompt with its response, as this plan assumes: half of the most."""
    return (config.max_prompt_length + config.sampling.max_new_tokens) // 2


def training_mesh(config: Config, model: QwenConfig, devices: list[jax.Device], slices: int = 1) -> Mesh:
    """The mesh that the run's config makes on the devices; what it leaves open is chosen, so that rows and heads
    divide: a replica a slice, then the smallest tensor axis.

    Raises:
        InputError: nothing divides, with the numbers that would.
    """
    asked = config.mesh
    replica = slices if asked.replica == 1 else asked.replica
    open_axes = asked.fsdp == -1 and asked.tensor == 1
    sizes = range(1, math.gcd(model.num_heads, model.num_kv_heads) + 1) if open_axes else [asked.tensor]
    heads = [t for t in sizes if model.num_heads % t == 0 and model.num_kv_heads % t == 0]
    if not heads:
        raise InputError(
            f"mesh.tensor={asked.tensor} does not divide {model.num_heads} heads and {model.num_kv_heads} key-value "
            f"heads; take a divisor of {math.gcd(model.num_heads, model.num_kv_heads)}"
        )
    fitting = [t for t in heads if len(devices) % (replica * t) == 0]
    meshes = [make_mesh(MeshConfig(replica=replica, fsdp=asked.fsdp, tensor=t), devices) for t in fitting]
    if not meshes:  # make_mesh says what would
        return make_mesh(dataclasses.replace(asked, replica=replica), devices)
    shared = [mesh for mesh in meshes if config.micro_rows % rows_divisor(mesh) == 0]
    if not shared:
        least = rows_divisor(meshes[-1])
        raise InputError(
            f"micro_rows={config.micro_rows} cannot be shared by {len(devices)} devices: with mesh.tensor="
            f"{', '.join(map(str, fitting))} they hold rows in multiples of "
            f"{', '.join(str(rows_divisor(m)) for m in meshes)}; set micro_rows to a multiple of {least} with "
            f"mesh.tensor={fitting[-1]}, or take a smaller slice"
        )
    return shared[0]


def training_programs(config: Config, model: QwenConfig, mesh: Mesh) -> Iterator[tuple[str, Compiled, Cost]]:
    """Compile the update, and in GRPO the log-probabilities before it."""
    rows, devices = rows_of(config), list(mesh.devices.flat)
    forward, graphdef = forward_options(config, mesh), split(Qwen(model))[0]
    optimizer = make_optimizer(config.optimizer, UPDATES)
    state = abstract_state(weights(model, mesh, jnp.float32), optimizer, config.optimizer.memory)
    batch = micro_batches(config, mesh, rows)
    compile_here = functools.partial(compile_program, devices=devices)
    if isinstance(config, SftConfig):
        loss = functools.partial(sft_micro_loss, graphdef, **forward)
    else:
        forward |= {"temperature": config.sampling.temperature or 1.0}
        loss = functools.partial(grpo_micro_loss, graphdef, config, policy_loss, **forward)
    with jax.set_mesh(mesh):
        update = compile_update(state, loss=loss, optimizer=optimizer, clip=config.optimizer.clip)
        # Beside the state lie the reference and what the other updates of the step will read; the sampler's weights
        # and its cache are gone by then.
        held = reference_bytes(config, model, mesh) + (updates_per_step(config) - 1) * bytes_here(batch)
        compiled = compile_here(update, state, batch, rows.count, resident=held, dynamic_trips=rows.count)
        name = "sft_update" if isinstance(config, SftConfig) else "grpo_update"
        yield name, compiled, update_cost(config, model, mesh, rows)
        if isinstance(config, SftConfig):
            return
        logprobs = jax.jit(functools.partial(batch_logprobs, graphdef, **forward))
        inputs = {k: batch[k] for k in ("tokens", "positions", "segment_ids")}
        cost = forward_cost(config, model, mesh, rows)
        others = updates_per_step(config) * bytes_here(batch) - bytes_here(inputs)
        if config.loss.kl_coef:
            reference = weights(model, mesh, DTYPES[config.dtype])
            held = bytes_here(state) + others
            compiled = compile_here(logprobs, reference, inputs, rows.count, resident=held, dynamic_trips=rows.count)
            yield "reference_logprobs", compiled, cost
        if config.updates_per_step > 1:
            held = bytes_here(state.opt_state) + reference_bytes(config, model, mesh) + others
            compiled = compile_here(logprobs, state.params, inputs, rows.count, resident=held, dynamic_trips=rows.count)
            yield "old_logprobs", compiled, cost


def weights(model: QwenConfig, mesh: Mesh, dtype) -> Any:
    """The weights in the layout of training, described."""
    return abstract_params(Qwen(model), mesh, dtype)


def micro_batches(config: Config, mesh: Mesh, rows: Rows) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays [A, B, T] that an update reads, described."""
    floats = ["weights"]
    if isinstance(config, GrpoConfig):
        floats += ["advantages", "sampler_logp"]
        floats += ["old_logp"] * (config.updates_per_step > 1) + ["ref_logp"] * bool(config.loss.kl_coef)
    dtypes = dict.fromkeys(("tokens", "positions", "segment_ids"), jnp.int32) | dict.fromkeys(floats, jnp.float32)
    shape = (rows.room, rows.micro, rows.length)
    sharding = activation_sharding(mesh, "ABT", shape)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def updates_per_step(config: Config) -> int:
    """Updates for one batch of data; what they read is made before the first."""
    return 1 if isinstance(config, SftConfig) else config.updates_per_step


def reference_bytes(config: Config, model: QwenConfig, mesh: Mesh) -> int:
    """What the reference takes of a chip between its uses."""
    if isinstance(config, SftConfig) or not config.loss.kl_coef:
        return 0
    return bytes_here(in_memory(weights(model, mesh, DTYPES[config.dtype]), config.reference_memory))


def resident_bytes(config: Config, model: QwenConfig, mesh: Mesh) -> int:
    """What lies on a chip of training's mesh all the time: the policy, its moments and the reference."""
    optimizer = make_optimizer(config.optimizer, UPDATES)
    state = abstract_state(weights(model, mesh, jnp.float32), optimizer, config.optimizer.memory)
    return bytes_here(state) + reference_bytes(config, model, mesh)
