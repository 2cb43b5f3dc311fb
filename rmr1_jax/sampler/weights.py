"""The weights as the sampler reads them: a list of layers, in the layout of the sampling mesh.

`sampling_weights` makes them from the training weights, once a policy update, and `stored_weights` reads them from a
model directory; `bind` makes modules of them again inside a compiled program. Read `programs.py` next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from rmr1_jax.distributed.mesh import local_mesh, sampling_sharding
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Block, Qwen, Transformer, abstract_params, split
from rmr1_jax.model.stored_model import StoredModel

Weights = dict[str, Any]  # as `qwen.Params`, but "layers" is a list of trees without the axis L


def sampling_weights(model: Qwen, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Weights:
    """Makes the weights for sampling: a list of layers instead of a stack (a scan over a stack would carry the cache
    through itself and copy it), in the dtype that decode computes in, replicated over the data-parallel axes.

    Args:
        mesh: the `mesh.sampling_mesh` to lay them out on, by default the mesh in context. All processes must call this
            together; each gets the arrays of its own part (`mesh.local_mesh`), where it samples by itself.
    """
    mesh = mesh or jax.sharding.get_mesh()
    local = local_mesh(mesh)

    def own_part(weight: jax.Array) -> jax.Array:
        shards = [shard.data for shard in weight.addressable_shards]
        sharding = NamedSharding(local, weight.sharding.spec)
        return jax.make_array_from_single_device_arrays(weight.shape, sharding, shards)

    unstack = _unstack(type(model), model.config, mesh, jnp.dtype(dtype))
    return jax.tree.map(own_part, unstack(split(model)[1]))


def stored_weights(stored: StoredModel, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Weights:
    """Reads the weights for sampling straight from a model directory: `sampling_weights` without training weights.
    Each process reads what its own part of the mesh keeps."""
    local = local_mesh(mesh or jax.sharding.get_mesh())
    return stored.read(local, dtype, sharding=sampling_sharding, stacked=False)


def abstract_weights(model: Transformer, mesh: Mesh, dtype: Any) -> Weights:
    """The shapes, dtypes and shardings of `sampling_weights`. `model` need not have arrays."""
    whole = abstract_params(model, mesh, dtype, sharding=sampling_sharding)
    layer = abstract_params(model.Block(model.config), mesh, dtype, sharding=sampling_sharding)
    return whole | {"layers": [layer] * model.config.num_layers}


def bind(graphdef: nnx.GraphDef, weights: Weights) -> tuple[Qwen, list[Block]]:
    """The module that holds the sampler's weights, and its blocks one by one; its own stack of blocks is not used."""
    model = nnx.merge(graphdef, weights | {"layers": weights["layers"][0]})
    block = model.block_graphdef()
    return model, [nnx.merge(block, layer) for layer in weights["layers"]]


@functools.cache
def _unstack(kind: type[Qwen], config: QwenConfig, mesh: Mesh, dtype: Any) -> Callable:
    def unstack(params):
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.num_layers)]
        return params | {"layers": layers}

    like = abstract_weights(kind(config), mesh, dtype)
    return jax.jit(unstack, out_shardings=jax.tree.map(lambda w: w.sharding, like))
