"""Describes a TPU slice that this machine does not have, from libtpu: its devices and the memory of a chip.

Next: `compile.py`, which compiles programs for these devices.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmr1_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """The hardware of a plan: the devices for training, those of one host for the sampler, and the bytes per chip."""

    devices: list[jax.Device]
    host: list[jax.Device]
    memory: int
    slices: int = 1


def slice_target(topology: str, slices: int = 1) -> Target:
    """Describe `slices` slices of a topology; raises InputError as `slice_devices`."""
    devices = slice_devices(topology, slices)
    # The chips of the first host are a slice of their own, because libtpu compiles only for whole slices.
    coordinates = [d.coords for d in devices if d.process_index == devices[0].process_index]
    sizes = [max(axis) - min(axis) + 1 for axis in zip(*coordinates, strict=True)]
    kind, shape = topology.split(":")
    host = slice_devices(f"{kind}:{'x'.join(map(str, sizes[: shape.count('x') + 1]))}")
    return Target(devices, host, memory_limit(host[0]), slices)


def slice_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Return the devices of `slices` slices, for compiling only.

    Raises:
        InputError: libtpu is not installed, or does not know the topology.
    """
    if slices < 1:
        raise InputError(f"--slices {slices} must be at least 1")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "compiling for a TPU needs libtpu, which is not installed here; make an environment for it: "
            "python3 -m venv .venv-tpu && .venv-tpu/bin/pip install -e '.[tpu]'"
        )
    # libtpu reads these when it is loaded. Without them it asks the network for a TPU and locks out other processes.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
    options: dict[str, object] = {}
    if slices > 1:
        options = {"num_slices": slices, "chip_config_name": "default", "wrap": (False,) * 3}
        options["chips_per_host_bounds"] = (2, 2, 1)
    if re.fullmatch(r"\w+:1(x1)*", topology):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices == 1 and re.fullmatch(r"v[56]e:2x4", topology):
        options["chips_per_host_bounds"] = (2, 4, 1)  # a machine with eight chips; libtpu's default is two with four
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as e:
        raise InputError(
            f"--topology {topology}: {e}; expected a slice such as v5e:4x4, v6e:16x16 (two dimensions) or v5p:2x2x2 "
            "(three)"
        ) from None


def memory_limit(device: jax.Device) -> int:
    """Return the memory of a chip in bytes, from the compiler's error for a program that needs far too much."""
    sharding = NamedSharding(Mesh([device], "x"), PartitionSpec())
    too_large = jax.ShapeDtypeStruct((2**20, 2**30), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: x[0]).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as e:
        return parse_out_of_memory(e)[1]
    raise AssertionError(f"{device.device_kind} accepted an array of a petabyte")


def parse_out_of_memory(error: Exception) -> tuple[int, int]:
    """Return the bytes (needed, available) in a compiler's out-of-memory error; raise any other error again."""
    size = r"([\d.]+)([KMGTP])"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)|Used {size} of {size} hbm", str(error))
    if not found:
        raise error
    units = {unit: 2 ** (10 * (i + 1)) for i, unit in enumerate("KMGTP")}
    needed, needed_unit, available, unit = (x for x in found.groups() if x)
    return int(float(needed) * units[needed_unit]), int(float(available) * units[unit])
