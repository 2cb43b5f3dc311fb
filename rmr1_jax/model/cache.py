"""The key-value cache as a pytree: what a prompt left behind, and what each of its samples has added since.

One buffer a layer, not one stacked array: a stacked cache that passes through a scan is copied at every step, a
donated buffer a layer is updated in place. Heads come before positions, so that a decode step's products read
contiguous keys. `attention.attend_two` reads it; `sampler/engine.py` owns it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rmr1_jax.mesh import constrain


class Cache(NamedTuple):
    """Keys and values, lists over L layers.

    shared_k, shared_v: [P, K, S, H] each, the prompts, read by all R samples of a prompt.
    own_k, own_v: [P, R, K, C, H] each, the samples' tokens; column c holds step c of every sample.
    """

    shared_k: list[jax.Array]
    shared_v: list[jax.Array]
    own_k: list[jax.Array]
    own_v: list[jax.Array]

    @property
    def capacity(self) -> int:
        """How many steps fit in the samples' part."""
        return self.own_k[0].shape[3]


def heads_first(x: jax.Array) -> jax.Array:
    """[P, S, K, H] as the forward pass makes it -> [P, K, S, H] as decode reads it."""
    return constrain(x.swapaxes(1, 2), "BKSH")


def empty_own(shared: list[jax.Array], samples: int, capacity: int) -> list[jax.Array]:
    """Zeroed [P, R, K, C, H] buffers that go with the prompts' part."""
    P, K, _, H = shared[0].shape
    return [constrain(jnp.zeros((P, samples, K, capacity, H), x.dtype), "BRKCH") for x in shared]


def write_step(own: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """Put [P, R, K, H] at column `step` of [P, R, K, C, H]; in place where the buffer is donated."""
    return jax.lax.dynamic_update_slice_in_dim(own, new[:, :, :, None].astype(own.dtype), step, axis=3)


def grow(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` steps."""
    more = ((0, 0), (0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0))
    own_k, own_v = ([jnp.pad(x, more) for x in part] for part in (cache.own_k, cache.own_v))
    return cache._replace(own_k=own_k, own_v=own_v)
