"""Facts about devices: the speeds of TPU chips and GPUs by the `device_kind` that JAX reports, and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Chip(NamedTuple):
    """The peaks of one device as JAX counts devices; None where a number is not known.

    flops: FLOP/s of dense bfloat16 matrix products. In bytes per second: memory, the bandwidth of the chip's memory;
    links, of all its links to other chips, outgoing; network, of its share of the network between slices.
    """

    flops: float
    memory: float | None = None
    links: float | None = None
    network: float | None = None


# From Google's pages on the TPU versions: bfloat16 peak, HBM bandwidth, half of the bidirectional bandwidth of the
# links (400, 800, 1200 GB/s), and the data center's bandwidth per pod (6.4 and 25.6 Tb/s for 256 chips) or per chip
# (50 Gb/s).
CHIPS = {
    "TPU v4": Chip(275e12),
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), Chip(197e12, 819e9, 200e9, 3.125e9)),
    **dict.fromkeys(("TPU v5", "TPU v5p"), Chip(459e12, 2765e9, 600e9, 6.25e9)),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), Chip(918e12, 1638e9, 400e9, 12.5e9)),
    # The kind of a GPU is its product's name, such as "NVIDIA H100 80GB HBM3".
    "A100": Chip(312e12),
    "H100": Chip(989e12, 3350e9),
    "H200": Chip(989e12, 4800e9),
    "GH200": Chip(989e12),
}


def chip_of(device: jax.Device) -> Chip | None:
    """Return the entry for the device's kind, or None for a kind that is not in the table."""
    kind = device.device_kind
    return next((CHIPS[name] for name in (kind, *kind.replace("-", " ").split()) if name in CHIPS), None)


def free_memory(devices: Sequence[jax.Device]) -> int | None:
    """Return the bytes that are free on each of the devices (on the fullest of them); None where they do not report it,
    as CPUs do not."""
    reports = [device.memory_stats() for device in devices]
    if not all(reports):
        return None
    return min(report["bytes_limit"] - report["bytes_in_use"] for report in reports)


def bytes_per_chip(tree: Any) -> int:
    """Return the bytes of all `ShapeDtypeStruct`s on one chip; those in host memory do not count."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    on_chip = [x for x in arrays if x.sharding.memory_kind != "pinned_host"]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in on_chip)
