"""The key-value cache as a pytree: what prompts left behind, and what each slot has added since.

One buffer a layer, not one stacked array: a stacked cache that passes through a scan is copied at every step, a
donated buffer a layer is updated in place. Heads come before columns, and a key's H numbers before the columns too
([..., H, W], values [..., W, H]), so that both products of a decode step run along contiguous memory: on CPU three
times as fast as with keys in the layout of values.

A slot's own part is a ring in time, not in positions: at step t every slot writes column t mod W, whatever its age. One
slice is written for all slots (no scatter), and a slot that is taken over needs no clearing: what is older than its
new owner is invisible to it. A sample that lives at most W steps never loses a column. The rotary positions are in the
keys already, so the order of columns does not matter.

`attention.attend_slots` reads it; `sampler/programs.py` owns it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmr1_jax.distributed.mesh import constrain
from rmr1_jax.model.attention import MASKED, Transform


def attend_chunk(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, transform_scores: Transform | None = None
) -> jax.Array:
    """A chunk of a prompt against the prompt's keys so far, its own among them.

    Args:
        q: [P, T, N, H]. k: [P, K, H, S], v: [P, K, S, H], column s holds position s. positions: [P, T] int32 of the
            queries.

    Returns:
        [P, T, N, H] in q's dtype; scores and softmax in float32.
    """
    P, T, N, H = q.shape
    K, _, S = k.shape[1:]
    visible = jnp.arange(S) <= positions[:, :, None]
    grouped = (q * H**-0.5).reshape(P, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return (
        _attend_masked(grouped, k.swapaxes(2, 3), v, visible, transform_scores)
        .transpose(0, 3, 1, 2, 4)
        .reshape(P, T, N, H)
    )


class Members(NamedTuple):
    """Which slots hold samples of which prompt. table: [E, R] a prompt's slots (any number where there are fewer);
    entry, rank: [B] where a slot stands in the table. int32."""

    table: jax.Array
    entry: jax.Array
    rank: jax.Array


def attend_slots(
    q: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    prompt_visible: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    own_visible: jax.Array,
    members: Members,
    transform_scores: Transform | None = None,
) -> jax.Array:
    """One decode step for B slots, each over its prompt and its own tokens. A prompt's keys are read once for all of
    its slots: their queries are brought to the prompt, not the prompt to them.

    Args:
        q: [B, N, H]. prompt_k: [E, K, H, S], prompt_v: [E, K, S, H]; prompt_visible: [E, S] bool. own_k: [B, K, H, W],
            own_v: [B, K, W, H]; own_visible: [B, W] bool, at least one column a slot. See `cache.py` for the layout.

    Returns:
        [B, N, H] in q's dtype.
    """
    B, N, H = q.shape
    E, K = prompt_k.shape[:2]
    R, G = members.table.shape[1], N // K
    q = (q * H**-0.5).reshape(B, K, G, H)
    asked = q[members.table].transpose(0, 2, 1, 3, 4).reshape(E, K, R * G, H)
    theirs = _partial(asked, prompt_k, prompt_v, prompt_visible, transform_scores)
    theirs = [x.reshape(E, K, R, G, -1)[members.entry, :, members.rank] for x in theirs]
    own = _partial(q, own_k, own_v, own_visible, transform_scores)
    return _merge(theirs, own).reshape(B, N, H).astype(q.dtype)


def _partial(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, transform: Transform | None
) -> list[jax.Array]:
    """Attention over some of the keys, to be merged with the rest: the highest score [B, K, Q, 1], the sum of the
    exponentials [B, K, Q, 1] and the weighted values [B, K, Q, H], all float32.

    q: [B, K, Q, H]. k: [B, K, H, S]. v: [B, K, S, H]. visible: [B, S] bool.
    """
    scores = jnp.einsum("BKQH,BKHS->BKQS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], transform(scores) if transform else scores, MASKED)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    values = jnp.einsum("BKQS,BKSH->BKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return [highest, jnp.sum(weights, axis=-1, keepdims=True), values]


def _merge(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """The attention over the keys of both parts. A part without a visible key has the highest score MASKED and so no
    weight beside one that has."""
    highest = jnp.maximum(a[0], b[0])
    of_a, of_b = jnp.exp(a[0] - highest), jnp.exp(b[0] - highest)
    return (a[2] * of_a + b[2] * of_b) / (a[1] * of_a + b[1] * of_b)


def _attend_masked(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, transform: Transform | None
) -> jax.Array:
    """q: [B, K, G, T, H]; k, v: [B, K, S, H]; visible: [B, T, S] -> [B, K, G, T, H]."""
    B, K, G, T, H = q.shape
    scores = jnp.einsum("BKTH,BKSH->BKTS", q.reshape(B, K, G * T, H), k, preferred_element_type=jnp.float32)
    scores = transform(scores) if transform else scores
    scores = jnp.where(visible[:, None, None], scores.reshape(B, K, G, T, -1), MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(B, K, G * T, -1)
    return jnp.einsum("BKTS,BKSH->BKTH", probs, v).reshape(q.shape)


class Cache(NamedTuple):
    """Keys and values, lists over L layers.

    prompt_k: [E, K, H, S], prompt_v: [E, K, S, H] each, E prompts, each read by all its samples.
    own_k: [B, K, H, W], own_v: [B, K, W, H] each, B slots; column c holds the latest step t with t mod W = c.
    """

    prompt_k: list[jax.Array]
    prompt_v: list[jax.Array]
    own_k: list[jax.Array]
    own_v: list[jax.Array]

    @property
    def width(self) -> int:
        """W: how many steps a ring holds."""
        return self.own_k[0].shape[3]

    @property
    def prompt_room(self) -> int:
        """S: how many tokens of a prompt fit."""
        return self.prompt_k[0].shape[3]


def write_step(own_k: jax.Array, own_v: jax.Array, k: jax.Array, v: jax.Array, step: jax.Array):
    """Put k and v, [B, K, H] each, at the step's column of the rings; in place where these are donated."""
    column = step % own_k.shape[3]
    put = jax.lax.dynamic_update_slice_in_dim
    own_k = put(own_k, k[:, :, :, None].astype(own_k.dtype), column, axis=3)
    return own_k, put(own_v, v[:, :, None].astype(own_v.dtype), column, axis=2)


def visible_steps(step: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """[B, W] bool: the columns that hold a step of the slot's present owner, who began at step `start` [B]."""
    return step_of_column(step, width) >= start[:, None]


def step_of_column(step: jax.Array, width: int) -> jax.Array:
    """[W]: the step that each column holds once `step` has been written."""
    return step - (step - jnp.arange(width)) % width


def widen(cache: Cache, width: int) -> Cache:
    """Rings of `width` columns, a multiple of those there are: copies side by side, so that whichever column a step has
    in the wide ring holds what it had in the narrow one. Of the copies only the latest W steps are ever visible."""
    times = width // cache.width
    assert times * cache.width == width, (cache.width, width)
    own_k = [constrain(jnp.concatenate([x] * times, axis=3), "RKHC") for x in cache.own_k]
    own_v = [constrain(jnp.concatenate([x] * times, axis=2), "RKCH") for x in cache.own_v]
    return cache._replace(own_k=own_k, own_v=own_v)


def write_chunk(
    prompt_k: jax.Array, prompt_v: jax.Array, k: jax.Array, v: jax.Array, entry: jax.Array, start: jax.Array, active
):
    """Put the keys and values of a chunk, [P, T, K, H] each, into rows `entry` [P] from columns `start` [P] on, where
    `active` [P] says so."""
    k, v = k.transpose(0, 2, 3, 1).astype(prompt_k.dtype), v.swapaxes(1, 2).astype(prompt_v.dtype)
    for p in range(len(k)):
        prompt_k = _write_one(prompt_k, k[p], (entry[p], 0, 0, start[p]), active[p])
        prompt_v = _write_one(prompt_v, v[p], (entry[p], 0, start[p], 0), active[p])
    return prompt_k, prompt_v


def _write_one(buffer: jax.Array, new: jax.Array, at: tuple, active: jax.Array) -> jax.Array:
    before = jax.lax.dynamic_slice(buffer, at, (1, *new.shape))
    return jax.lax.dynamic_update_slice(buffer, jnp.where(active, new[None], before), at)
