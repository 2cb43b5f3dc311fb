"""The key-value cache as a pytree, how decode and prefill write it, and how they attend over it.

A cache has two parts: the keys and values of prompts, each read by all its samples, and each slot's own tokens. One
buffer a layer, not one stacked array: a stacked cache that passes through a scan is copied at every step, a donated
buffer a layer is updated in place. Heads come before columns, and a key's H numbers before the columns too
([..., H, W], values [..., W, H]), so that both products of a decode step run along contiguous memory: on CPU three
times as fast as with keys in the layout of values.

A slot's own part is a ring in time, not in positions: at step t every slot writes column t mod W, whatever its age. One
slice is written for all slots (no scatter), and a slot needs no clearing for its next sample: what is older than the
sample is invisible to it. A sample that lives at most W steps never loses a column. The rotary positions are in the
keys already, so the order of columns does not matter.

`programs.py` calls this. Letters beside those of the model: E cached prompts, S their columns, R samples of a prompt,
B slots, W columns of a ring, P prompts of a prefill.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from rmr1_jax.distributed.mesh import constrain
from rmr1_jax.model.attention import MASKED, Transform


class Cache(NamedTuple):
    """Keys and values, lists over L layers.

    prompt_k: [E, K, H, S], prompt_v: [E, K, S, H] each. own_k: [B, K, H, W], own_v: [B, K, W, H] each; column c holds
    the latest step t with t mod W = c.
    """

    prompt_k: list
    prompt_v: list
    own_k: list
    own_v: list

    @property
    def width(self) -> int:
        """W, the steps that a ring holds."""
        return self.own_k[0].shape[3]

    @property
    def prompt_room(self) -> int:
        """S, the tokens of a prompt that fit."""
        return self.prompt_k[0].shape[3]


class Members(NamedTuple):
    """The slots that hold samples of each prompt.

    table: a prompt's slots, any number where it has fewer than R. entry, rank: a slot's place in the table.
    """

    table: Int[Array, "E R"]
    entry: Int[Array, " B"]
    rank: Int[Array, " B"]


class Part(NamedTuple):
    """A part of one layer's cache, and which columns its rows may see. X is E for prompts, B for slots."""

    k: Float[Array, "X K H C"]
    v: Float[Array, "X K C H"]
    visible: Bool[Array, "X C"]


class _Partial(NamedTuple):
    """Attention over some of the keys, to be merged with the rest: the highest score, the sum of the exponentials
    relative to it, and the values weighted by them; Q queries a head. All float32."""

    highest: Float[Array, "X K Q 1"]
    total: Float[Array, "X K Q 1"]
    values: Float[Array, "X K Q H"]


def attend_slots(
    q: Float[Array, "B N H"], prompts: Part, own: Part, members: Members, transform: Transform | None = None
) -> Float[Array, "B N H"]:
    """One decode step for B slots, each over its prompt and its own tokens. A prompt's keys are read once for all of
    its slots: their queries are gathered at the prompt, not the prompt copied to them.

    Every slot must see at least one column of its own. The result has q's dtype; scores and softmax are float32.
    """
    B, N, H = q.shape
    E, K = prompts.k.shape[:2]
    R, G = members.table.shape[1], N // K
    q = (q * H**-0.5).reshape(B, K, G, H)
    at_prompts = q[members.table].transpose(0, 2, 1, 3, 4).reshape(E, K, R * G, H)
    parts = _attend_part(at_prompts, prompts, transform)
    over_prompt = _Partial(*(x.reshape(E, K, R, G, -1)[members.entry, :, members.rank] for x in parts))
    return _merge(over_prompt, _attend_part(q, own, transform)).reshape(B, N, H).astype(q.dtype)


def attend_chunk(
    q: Float[Array, "P T N H"],
    k: Float[Array, "P K H S"],
    v: Float[Array, "P K S H"],
    positions: Int[Array, "P T"],
    transform: Transform | None = None,
) -> Float[Array, "P T N H"]:
    """A chunk of each of P prompts against the prompt's keys so far, its own among them.

    Column s of k and v holds position s; `positions` are the queries'. Dtypes are those of `attend_slots`.
    """
    P, T, N, H = q.shape
    K, _, S = k.shape[1:]
    visible = jnp.arange(S) <= positions[:, :, None]
    # A head's G queries side by side, so that each product is one plain matrix product per key-value head.
    q = (q * H**-0.5).reshape(P, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(P, K, -1, H)
    scores = jnp.einsum("PKQH,PKSH->PKQS", q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    scores = transform(scores) if transform else scores
    scores = jnp.where(visible[:, None, None], scores.reshape(P, K, N // K, T, S), MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(P, K, -1, S)
    out = jnp.einsum("PKQS,PKSH->PKQH", probs, v).reshape(P, K, N // K, T, H)
    return out.transpose(0, 3, 1, 2, 4).reshape(P, T, N, H)


def _attend_part(q: Float[Array, "X K Q H"], part: Part, transform: Transform | None) -> _Partial:
    scores = jnp.einsum("XKQH,XKHC->XKQC", q, part.k, preferred_element_type=jnp.float32)
    scores = jnp.where(part.visible[:, None, None], transform(scores) if transform else scores, MASKED)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    values = jnp.einsum("XKQC,XKCH->XKQH", weights.astype(part.v.dtype), part.v, preferred_element_type=jnp.float32)
    return _Partial(highest, jnp.sum(weights, axis=-1, keepdims=True), values)


def _merge(a: _Partial, b: _Partial) -> Float[Array, "X K Q H"]:
    """The attention over the keys of both parts. A part without a visible key has the highest score MASKED, and so no
    weight beside one that has."""
    highest = jnp.maximum(a.highest, b.highest)
    of_a, of_b = jnp.exp(a.highest - highest), jnp.exp(b.highest - highest)
    return (a.values * of_a + b.values * of_b) / (a.total * of_a + b.total * of_b)


def write_step(
    own_k: Float[Array, "B K H W"],
    own_v: Float[Array, "B K W H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    step: ArrayLike,
) -> tuple[Float[Array, "B K H W"], Float[Array, "B K W H"]]:
    """Writes k and v at the step's column of the rings, in place where these are donated."""
    column = step % own_k.shape[3]
    put = jax.lax.dynamic_update_slice_in_dim
    own_k = put(own_k, k[:, :, :, None].astype(own_k.dtype), column, axis=3)
    return own_k, put(own_v, v[:, :, None].astype(own_v.dtype), column, axis=2)


def visible_steps(step: ArrayLike, start: Int[ArrayLike, " B"], width: int) -> Bool[Array, "B W"]:
    """The columns that hold a step of each slot's present sample, which began at step `start`."""
    return step_of_column(step, width) >= start[:, None]


def step_of_column(step: ArrayLike, width: int) -> Int[Array, " W"]:
    """The step that each column holds once `step` has been written."""
    return step - (step - jnp.arange(width)) % width


def widen(cache: Cache, width: int) -> Cache:
    """Widens the rings to `width` columns, a multiple of their present width, by copies side by side: whichever column
    a step has in the wide ring then holds what it had in the narrow one. Only the latest W steps are ever visible."""
    times = width // cache.width
    assert times * cache.width == width, (cache.width, width)
    own_k = [constrain(jnp.concatenate([x] * times, axis=3), "RKHC") for x in cache.own_k]
    own_v = [constrain(jnp.concatenate([x] * times, axis=2), "RKCH") for x in cache.own_v]
    return cache._replace(own_k=own_k, own_v=own_v)


def write_chunk(
    prompt_k: Float[Array, "E K H S"],
    prompt_v: Float[Array, "E K S H"],
    k: Float[Array, "P T K H"],
    v: Float[Array, "P T K H"],
    entry: Int[ArrayLike, " P"],
    start: Int[ArrayLike, " P"],
    active: Bool[ArrayLike, " P"],
) -> tuple[Float[Array, "E K H S"], Float[Array, "E K S H"]]:
    """Writes the keys and values of P chunks into the prompts `entry` from the columns `start` on, where `active`."""
    k, v = k.transpose(0, 2, 3, 1).astype(prompt_k.dtype), v.swapaxes(1, 2).astype(prompt_v.dtype)
    for p in range(len(k)):
        prompt_k = _write_one(prompt_k, k[p], (entry[p], 0, 0, start[p]), active[p])
        prompt_v = _write_one(prompt_v, v[p], (entry[p], 0, start[p], 0), active[p])
    return prompt_k, prompt_v


def _write_one(buffer: jax.Array, new: jax.Array, at: tuple, active: ArrayLike) -> jax.Array:
    before = jax.lax.dynamic_slice(buffer, at, (1, *new.shape))
    return jax.lax.dynamic_update_slice(buffer, jnp.where(active, new[None], before), at)
