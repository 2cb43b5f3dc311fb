"""Compiles the programs of training as a run would: the update, and in GRPO the log-probabilities before it.

Next: `sampler.py`, the programs of the sampler; `costs.py`, the FLOPs and bytes of each program by formula.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rmr1_jax.distributed.chips import bytes_per_chip
from rmr1_jax.distributed.mesh import activation_sharding, make_mesh, rows_divisor
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen, abstract_params, split
from rmr1_jax.plan.compile import Compiled, compile_program
from rmr1_jax.policy import DTYPES
from rmr1_jax.train.config import GrpoConfig, SftConfig
from rmr1_jax.train.grpo import batch_logprobs, grpo_micro_loss
from rmr1_jax.train.logprobs import forward_options, places_size
from rmr1_jax.train.losses import policy_loss
from rmr1_jax.train.optim import TrainState, abstract_state, compile_update, in_memory, make_optimizer
from rmr1_jax.train.sft import sft_micro_loss

Config = SftConfig | GrpoConfig


class Lengths(NamedTuple):
    """The mean tokens of a prompt and of its response."""

    prompt: int
    response: int


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The rows of one update: `micro_batches` times `micro_rows` rows of `row_length` tokens. The arrays have room for
    `capacity` micro-batches. The head reads `read` positions of a row (None: all). segments: how many segments there
    are of how many tokens, and how many tokens before its first one such a segment sees."""

    micro_batches: int
    capacity: int
    micro_rows: int
    row_length: int
    read: int | None = None
    segments: tuple[tuple[int, int, int], ...] = ()

    @property
    def rows(self) -> int:
        return self.micro_batches * self.micro_rows

    @property
    def tokens(self) -> int:
        return self.rows * self.row_length

    @property
    def head_positions(self) -> int:
        """The positions of a row that the head reads."""
        return self.read or self.row_length

    @property
    def sequences(self) -> tuple[list[int], list[int]]:
        """The tokens of each segment, and those before it; by default each row is one."""
        segments = self.segments or ((self.rows, self.row_length, 0),)
        return ([t for n, t, _ in segments for _ in range(n)], [b for n, _, b in segments for _ in range(n)])


def batch_shape(config: Config, lengths: Lengths | None = None) -> BatchShape:
    """Return the rows of one update. In GRPO they depend on the lengths of the texts, which are assumed to be `lengths`
    (None: half of the largest ones) and packed without gaps."""
    if isinstance(config, SftConfig):
        count = config.rows_per_step // config.micro_rows
        if lengths is None:
            return BatchShape(count, count, config.micro_rows, config.row_length)
        read = read_positions(config.row_length, lengths.response / sum(lengths))
        segments = ((config.rows_per_step * config.row_length // sum(lengths), sum(lengths), 0),)
        return BatchShape(count, count, config.micro_rows, config.row_length, read, segments)
    (prompt, response), groups, n = lengths or mean_lengths(config), config.mini_batch_prompts, config.sampling.n
    if config.share_prompts:  # a group that is longer than a row is split, and its prompt repeated
        parts = math.ceil(n * (1 + response) / (config.row_length - prompt + 1))
        segments = ((groups * parts, prompt - 1, 0), (groups * n, 1 + response, prompt - 1))
    else:
        segments = ((groups * n, prompt + response, 0),)
    tokens = sum(number * length for number, length, _ in segments)
    count = max(1, math.ceil(tokens / config.row_length / config.micro_rows))
    capacity = 2 ** (count - 1).bit_length()  # as in `micro_batches.mini_batch`
    read = read_positions(config.row_length, groups * n * response / tokens)
    return BatchShape(count, capacity, config.micro_rows, config.row_length, read, segments)


def mean_lengths(config: GrpoConfig) -> Lengths:
    """Return the assumed tokens of a prompt and of its response: half of the largest numbers."""
    return Lengths(config.max_prompt_length // 2, config.sampling.max_new_tokens // 2)


def read_positions(row_length: int, share: float) -> int | None:
    """Return how many positions of a row the head reads, where the tokens are trained in this share."""
    return places_size(row_length, math.ceil(share * row_length))


def training_mesh(config: Config, model: QwenConfig, devices: list[jax.Device], slices: int = 1) -> Mesh:
    """Make the mesh of the config on the devices. Where the config leaves axes at their defaults, there is one replica
    per slice and the smallest tensor axis with which the other axes divide the rows of a micro-batch.

    Raises:
        InputError: no mesh divides the heads and the rows; names numbers that would.
    """
    asked, common = config.mesh, math.gcd(model.num_heads, model.num_kv_heads)
    if common % asked.tensor:
        raise InputError(
            f"mesh.tensor={asked.tensor} does not divide {model.num_heads} heads and {model.num_kv_heads} key-value "
            f"heads; take a divisor of {common}"
        )
    replica, tensors = slices if asked.replica == 1 else asked.replica, [asked.tensor]
    if asked.fsdp == -1 and asked.tensor == 1:
        tensors += [t for t in range(2, common + 1) if common % t == 0 and len(devices) % (replica * t) == 0]
    meshes = [make_mesh(dataclasses.replace(asked, replica=replica, tensor=t), devices) for t in tensors]
    for mesh in meshes:
        if config.micro_rows % rows_divisor(mesh) == 0:
            return mesh
    raise InputError(
        f"micro_rows={config.micro_rows} cannot be split over {len(devices)} devices: with mesh.tensor="
        f"{', '.join(map(str, tensors))} they take rows in multiples of "
        f"{', '.join(str(rows_divisor(m)) for m in meshes)}; set micro_rows to a multiple of "
        f"{rows_divisor(meshes[-1])} with mesh.tensor={tensors[-1]}, or take a smaller slice"
    )


def training_programs(
    config: Config, model: QwenConfig, mesh: Mesh, shape: BatchShape
) -> Iterator[tuple[str, Compiled]]:
    """Compile the update, and in GRPO the log-probabilities before it; yield each program's name and memory."""
    count = shape.micro_batches
    forward, graphdef = forward_options(config, model, mesh), split(Qwen(model))[0]
    optimizer, state = abstract_training(config, model, mesh)
    batch = micro_batches(config, mesh, shape)
    compile_here = functools.partial(compile_program, devices=list(mesh.devices.flat), dynamic_trips=count)
    is_sft = isinstance(config, SftConfig)
    if is_sft:
        loss = functools.partial(sft_micro_loss, graphdef, **forward)
    else:
        forward |= {"temperature": config.sampling.temperature or 1.0}
        loss = functools.partial(grpo_micro_loss, graphdef, config, policy_loss, **forward)
    with jax.set_mesh(mesh):
        update = compile_update(state, loss=loss, optimizer=optimizer, clip=config.optimizer.clip)
        # The data of a step's other updates and the reference stay on the chip; the sampler's weights and cache do not.
        updates = 1 if is_sft else config.updates_per_step
        reference = reference_bytes(config, model, mesh)
        held = reference + (updates - 1) * bytes_per_chip(batch)
        yield "sft_update" if is_sft else "grpo_update", compile_here(update, state, [(batch, count)], resident=held)
        if is_sft:
            return
        logprobs = jax.jit(functools.partial(batch_logprobs, graphdef, **forward))
        inputs = {k: v for k, v in batch.items() if v.dtype == jnp.int32}
        others = updates * bytes_per_chip(batch) - bytes_per_chip(inputs)
        if config.loss.kl_coef:
            weights = abstract_params(Qwen(model), mesh, DTYPES[config.dtype])
            held = bytes_per_chip(state) + others
            yield "reference_logprobs", compile_here(logprobs, weights, inputs, count, resident=held)
        if updates > 1 and config.old_logp == "trainer":
            held = bytes_per_chip(state.opt_state) + reference + others
            yield "old_logprobs", compile_here(logprobs, state.params, inputs, count, resident=held)


def abstract_training(config: Config, model: QwenConfig, mesh: Mesh) -> tuple[optax.GradientTransformation, TrainState]:
    """Return the optimizer, and the shapes and shardings of its state with float32 master weights."""
    optimizer = make_optimizer(config.optimizer, 1000)  # the number of updates, which changes no shape
    weights = abstract_params(Qwen(model), mesh, jnp.float32)
    return optimizer, abstract_state(weights, optimizer, config.optimizer.memory)


def micro_batches(config: Config, mesh: Mesh, shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the arrays [A, B, T] that an update reads, and of `trained_at`."""
    ints, floats = ["tokens", "positions", "segment_ids"], ["weights"]
    if isinstance(config, GrpoConfig):
        ints += ["parents"] * config.share_prompts
        floats += ["advantages", "sampler_logp"]
        has_old = config.updates_per_step > 1 or config.old_logp == "sampler"
        floats += ["old_logp"] * has_old + ["ref_logp"] * bool(config.loss.kl_coef)
    dtypes: dict[str, Any] = dict.fromkeys(ints, jnp.int32) | dict.fromkeys(floats, jnp.float32)
    lengths = dict.fromkeys(dtypes, shape.row_length)
    if shape.read:
        dtypes["trained_at"], lengths["trained_at"] = jnp.int32, shape.read
    sizes = {name: (shape.capacity, shape.micro_rows, length) for name, length in lengths.items()}
    sharding = {name: activation_sharding(mesh, "ABT", size) for name, size in sizes.items()}
    return {k: jax.ShapeDtypeStruct(sizes[k], dtype, sharding=sharding[k]) for k, dtype in dtypes.items()}


def reference_bytes(config: Config, model: QwenConfig, mesh: Mesh) -> int:
    """Return the bytes per chip of the reference policy while it is not in use."""
    if isinstance(config, SftConfig) or not config.loss.kl_coef:
        return 0
    return bytes_per_chip(in_memory(abstract_params(Qwen(model), mesh, DTYPES[config.dtype]), config.reference_memory))


def resident_bytes(config: Config, model: QwenConfig, mesh: Mesh) -> int:
    """Return the bytes per chip that stay there throughout training: the policy, its moments and the reference."""
    _, state = abstract_training(config, model, mesh)
    return bytes_per_chip(state) + reference_bytes(config, model, mesh)
