"""The device side of the sampler: the compiled programs that read and write the cache.

`decode` draws up to a dispatch's worth of tokens for every slot in one `while_loop`, `prefill` runs a chunk of some
prompts, `grow` and `compact` change the cache's shape. All else about a slot is a few numbers (`slots.Slots`) that the
host sends along.

The mesh's data axes hold independent banks of slots: each device (or tensor-parallel group) has its own prompts, slots
and step counter, and its loop ends when its own slots are done. Inside a bank only `tensor` is left, and the compiler
splits heads over it. The host's arrays have a leading axis X, the banks; a cache has the rows of all banks, one bank
after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from rmr1_jax.distributed.mesh import constrain
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import rms_norm
from rmr1_jax.model.rope import rope_table
from rmr1_jax.sampler.cache import (
    Cache,
    Members,
    Part,
    attend_chunk,
    attend_slots,
    visible_steps,
    widen,
    write_chunk,
    write_step,
)
from rmr1_jax.sampler.draw import draw
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.slots import Bank, Slots
from rmr1_jax.sampler.weights import Weights, bind

STEPS = 16  # decode steps a dispatch, at most
MAX_STOP_IDS = 16


class Controls(NamedTuple):
    """The settings as arrays: arguments of the compiled loop, never closures, so that a change takes effect."""

    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    stop_ids: Any  # [MAX_STOP_IDS] int32, filled up with -1
    max_new: Any


class Drawn(NamedTuple):
    """The tokens that a dispatch drew, [X, B, STEPS] int32, -1 where none was; their log-probabilities, float32 (see
    `draw.Draw`); and the steps of each bank, [X] int32."""

    tokens: jax.Array
    logp: jax.Array
    sampled_logp: jax.Array
    steps: jax.Array


def stack_slots(banks: list[Bank], leave_at: list[int]) -> Slots:
    """The banks' slots as `decode` takes them, with the axis X."""
    slots = Slots(*(np.stack(parts) for parts in zip(*(bank.arrays for bank in banks), strict=True)))
    # Where the table has no slot, any will do: the result is not read.
    return slots._replace(table=np.maximum(slots.table, 0), leave_at=np.asarray(leave_at, np.int32))


def make_controls(sampling: SamplingConfig, stop_token_ids: Sequence[int]) -> Controls:
    """The settings as `decode` takes them.

    Raises:
        InputError: there are more than 16 stop ids.
    """
    if len(stop_token_ids) > MAX_STOP_IDS:
        raise InputError(f"{len(stop_token_ids)} stop token ids given; at most {MAX_STOP_IDS} are supported")
    stops = np.full(MAX_STOP_IDS, -1, np.int32)
    stops[: len(stop_token_ids)] = stop_token_ids
    return Controls(
        seed=np.uint32(sampling.seed % 2**32),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(sampling.top_k or 0),
        top_p=np.float32(sampling.top_p),
        min_p=np.float32(sampling.min_p),
        stop_ids=stops,
        max_new=np.int32(sampling.max_new_tokens),
    )


def _per_bank(
    function: Callable, cache: Cache, arrays: tuple[Any, ...] = (), *, replicated: tuple[Any, ...] = ()
) -> Any:
    """Runs `function(*replicated, cache, *arrays)` on each bank by itself, with the bank's rows of the cache and its
    arrays without the axis X. All results are split over the banks."""
    banks, whole = PartitionSpec(("replica", "fsdp")), PartitionSpec()

    def local(replicated, cache, arrays):
        return function(*replicated, cache, *jax.tree.map(lambda x: x[0], arrays))

    mapped = jax.shard_map(
        local, in_specs=(whole, banks, banks), out_specs=banks, axis_names={"replica", "fsdp"}, check_vma=False
    )
    return mapped(replicated, cache, arrays)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def decode(
    graphdef: nnx.GraphDef, weights: Weights, controls: Controls, cache: Cache, slots: Slots
) -> tuple[Cache, Drawn]:
    """Draws up to STEPS tokens for every live slot; a bank's loop ends early when at most `leave_at` are live."""

    def bank(weights, controls, cache: Cache, slots: Slots):
        B = slots.last.shape[0]
        key = jax.random.key(controls.seed)
        keys = jax.vmap(lambda h, n: jax.random.fold_in(jax.random.fold_in(key, h), n))(slots.prompt_hash, slots.sample)
        drawn = Drawn(jnp.full((B, STEPS), -1, jnp.int32), jnp.zeros((B, STEPS)), jnp.zeros((B, STEPS)), jnp.int32(0))

        def going(carry):
            _, slots, drawn = carry
            return (drawn.steps < STEPS) & (slots.live.sum() > slots.leave_at)

        def one(carry):
            cache, slots, drawn = carry
            cache, logits = _decode_step(graphdef, weights, cache, slots)
            # Replicate the logits first: truncating vocabulary-sharded rows compiles to a collective among all devices,
            # and the banks' loops do not end together.
            logits = constrain(logits, "RC")
            new = draw(
                logits,
                jax.vmap(jax.random.fold_in)(keys, slots.drawn),
                controls.temperature,
                controls.top_k,
                controls.top_p,
                controls.min_p,
            )
            token = jnp.where(slots.live, new.token, -1)
            stopped = (token[:, None] == controls.stop_ids).any(-1) & slots.live
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=drawn.steps, axis=1)
            drawn = Drawn(
                put(drawn.tokens, token[:, None]),
                put(drawn.logp, new.logp[:, None]),
                put(drawn.sampled_logp, new.sampled_logp[:, None]),
                drawn.steps + 1,
            )
            count = slots.drawn + slots.live
            slots = slots._replace(
                last=jnp.maximum(token, 0),
                drawn=count,
                live=slots.live & ~stopped & (count < controls.max_new),
                step=slots.step + 1,
            )
            return cache, slots, drawn

        cache, _, drawn = jax.lax.while_loop(going, one, (cache, slots, drawn))
        return cache, jax.tree.map(lambda x: x[None], drawn)

    return _per_bank(bank, cache, (slots,), replicated=(weights, controls))


def _decode_step(graphdef: nnx.GraphDef, weights: Weights, cache: Cache, slots: Slots) -> tuple[Cache, jax.Array]:
    """Feeds every slot's last token; returns the cache with this step's column, and logits [B, V]."""
    # The first token that a slot feeds is the last one of its prompt; prefill wrote everything before that.
    model, blocks = bind(graphdef, weights)
    positions = slots.length - 1 + slots.drawn
    rope = rope_table(model.config, positions[:, None])
    prompt_visible = jnp.arange(cache.prompt_room) < slots.prompt_length[:, None]
    own_visible = visible_steps(slots.step, slots.start, cache.width)
    members = Members(slots.table, slots.entry, slots.rank)
    own_k, own_v = list(cache.own_k), list(cache.own_v)
    x = model.embedded(slots.last[:, None], weights["final_norm"].dtype)
    for i, block in enumerate(blocks):

        def attend(q, k, v, transform, i=i):
            own_k[i], own_v[i] = write_step(own_k[i], own_v[i], k[:, 0], v[:, 0], slots.step)
            prompts = Part(cache.prompt_k[i], cache.prompt_v[i], prompt_visible)
            return attend_slots(q[:, 0], prompts, Part(own_k[i], own_v[i], own_visible), members, transform)[:, None]

        with jax.named_scope("layers"):
            x = block(x, rope, attend)
    x = rms_norm(x[:, 0], model.final_norm, model.config.rms_norm_eps)
    return cache._replace(own_k=own_k, own_v=own_v), model.logits(x)


def prefill(
    graphdef: nnx.GraphDef,
    weights: Weights,
    cache: Cache,
    tokens: ArrayLike,
    entry: ArrayLike,
    start: ArrayLike,
    active: ArrayLike,
) -> Cache:
    """Runs one chunk of each of P prompts a bank, and writes its keys and values into the prompts' cache.

    Args:
        tokens: [X, P, T] int32; positions beyond a prompt's end are written to columns that decode never reads.
        entry: [X, P] int32, the prompts' entries in the cache. start: [X, P] int32, the chunk's first position.
        active: [X, P] bool, False for rows that only fill the batch.
    """
    return _prompts_only(
        lambda prompts: prefill_prompts(graphdef, weights, prompts, tokens, entry, start, active), cache
    )


def share_prefix(cache: Cache, prefix: ArrayLike) -> Cache:
    """Copies the first `prefix` columns of each bank's first prompt to its other prompts."""
    return _prompts_only(lambda prompts: _share_prefix(prompts, prefix), cache)


def _prompts_only(program: Callable, cache: Cache) -> Cache:
    """Hands a program the prompts' part alone, so that its shapes and its compilation do not depend on the rings."""
    return program(cache._replace(own_k=[], own_v=[]))._replace(own_k=cache.own_k, own_v=cache.own_v)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def prefill_prompts(graphdef: nnx.GraphDef, weights: Weights, cache: Cache, tokens, entry, start, active) -> Cache:
    def bank(weights, cache: Cache, tokens, entry, start, active):
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        model, blocks = bind(graphdef, weights)
        rope = rope_table(model.config, positions)
        prompt_k, prompt_v = list(cache.prompt_k), list(cache.prompt_v)
        x = model.embedded(tokens, weights["final_norm"].dtype)
        for i, block in enumerate(blocks):

            def attend(q, k, v, transform, i=i):
                prompt_k[i], prompt_v[i] = write_chunk(prompt_k[i], prompt_v[i], k, v, entry, start, active)
                return attend_chunk(q, prompt_k[i][entry], prompt_v[i][entry], positions, transform)

            with jax.named_scope("layers"):
                x = block(x, rope, attend)
        return cache._replace(prompt_k=prompt_k, prompt_v=prompt_v)

    return _per_bank(bank, cache, (tokens, entry, start, active), replicated=(weights,))


@functools.partial(jax.jit, donate_argnames=("cache",))
def _share_prefix(cache: Cache, prefix: jax.Array) -> Cache:
    def bank(prefix, cache: Cache):
        shared = jnp.arange(cache.prompt_room) < prefix
        prompt_k = [jnp.where(shared, x[:1], x) for x in cache.prompt_k]
        prompt_v = [jnp.where(shared[:, None], x[:1], x) for x in cache.prompt_v]
        return cache._replace(prompt_k=prompt_k, prompt_v=prompt_v)

    return _per_bank(bank, cache, replicated=(prefix,))


def grow(cache: Cache, *, width: int) -> Cache:
    """Widens the rings to `width` columns, a multiple of their present width. Consumes the given cache."""
    return _by_layer(functools.partial(_grow, width=width), cache)


def compact(cache: Cache, slots: ArrayLike, entries: ArrayLike) -> Cache:
    """Keeps the slots [X, slots] and prompts [X, entries] of the given numbers. Consumes the given cache."""
    return _by_layer(_compact, cache, slots, entries)


def _by_layer(program: Callable, cache: Cache, *arrays: ArrayLike) -> Cache:
    """Reshapes one layer after the other and drops each before the next, so that the old cache and the new one are
    never both whole in memory."""
    layers = []
    for i in range(len(cache.own_k)):
        layer = Cache(*([part[i]] for part in cache))
        for part in cache:
            part[i] = None
        layers.append(program(layer, *arrays))
    return Cache(*([layer[part][0] for layer in layers] for part in range(len(cache))))


@functools.partial(jax.jit, static_argnames=("width",))
def _grow(layer: Cache, *, width: int) -> Cache:
    return _per_bank(functools.partial(widen, width=width), layer)


@jax.jit
def _compact(layer: Cache, slots: jax.Array, entries: jax.Array) -> Cache:
    def bank(layer, slots, entries):
        rows = (entries, entries, slots, slots)
        dims = ("EKHS", "EKSH", "RKHC", "RKCH")
        return Cache(*([constrain(part[0][r], d)] for part, r, d in zip(layer, rows, dims, strict=True)))

    return _per_bank(bank, layer, (slots, entries))


PROGRAMS = (decode, prefill_prompts, _share_prefix, _grow, _compact)


def compiled() -> int:
    """The number of programs in the caches of the sampler's jitted functions."""
    return sum(program._cache_size() for program in PROGRAMS)


@functools.partial(jax.jit, static_argnames=("config", "banks", "entries", "room", "slots", "width", "dtype"))
def empty_cache(config: QwenConfig, *, banks: int, entries: int, room: int, slots: int, width: int, dtype) -> Cache:
    """Makes zeroed buffers: for each bank, `entries` prompts of `room` tokens and `slots` rings of `width` columns."""
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim

    def zeros(rows: int, *columns: int) -> list[jax.Array]:
        return [constrain(jnp.zeros((banks * rows, K, *columns), dtype), "BKCC") for _ in range(L)]

    return Cache(zeros(entries, H, room), zeros(entries, room, H), zeros(slots, H, width), zeros(slots, width, H))
