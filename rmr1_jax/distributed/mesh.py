"""The device mesh and the two tables that say how dimensions are laid out on it.

Axes: `replica` (across slices), `fsdp` (weights and rows are split), `tensor` (heads, MLP width, vocabulary are split).
Weights and activations have separate tables, because a weight's width is split over `fsdp` while an activation's is
whole. On one CPU device the mesh is 1x1x1 and every line of code is the same.

Next: `model/qwen.py`, where each weight's letters are declared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import InputError

AXES = ("replica", "fsdp", "tensor")

# Dimension letter -> mesh axes. A letter that is not named is replicated.
WEIGHT_AXES = {"D": ("fsdp",), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}


ACTIVATION_AXES = {"B": ("replica", "fsdp"), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",)}


@config_dataclass
class MeshConfig:
    """Sizes of the mesh axes. `fsdp=-1` takes every device that the other two leave."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of them, of all processes), slice by slice and process by process.

    Raises:
        InputError: the axis sizes do not multiply to the number of devices, or a replica would lie across slices.
    """
    config = config or MeshConfig()
    devices = sorted(devices if devices is not None else jax.devices(), key=_place)
    slices = len({slice_of(d) for d in devices if d.platform == "tpu"}) or 1
    if config.replica % slices:
        raise InputError(
            f"mesh replica={config.replica} on {slices} slices: no replica may lie across slices; replica must be "
            f"{slices} or a multiple of it"
        )
    others = config.replica * config.tensor
    fsdp = len(devices) // max(1, others) if config.fsdp == -1 else config.fsdp
    if min(config.replica, config.tensor, fsdp) < 1 or fsdp * others != len(devices):
        fitting = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise InputError(
            f"mesh replica={config.replica} fsdp={config.fsdp} tensor={config.tensor} does not cover "
            f"{len(devices)} devices exactly; replica x tensor must be one of {fitting} (then leave fsdp at -1)"
        )
    return _mesh(devices, (config.replica, fsdp, config.tensor))


def sampling_mesh(mesh: Mesh, tensor: int | None = None) -> Mesh:
    """The devices of `mesh` in the same order, (1, rest, tensor): where the sampler's weights go to. tensor: default
    that of `mesh`. No tensor group reaches into another process, so that `local_mesh` gives each process its own.

    Raises:
        InputError: one would.
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
    """The part of a `sampling_mesh` that lies in one process (default: this one); any mesh that lies there whole."""
    process = jax.process_index() if process is None else process
    own = [d for d in mesh.devices.flat if d.process_index == process]
    return mesh if len(own) == mesh.size else _mesh(own, (1, -1, mesh.shape["tensor"]))


def slice_of(device: jax.Device) -> int:
    """The slice that a device belongs to; 0 where there is but one."""
    return getattr(device, "slice_index", None) or 0


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
    return _pin(x, ACTIVATION_AXES, dims)


def constrain_weight(x: jax.Array, dims: str) -> jax.Array:
    """As `constrain`, by the weights' table: for a weight and its gradient."""
    return _pin(x, WEIGHT_AXES, dims)


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


def own_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of a batch's `rows` rows this process's devices hold, in order."""
    held = activation_sharding(mesh, "B", (rows,)).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in held for row in range(rows)[part]})


def place_rows(mesh: Mesh, dims: str, arrays: dict[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
    """Batches on the mesh, from each process's `own_rows`: arrays with dimension letters `dims`, `rows` long in B."""

    def place(own: np.ndarray) -> jax.Array:
        shape = tuple(rows if letter == "B" else size for letter, size in zip(dims, own.shape, strict=True))
        return jax.make_array_from_process_local_data(activation_sharding(mesh, dims, shape), own, shape)

    return {name: place(own) for name, own in arrays.items()}


def _mesh(devices: Iterable[jax.Device], shape: tuple[int, int, int]) -> Mesh:
    return Mesh(np.asarray(list(devices)).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def _place(device: jax.Device) -> tuple[int, int, int]:
    return slice_of(device), device.process_index, device.id


def _pin(x: jax.Array, table: dict[str, tuple[str, ...]], dims: str) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(mesh, table, dims, x.shape))


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
