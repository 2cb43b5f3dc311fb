"""The weights as the sampler reads them: one dictionary a layer, in the layout of the sampling mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rmr1_jax.distributed.mesh import local_mesh, sampling_sharding
from rmr1_jax.model import qwen
from rmr1_jax.model.config import QwenConfig

Weights = dict[str, Any]


def sampling_weights(
    config: QwenConfig, params: qwen.Params, *, dtype=jnp.float32, mesh: Mesh | None = None
) -> Weights:
    """The weights for sampling, made once a policy update: a list of layers instead of a stack (a scan over a stack
    would carry the cache through itself and copy it), in the dtype that decode computes in, whole on every bank.

    mesh: the `mesh.sampling_mesh` to lay them out on, default the mesh in context. All processes make them together;
    each gets them on its own part (`mesh.local_mesh`), where it samples by itself."""
    mesh = mesh or jax.sharding.get_mesh()
    local = local_mesh(mesh)

    def own_part(weight: jax.Array) -> jax.Array:
        shards = [shard.data for shard in weight.addressable_shards]
        sharding = NamedSharding(local, weight.sharding.spec)
        return jax.make_array_from_single_device_arrays(weight.shape, sharding, shards)

    return jax.tree.map(own_part, _unstack(config, mesh, jnp.dtype(dtype))(params))


def weight_shapes(config: QwenConfig, mesh: Mesh, dtype) -> Weights:
    """What `sampling_weights` makes, as shapes, dtypes and shardings."""

    def weight(dims: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sampling_sharding(mesh, dims, shape))

    dims, shapes = qwen.param_dims(config), qwen.param_shapes(config)
    layer = {name: weight(d[1:], shapes["layers"][name][1:]) for name, d in dims["layers"].items()}
    top = {name: weight(dims[name], shapes[name]) for name in dims if name != "layers"}
    return top | {"layers": [layer] * config.num_layers}


@functools.cache
def _unstack(config: QwenConfig, mesh: Mesh, dtype) -> Callable:
    def unstack(params):
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.num_layers)]
        return params | {"layers": layers}

    return jax.jit(unstack, out_shardings=jax.tree.map(lambda w: w.sharding, weight_shapes(config, mesh, dtype)))
