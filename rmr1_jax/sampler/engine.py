"""The sampler: jitted prefill, a jitted decode loop of many steps a dispatch, and the host code around them.

A group's R samples share their prompt's cache. All rows of a batch advance together and the loop leaves the device only
when every row has stopped or the cache is full; then the cache grows to the next bucket, so that early steps attend to
a short cache. A sample is a function of (seed, prompt, sample, step): its keys are folded from the prompt's own tokens,
so neither its place in the batch nor its neighbours matter. Read `logits.py` for the draw, `model/cache.py` for the
cache; `policy.py` puts a tokenizer on top.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.errors import InputError
from rmr1_jax.mesh import rows_divisor
from rmr1_jax.model import qwen
from rmr1_jax.model.attention import attend, attend_two
from rmr1_jax.model.cache import Cache, empty_own, grow, heads_first, write_step
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.sampler.logits import draw

STOP_ID_ROOM = 16
FIRST_CAPACITY = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to sample. Nothing here is compiled in except `n`, through the shape of a batch.

    `max_rows` bounds the samples that are in flight at once (memory); it changes no token.
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    max_rows: int = 256

    def __post_init__(self):
        for name, ok, wanted in (
            ("n", self.n >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k is None or self.top_k >= 1, "None (off) or at least 1"),
            ("max_rows", self.max_rows >= 1, "at least 1"),
        ):
            if not ok:
                raise InputError(f"sampling.{name}={getattr(self, name)!r} must be {wanted}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion in tokens, the stop token included.

    logprobs: under the model itself; sampled_logprobs: under the distribution drawn from (tempered, truncated).
    Both float32, one a token. finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    logprobs: np.ndarray
    sampled_logprobs: np.ndarray
    finish_reason: str


@dataclasses.dataclass
class SampleStats:
    """What a call did. Counts are of real tokens; `row_steps` also counts rows that had already stopped."""

    prefill_tokens: int = 0
    new_tokens: int = 0
    row_steps: int = 0
    dispatches: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """The share of decoded positions that were real tokens."""
        return self.new_tokens / max(1, self.row_steps)


class Controls(NamedTuple):
    """The settings as arrays: arguments of the compiled loop, never closures."""

    seed: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    stop_ids: jax.Array  # [STOP_ID_ROOM] int32, filled up with -1
    max_new: jax.Array


class State(NamedTuple):
    """What the decode loop carries. P prompts, R samples each, C columns of room."""

    cache: Cache
    lengths: jax.Array  # [P] prompt lengths
    keys: jax.Array  # [P, R] one key a sample
    last: jax.Array  # [P, R] the token to feed next
    done: jax.Array  # [P, R] bool
    step: jax.Array  # scalar: tokens drawn so far
    tokens: jax.Array  # [P, R, C] int32, -1 where nothing was drawn
    logp: jax.Array  # [P, R, C]
    sampled_logp: jax.Array  # [P, R, C]


@functools.partial(jax.jit, static_argnames=("dtype",))
def sampling_weights(params: qwen.Params, *, dtype=jnp.float32) -> dict[str, Any]:
    """The weights in decode's own layout, made once a policy update: a list of layers instead of a stack (a scan over a
    stack would carry the cache through itself and copy it), in the dtype that decode computes in."""
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    depth = len(params["layers"]["q"])
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(depth)]
    return params | {"layers": layers}


def generate(
    config: QwenConfig,
    weights: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_token_ids: Sequence[int],
    *,
    mesh: Mesh,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[list[list[Sample]], SampleStats]:
    """Sample `n` completions of every prompt.

    Args:
        weights: from `sampling_weights`. prompts: token ids, not empty. stop_token_ids: at most 16.
        on_batch: called with the number of prompts that were finished since the last call (a progress bar).

    Returns:
        For each prompt, in order, its n samples; and what it took.
    """
    controls = _controls(sampling, stop_token_ids)
    _check_prompts(config, prompts, sampling)
    # Longest first: a batch's prompts are padded to its longest, and memory trouble shows at once, not at the end.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    per_batch = max(1, sampling.max_rows // sampling.n)
    shards = rows_divisor(mesh)
    most_rows = -(-per_batch // shards) * shards
    results: list[list[Sample]] = [[] for _ in prompts]
    stats = SampleStats()
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        for first in range(0, len(order), per_batch):
            chosen = order[first : first + per_batch]
            rows = min(_bucket(len(chosen), shards), most_rows)
            samples = _run_batch(config, weights, [prompts[i] for i in chosen], rows, sampling, controls, stats)
            for i, group in zip(chosen, samples, strict=True):
                results[i] = group
            if on_batch:
                on_batch(len(chosen))
    stats.seconds = time.perf_counter() - start
    return results, stats


def _check_prompts(config: QwenConfig, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> None:
    window = config.sliding_window or math.inf
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {i} has no tokens; a prompt needs at least one")
        lowest, highest = np.min(prompt), np.max(prompt)
        if lowest < 0 or highest >= config.vocab_size:
            raise InputError(f"prompt {i} has ids from {lowest} to {highest}; the model has {config.vocab_size} tokens")
        if len(prompt) + sampling.max_new_tokens > window:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={sampling.max_new_tokens} it is longer than "
                f"the model's sliding window ({window}), which is not implemented; ask for fewer tokens"
            )


def _run_batch(config, weights, prompts, rows, sampling, controls, stats) -> list[list[Sample]]:
    """One batch from prefill to the last stop. `rows` >= len(prompts) is its padded number of prompts."""
    length = _bucket(max(map(len, prompts)), 16, fine=True)
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    hashes = np.zeros(rows, np.uint32)
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt, np.int32)
        tokens[i, : len(ids)], lengths[i], hashes[i] = ids, len(ids), zlib.crc32(ids.tobytes())
    capacity = min(FIRST_CAPACITY, _bucket(sampling.max_new_tokens, 16, fine=True))
    live = np.arange(rows) < len(prompts)
    state = prefill(config, weights, tokens, lengths, hashes, live, controls, samples=sampling.n, capacity=capacity)
    while True:
        state = decode(config, weights, state, controls)
        stats.dispatches += 1
        if bool(state.done.all()):
            break
        state = _grow(state, capacity=2 * state.cache.capacity)
    stats.cache_bytes = max(stats.cache_bytes, sum(x.nbytes for x in jax.tree.leaves(state.cache)))
    stats.prefill_tokens += sum(map(len, prompts))
    stats.row_steps += len(prompts) * sampling.n * int(state.step)
    host = jax.device_get((state.tokens, state.logp, state.sampled_logp))
    stops = set(np.asarray(controls.stop_ids).tolist())
    groups = [[_sample(*(x[p, r] for x in host), stops) for r in range(sampling.n)] for p in range(len(prompts))]
    stats.new_tokens += sum(len(s.token_ids) for group in groups for s in group)
    return groups


def _sample(tokens: np.ndarray, logp: np.ndarray, sampled_logp: np.ndarray, stops: set[int]) -> Sample:
    count = int((tokens >= 0).sum())
    ids = tokens[:count].tolist()
    return Sample(ids, logp[:count], sampled_logp[:count], "stop" if ids[-1] in stops else "length")


@functools.partial(jax.jit, static_argnames=("config", "samples", "capacity"))
def prefill(config, weights, tokens, lengths, hashes, live, controls, *, samples: int, capacity: int) -> State:
    """Run the prompts once and draw every sample's first token.

    Args:
        tokens: [P, S] int32, filled up on the right. lengths: [P]. hashes: [P] uint32, the prompts' identities.
        live: [P] bool, False for rows that only fill the batch. samples: R. capacity: C.
    """
    P, S = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (P, S))
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    rope = qwen.rope_table(config, positions)
    x = qwen.embed(weights, tokens, weights["final_norm"].dtype)
    keys, values = [], []
    for w in weights["layers"]:
        x, (k, v) = qwen.block(config, w, x, rope, lambda q, k, v: (attend(q, k, v, positions, segment_ids), (k, v)))
        keys.append(heads_first(k))
        values.append(heads_first(v))
    x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    first = qwen.logits(config, weights, qwen.rms_norm(x, weights["final_norm"], config.rms_norm_eps))
    cache = Cache(keys, values, empty_own(keys, samples, capacity), empty_own(values, samples, capacity))
    room = (P, samples, capacity)
    state = State(
        cache=cache,
        lengths=lengths,
        keys=_sample_keys(controls.seed, hashes, samples),
        last=jnp.zeros((P, samples), jnp.int32),
        done=jnp.broadcast_to(~live[:, None], (P, samples)),
        step=jnp.int32(0),
        tokens=jnp.full(room, -1, jnp.int32),
        logp=jnp.zeros(room),
        sampled_logp=jnp.zeros(room),
    )
    return _record(state, jnp.broadcast_to(first, (P, samples, first.shape[-1])), controls)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def decode(config, weights, state: State, controls: Controls) -> State:
    """Draw tokens until every sample has stopped or the cache is full, in one dispatch."""

    def going(state: State):
        # The token drawn at step s is fed at step s + 1 and takes cache column s.
        return ~state.done.all() & (state.step < state.cache.capacity)

    def one(state: State) -> State:
        return _record(*_decode_step(config, weights, state), controls)

    return jax.lax.while_loop(going, one, state)


def _decode_step(config, weights, state: State) -> tuple[State, jax.Array]:
    """Feed the last tokens, [P, R]; returns the state with the cache extended, and logits [P, R, V]."""
    cache, column = state.cache, state.step - 1
    S, C = cache.shared_k[0].shape[2], cache.capacity
    positions = jnp.broadcast_to((state.lengths + column)[:, None], state.last.shape)
    rope = qwen.rope_table(config, positions)
    shared_visible = jnp.arange(S) < state.lengths[:, None]
    own_visible = jnp.arange(C) <= column
    own_k, own_v = list(cache.own_k), list(cache.own_v)
    x = qwen.embed(weights, state.last, weights["final_norm"].dtype)
    for i, w in enumerate(weights["layers"]):

        def attention(q, k, v, i=i):
            own_k[i], own_v[i] = write_step(own_k[i], k, column), write_step(own_v[i], v, column)
            shared = (cache.shared_k[i], cache.shared_v[i], shared_visible)
            return attend_two(q, *shared, own_k[i], own_v[i], own_visible), None

        x, _ = qwen.block(config, w, x, rope, attention)
    x = qwen.rms_norm(x, weights["final_norm"], config.rms_norm_eps)
    return state._replace(cache=cache._replace(own_k=own_k, own_v=own_v)), qwen.logits(config, weights, x)


def _record(state: State, logits: jax.Array, controls: Controls) -> State:
    """Draw from logits [P, R, V] and write the tokens at column `step`."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys.reshape(-1), state.step)
    drawn = draw(logits, keys.reshape(state.keys.shape), controls.temperature, controls.top_k, controls.top_p)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=2)
    token = jnp.where(state.done, -1, drawn.token)
    stopped = (token[..., None] == controls.stop_ids).any(-1) & (token >= 0)
    return state._replace(
        tokens=put(state.tokens, token[..., None]),
        logp=put(state.logp, drawn.logp[..., None]),
        sampled_logp=put(state.sampled_logp, drawn.sampled_logp[..., None]),
        last=jnp.maximum(token, 0),
        done=state.done | stopped | (state.step + 1 >= controls.max_new),
        step=state.step + 1,
    )


@functools.partial(jax.jit, static_argnames=("capacity",))
def _grow(state: State, *, capacity: int) -> State:
    more = ((0, 0), (0, 0), (0, capacity - state.cache.capacity))
    return state._replace(
        cache=grow(state.cache, capacity),
        tokens=jnp.pad(state.tokens, more, constant_values=-1),
        logp=jnp.pad(state.logp, more),
        sampled_logp=jnp.pad(state.sampled_logp, more),
    )


def _sample_keys(seed: jax.Array, hashes: jax.Array, samples: int) -> jax.Array:
    """[P, R] keys, folded from the seed, the prompt's own tokens and the sample's number."""
    fold = jax.random.fold_in
    prompt_keys = jax.vmap(fold, in_axes=(None, 0))(jax.random.key(seed), hashes)
    return jax.vmap(jax.vmap(fold, in_axes=(None, 0)), in_axes=(0, None))(prompt_keys, jnp.arange(samples))


def _controls(sampling: SamplingConfig, stop_token_ids: Sequence[int]) -> Controls:
    if len(stop_token_ids) > STOP_ID_ROOM:
        raise InputError(f"{len(stop_token_ids)} stop token ids given; at most {STOP_ID_ROOM} are supported")
    stops = np.full(STOP_ID_ROOM, -1, np.int32)
    stops[: len(stop_token_ids)] = stop_token_ids
    return Controls(
        seed=np.uint32(sampling.seed % 2**32),
        temperature=np.float32(sampling.temperature),
        top_k=np.int32(sampling.top_k or 0),
        top_p=np.float32(sampling.top_p),
        stop_ids=stops,
        max_new=np.int32(sampling.max_new_tokens),
    )


def _bucket(n: int, least: int, *, fine: bool = False) -> int:
    """The smallest size that holds n: `least` doubled as often as needed, or with `fine` also its midpoints (so that at
    most a third is padding). Few sizes, few compilations."""
    size = least * 2 ** max(0, math.ceil(math.log2(n / least)))
    return size * 3 // 4 if fine and size % 4 == 0 and n <= size * 3 // 4 else size
