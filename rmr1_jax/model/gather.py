"""A gather whose gradient is a gather: a scatter that adds, which JAX would make of it, is slow on TPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@jax.custom_vjp
def take(x: Shaped[Array, "B T ..."], index: Int[Array, "B I"], inverse: Int[Array, "B T"]) -> Shaped[Array, "B I ..."]:
    """Return the rows of x at `index`, zeros where that is T or more; no row is taken twice. inverse: where in the
    result each row of x is, I or more if it is not."""
    return at(x, index)


def _take_forward(x, index, inverse):
    return at(x, index), (index, inverse)


def _take_backward(saved, d_out):
    index, inverse = saved
    return take(d_out, inverse, index), None, None


take.defvjp(_take_forward, _take_backward)


def at(x: Shaped[Array, "B T ..."], index: Int[Array, "B I"]) -> Shaped[Array, "B I ..."]:
    """Return x at `index`, zeros where that is T or more."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)
