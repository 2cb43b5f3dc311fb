"""Schedules, the optimizer, and the update of both stages: accumulate gradients, clip, apply.

Optax does the arithmetic of AdamW. Micro-batches are summed in a loop whose count is a value and not a shape, so that a
GRPO step with fewer rows than the last one recompiles nothing. Next: `micro_batches.py`, what an update reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree
from pydantic import Field, PositiveFloat

from rmr1_jax.config import config_dataclass
from rmr1_jax.distributed.terminal import waiting
from rmr1_jax.train.losses import add_metrics

Memory = Literal["device", "host"]

MEMORY_KINDS = {"device": "device", "host": "pinned_host"}


@config_dataclass
class OptimConfig:
    """AdamW. The defaults are RM-R1's SFT stage (arXiv 2505.02387, its released scripts)."""

    lr: PositiveFloat = 5e-6
    """Learning rate after the warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine that falls to final_ratio x lr, or constant."""
    final_ratio: float = 0.1
    """Last learning rate of the cosine, as a share of lr."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all updates in which the learning rate rises linearly."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Weight decay of every weight, as in the reference trainer."""
    clip: PositiveFloat = 1.0
    """Largest global norm of a gradient; a large number turns clipping off."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the first moment. The second is float32: with b2 = 0.999 a step changes it by less than bfloat16 can
    hold."""
    memory: Memory = "device"
    """Memory of the moments between updates."""


def in_memory(tree: Any, memory: Memory) -> Any:
    """Move arrays to device or host memory; `ShapeDtypeStruct`s get a sharding in that memory."""

    def move(x):
        sharding = x.sharding.with_memory_kind(MEMORY_KINDS[memory])
        is_array = isinstance(x, jax.Array)
        return jax.device_put(x, sharding) if is_array else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(move, tree)


class TrainState(NamedTuple):
    """The state that an update reads and returns. params: float32 master weights. step: updates done, int32."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]


# Micro-batches of one shape, [A, B, T] each, and how many of the A to use.
Stack = tuple[dict[str, jax.Array | np.ndarray], ArrayLike]

# loss(params, micro_batch) -> (scalar, sums of metrics). Micro-batches' losses add up to the mini-batch's.
MicroLoss = Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]


def lr_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of update 0, 1, ...: linear warm-up, then cosine to final_ratio x lr, or constant."""
    warmup = round(config.warmup_ratio * total_steps)
    after = optax.constant_schedule(config.lr)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, max(1, total_steps - warmup), alpha=config.final_ratio)
    if not warmup:
        return after
    # The first update is not wasted on a rate of zero.
    return optax.join_schedules([lambda i: config.lr * (i + 1) / warmup, after], [warmup])


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW on gradients that are already clipped."""
    options = {k: getattr(config, k) for k in ("b1", "b2", "eps", "mu_dtype", "weight_decay")}
    return optax.adamw(lr_schedule(config, total_steps), **options)


def master_weights(params: Any, *, keep: bool) -> Any:
    """The float32 weights that a run starts from and its first update donates. keep: copy them, `params` are needed."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=keep), params)


def abstract_state(params: Any, optimizer: optax.GradientTransformation, memory: Memory = "device") -> TrainState:
    """The shapes, dtypes and shardings of `init_state`. params: arrays or `ShapeDtypeStruct`s with shardings."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def described(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    moments = optax.tree_map_params(
        optimizer,
        lambda moment, weight: in_memory(described(moment, weight.sharding), memory),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: described(x, whole),
    )
    params = jax.tree.map(lambda x: described(x, x.sharding), params)
    return TrainState(params, moments, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))


def init_state(params: Any, optimizer: optax.GradientTransformation, memory: Memory = "device") -> TrainState:
    """A fresh state, whose moments are made in place with the sharding of their weights."""
    # Zeros have no operand to take a sharding from: by default XLA would replicate all of them.
    layout = jax.tree.map(lambda x: x.sharding, abstract_state(params, optimizer, memory))
    shardings = (layout.opt_state, layout.step)
    with waiting("making the optimizer's state"):
        made = jax.jit(lambda w: (optimizer.init(w), jnp.int32(0)), out_shardings=shardings)(params)
    return TrainState(params, *made)


def compile_update(
    state: TrainState, *, loss: MicroLoss, optimizer: optax.GradientTransformation, clip: float
) -> Callable[[TrainState, Sequence[Stack]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `update` for one layout of the state, which it donates. Moments in host memory are on the devices only
    during the update. state: arrays or their description (`abstract_state`)."""
    layout = jax.tree.map(lambda x: x.sharding, state)
    on_device = jax.tree.map(lambda s: s.with_memory_kind(MEMORY_KINDS["device"]), layout.opt_state)

    def step(state: TrainState, stacks: Sequence[Stack]):
        if on_device != layout.opt_state:
            state = state._replace(opt_state=jax.device_put(state.opt_state, on_device))
        return update(state, stacks, loss=loss, optimizer=optimizer, clip=clip)

    return jax.jit(step, donate_argnums=0, out_shardings=(layout, None))


def global_norm(grads: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
    """The L2 norm of all gradients together. They are added in the order of the parameters' own names, whichever part
    of a block holds them, so that the norm has the bits that it had when a layer was one flat dict."""
    leaves = sorted(jax.tree.leaves_with_path(grads), key=lambda leaf: (str(leaf[0][:1]), str(leaf[0][-1:])))
    return optax.tree.norm([grad for _, grad in leaves])


def update(
    state: TrainState,
    stacks: Sequence[Stack],
    *,
    loss: MicroLoss,
    optimizer: optax.GradientTransformation,
    clip: float,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step over the micro-batches of `stacks`, one for each length of rows; a pure function to jit.

    Returns the next state, and the metrics: the sums that `loss` returns, `loss`, and `grad_norm` before clipping. If
    the loss or the norm is not finite, the weights and moments stay as they were, so that nothing broken can be saved;
    only the step is counted.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def one(stack, i):
        (value, sums), grads = value_and_grad(state.params, {k: v[i] for k, v in stack.items()})
        return grads, sums | {"loss": value}

    def add(stack, i, total):
        grads, sums = one(stack, i)
        return jax.tree.map(jnp.add, total[0], grads), add_metrics(total[1], sums)

    first, _ = stacks[0]
    if len(stacks) == jax.tree.leaves(first)[0].shape[0] == 1:  # no buffer of zeros, and no addition
        grads, metrics = one(first, 0)
    else:
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(partial(one, first), 0))
        for stack, count in stacks:
            total = jax.lax.fori_loop(0, count, partial(add, stack), total)
        grads, metrics = total
    with jax.named_scope("update"):
        norm = global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * scale, grads), state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (state.params, state.opt_state))
    return TrainState(*kept, state.step + 1), metrics | {"grad_norm": norm}
