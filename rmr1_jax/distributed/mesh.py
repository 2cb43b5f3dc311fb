"""The device mesh, and the two tables that map dimension letters to its axes.

The axes are `replica` (across slices), `fsdp` (splits weights and rows) and `tensor` (splits heads, MLP width and
vocabulary). Weights and activations have separate tables, because the width of a weight is split over `fsdp` and that
of an activation is not. On one CPU device the mesh is 1x1x1 and the code is the same.

Next: `model/qwen.py`, where the letters of each weight are declared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import Field, PositiveInt

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import InputError

AXES = ("replica", "fsdp", "tensor")

# Dimension letter -> mesh axes. A letter that is not listed is replicated.
AxisTable = Mapping[str, tuple[str, ...]]
WEIGHT_AXES = {"D": ("fsdp",), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}
ACTIVATION_AXES = {"B": ("replica", "fsdp"), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}


@config_dataclass
class MeshConfig:
    """The sizes of the mesh axes."""

    replica: PositiveInt = 1
    """Copies of the weights; a multiple of the number of slices."""
    fsdp: Annotated[int, Field(ge=-1)] = -1
    """Devices over which weights and rows are divided. -1 takes all that the other axes leave."""
    tensor: PositiveInt = 1
    """Devices that share each matrix product."""


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh over `devices` (default: those of all processes), ordered by slice, process and id.

    Raises InputError if the axis sizes do not multiply to the number of devices, or a replica would lie across slices.
    """
    config = config or MeshConfig()
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda d: (slice_of(d), d.process_index, d.id))
    slices = len({slice_of(d) for d in devices if d.platform == "tpu"}) or 1
    if config.replica % slices:
        raise InputError(
            f"mesh replica={config.replica} on {slices} slices: no replica may lie across slices; replica must be "
            f"a multiple of {slices}"
        )
    others = config.replica * config.tensor
    fsdp = len(devices) // others if config.fsdp == -1 else config.fsdp
    if fsdp < 1 or fsdp * others != len(devices):
        fitting = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise InputError(
            f"mesh replica={config.replica} fsdp={config.fsdp} tensor={config.tensor} does not cover "
            f"{len(devices)} devices exactly; replica x tensor must be one of {fitting} (then leave fsdp at -1)"
        )
    return _mesh(devices, (config.replica, fsdp, config.tensor))


def sampling_mesh(mesh: Mesh, tensor: int | None = None) -> Mesh:
    """Make the mesh of the sampler's weights: the devices of `mesh` in the same order, as (1, rest, tensor).

    Each tensor group lies within one process, so that each process samples on its own part, its `local_mesh`. `tensor`
    is by default that of `mesh`. Raises InputError if a tensor group would lie across processes.
    """
    tensor = tensor or mesh.shape["tensor"]
    own = math.gcd(*Counter(d.process_index for d in mesh.devices.flat).values())
    if own % tensor:
        fitting = [n for n in range(1, own + 1) if own % n == 0]
        raise InputError(
            f"sampling_tensor={tensor} (by default the mesh's tensor): a sampler stays within a process, which has "
            f"{own} of the {mesh.size} devices; give one of {fitting}"
        )
    return _mesh(mesh.devices.flat, (1, -1, tensor))


def local_mesh(mesh: Mesh, process: int | None = None) -> Mesh:
    """Return the part of a `sampling_mesh` that belongs to one process (default: this one). A mesh of any shape is
    returned as it is if all of it belongs to that process."""
    process = jax.process_index() if process is None else process
    own = [d for d in mesh.devices.flat if d.process_index == process]
    return mesh if len(own) == mesh.size else _mesh(own, (1, -1, mesh.shape["tensor"]))


def slice_of(device: jax.Device) -> int:
    """Return the number of the slice that a device belongs to; 0 where there is only one."""
    return getattr(device, "slice_index", None) or 0


def single_device_mesh() -> Mesh:
    """Make the mesh 1x1x1 of the first local device, the default wherever no mesh is given."""
    return make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])


def weight_sharding(mesh: Mesh, dims: str, shape: Sequence[int]) -> NamedSharding:
    """Return the sharding of a weight with dimension letters `dims`. A dimension that its axis does not divide is
    replicated (two key-value heads on a tensor axis of four), so the result is always valid for `shape`."""
    return NamedSharding(mesh, _spec(mesh, WEIGHT_AXES, dims, shape))


def sampling_sharding(mesh: Mesh, dims: str, shape: Sequence[int]) -> NamedSharding:
    """Like `weight_sharding`, for the sampler's copy: split over `tensor` alone and replicated over the other axes."""
    table = {letter: axes for letter, axes in WEIGHT_AXES.items() if axes == ("tensor",)}
    return NamedSharding(mesh, _spec(mesh, table, dims, shape))


def activation_sharding(mesh: Mesh | AbstractMesh, dims: str, shape: Sequence[int]) -> NamedSharding:
    """Like `weight_sharding`, for activations and batches."""
    return NamedSharding(mesh, _spec(mesh, ACTIVATION_AXES, dims, shape))


def constrain(x: jax.Array, dims: str, table: AxisTable = ACTIVATION_AXES) -> jax.Array:
    """Constrain the sharding of an activation inside jit, on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(mesh, table, dims, x.shape))


def constrain_weight(x: jax.Array, dims: str) -> jax.Array:
    """Like `constrain`, for a weight or its gradient."""
    return constrain(x, dims, WEIGHT_AXES)


def rows_divisor(mesh: Mesh) -> int:
    """Return the number that the rows of a batch must be a multiple of."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_micro_rows(mesh: Mesh, micro_rows: int) -> None:
    """Raise InputError if the data axes of the mesh do not divide the rows of a micro-batch."""
    if micro_rows % rows_divisor(mesh):
        raise InputError(f"micro_rows={micro_rows} must be divisible by the mesh's {rows_divisor(mesh)} row shards")


def own_rows(mesh: Mesh, rows: int) -> list[int]:
    """Return which of the `rows` rows of a batch the devices of this process hold, in order."""
    held = activation_sharding(mesh, "B", (rows,)).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in held for row in range(rows)[part]})


def place_rows(mesh: Mesh, dims: str, arrays: dict[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
    """Put batches on the mesh, from the `own_rows` that each process gives in `arrays`. dims: the dimension letters of
    every array. rows: the size of B over all processes."""

    def place(own: np.ndarray) -> jax.Array:
        shape = tuple(rows if letter == "B" else size for letter, size in zip(dims, own.shape, strict=True))
        return jax.make_array_from_process_local_data(activation_sharding(mesh, dims, shape), own, shape)

    return {name: place(own) for name, own in arrays.items()}


def _mesh(devices: Iterable[jax.Device], shape: tuple[int, int, int]) -> Mesh:
    return Mesh(np.asarray(list(devices)).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def _spec(mesh: Mesh | AbstractMesh, table: AxisTable, dims: str, shape: Sequence[int]) -> PartitionSpec:
    assert len(dims) == len(shape), f"{dims} does not name the dimensions of {tuple(shape)}"
    spec = []
    for letter, size in zip(dims, shape, strict=True):
        axes = table.get(letter, ())
        ways = math.prod(mesh.shape[a] for a in axes)
        spec.append(axes if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*spec)
