"""Chooses the mesh of a model that one process samples from: how many of its devices share one copy of the weights.

The rule is the same at run time (`local_layout`) and in `rmr1 plan` (`layout`). Next: `weights.py`, which lays the
weights out on the mesh; `shapes.py`, which fills the rest of the memory with the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rmr1_jax.distributed.chips import bytes_per_chip, free_memory
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh, rows_divisor
from rmr1_jax.errors import InputError
from rmr1_jax.model.qwen import Transformer
from rmr1_jax.sampler.weights import abstract_weights

# The weights take at most this part of a device's memory, and the cache has the rest. With a tensor axis twice as large
# at most half as many samples again would fit, and every layer would wait for an exchange between more devices.
WEIGHTS_SHARE = 0.5
SLOTS = 64  # samples in flight for each copy of the weights, unless a command says otherwise
GIB = 2**30


def local_layout(model: Transformer, dtype: Any, mesh: Mesh | None = None, tensor: int | None = None) -> Mesh:
    """Return `mesh` if it is given, else the `layout` over all devices of this process.

    Raises:
        InputError: as `layout` and `check_weights_fit`; or both `mesh` and `tensor` are given.
    """
    if mesh is not None:
        if tensor is not None:
            raise InputError(f"tensor={tensor} and a mesh were both given; give one of them, or neither")
        return mesh
    devices = jax.local_devices()
    memory = free_memory(devices)
    mesh = layout(model, dtype, devices, memory, tensor)
    check_weights_fit(model, dtype, mesh, memory)
    return mesh


def layout(
    model: Transformer, dtype: Any, devices: Sequence[jax.Device], memory: int | None, tensor: int | None = None
) -> Mesh:
    """Make the mesh (1, data, tensor) of a sampler over `devices`, which belong to one process.

    The tensor axis is the smallest with which the weights take at most WEIGHTS_SHARE of a device's memory, so that a
    useful cache fits beside them; the other devices are data-parallel. Sizes that divide the key-value heads come
    first, because with others every device holds the whole cache. If no size leaves that much, the one with the fewest
    bytes of weights on a device is used.

    Args:
        model: only its structure is used. dtype: that of the sampler's weights. memory: bytes that are free on each
            device; None (as on CPUs) means enough, and a tensor axis of 1. tensor: the size of the tensor axis, instead
            of the rule's.

    Raises:
        InputError: `tensor` does not divide the number of devices.
    """
    fitting = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    if tensor is not None and tensor not in fitting:
        raise InputError(
            f"tensor={tensor} does not divide the {len(devices)} device{'s' * (len(devices) > 1)} of this process; "
            f"give {'one of ' * (len(fitting) > 1)}{', '.join(map(str, fitting))}, or leave it out"
        )
    sizes = [tensor] if tensor else sorted(fitting, key=lambda t: model.config.num_kv_heads % t != 0)
    meshes = [make_mesh(MeshConfig(tensor=t), devices) for t in sizes]
    if memory is None:
        return meshes[0]
    needs = [weight_bytes(model, mesh, dtype) for mesh in meshes]
    return meshes[next((k for k, need in enumerate(needs) if need <= WEIGHTS_SHARE * memory), needs.index(min(needs)))]


def check_weights_fit(model: Transformer, dtype: Any, mesh: Mesh, memory: int | None) -> None:
    """Raise InputError if the weights on one device of the mesh need more than `memory` bytes; see `layout`."""
    name, config, tensor = jnp.dtype(dtype).name, model.config, mesh.shape["tensor"]
    if memory is None or (need := weight_bytes(model, mesh, dtype)) <= memory:
        return
    advice = ["use a host with more devices or more memory on each, or a smaller model"]
    if tensor < mesh.size:
        advice.insert(0, "give a larger tensor, or leave it out")
    if name != "bfloat16":
        advice.insert(0, "load it in bfloat16")
    raise InputError(
        f"the weights of this model ({config.num_layers} layers of width {config.hidden_size}) in {name} need "
        f"{need / GIB:.1f} GiB on each of {mesh.size} devices with tensor={tensor}, and a device has "
        f"{memory / GIB:.1f} GiB free; {', or '.join(advice)}"
    )


def weight_bytes(model: Transformer, mesh: Mesh, dtype: Any) -> int:
    """Return the bytes of the sampling weights on one device of the mesh."""
    return bytes_per_chip(abstract_weights(model, mesh, dtype))


def default_slots(mesh: Mesh) -> int:
    """Return how many samples are in flight at most on a mesh, where nothing else is asked for."""
    return SLOTS * rows_divisor(mesh)
