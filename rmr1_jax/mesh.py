"""The device mesh and the two tables that say how dimensions are laid out on it.

Axes: `replica` (across slices), `fsdp` (weights and rows are split), `tensor` (heads, MLP width, vocabulary are split).
Weights and activations have separate tables, because a weight's width is split over `fsdp` while an activation's is
whole. On one CPU device the mesh is 1x1x1 and every line of code is the same.

Next: `model/qwen.py`, where each weight's letters are declared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rmr1_jax.errors import InputError

AXES = ("replica", "fsdp", "tensor")

# Dimension letter -> mesh axes. A letter that is not named is replicated.
WEIGHT_AXES = {"D": ("fsdp",), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}
ACTIVATION_AXES = {"B": ("replica", "fsdp"), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes. `fsdp=-1` takes every device that the other two leave."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them).

    Raises:
        InputError: the axis sizes do not multiply to the number of devices.
    """
    config = config or MeshConfig()
    devices = list(devices if devices is not None else jax.devices())
    others = config.replica * config.tensor
    fsdp = len(devices) // max(1, others) if config.fsdp == -1 else config.fsdp
    if min(config.replica, config.tensor, fsdp) < 1 or fsdp * others != len(devices):
        fitting = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise InputError(
            f"mesh replica={config.replica} fsdp={config.fsdp} tensor={config.tensor} does not cover "
            f"{len(devices)} devices exactly; replica x tensor must be one of {fitting} (then leave fsdp at -1)"
        )
    shape = (config.replica, fsdp, config.tensor)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def single_device_mesh() -> Mesh:
    """1x1x1 over the first local device: the default wherever no mesh is given."""
    return make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])


def weight_sharding(mesh: Mesh, dims: str, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a weight with dimension letters `dims`. A dimension its axis does not divide is replicated
    (two key-value heads on a tensor axis of four), so the result is always valid for `shape`."""
    return _sharding(mesh, WEIGHT_AXES, dims, shape)


def sampling_sharding(mesh: Mesh, dims: str, shape: Sequence[int]) -> NamedSharding:
    """As `weight_sharding` for a sampling copy: split over `tensor` alone, whole on every data-parallel replica."""
    table = {letter: axes for letter, axes in WEIGHT_AXES.items() if axes == ("tensor",)}
    return _sharding(mesh, table, dims, shape)


def activation_sharding(mesh: Mesh, dims: str, shape: Sequence[int]) -> NamedSharding:
    """As `weight_sharding`, for activations and batches."""
    return _sharding(mesh, ACTIVATION_AXES, dims, shape)


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """Pin an activation's layout inside jit, on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, dims, x.shape))


def activation_spec(mesh: Mesh | AbstractMesh, dims: str, shape: Sequence[int]) -> PartitionSpec:
    """As `activation_sharding`, without the devices: for use inside jit."""
    return _spec(mesh, ACTIVATION_AXES, dims, shape)


def rows_divisor(mesh: Mesh) -> int:
    """A batch's number of rows must be a multiple of this."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_micro_rows(mesh: Mesh, micro_rows: int) -> None:
    """Raises InputError where the mesh's data axes cannot share the rows of a micro-batch evenly."""
    if micro_rows % rows_divisor(mesh):
        raise InputError(f"micro_rows={micro_rows} must be divisible by the mesh's {rows_divisor(mesh)} row shards")


def _sharding(mesh: Mesh, table: dict[str, tuple[str, ...]], dims: str, shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, _spec(mesh, table, dims, shape))


def _spec(mesh, table: dict[str, tuple[str, ...]], dims: str, shape: Sequence[int]) -> PartitionSpec:
    assert len(dims) == len(shape), f"{dims} does not name the dimensions of {tuple(shape)}"
    spec = []
    for letter, size in zip(dims, shape, strict=True):
        axes = table.get(letter, ())
        ways = int(np.prod([mesh.shape[a] for a in axes])) if axes else 1
        spec.append(axes if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*spec)
