"""What a chip can do: its memory, its bandwidth, and its peak FLOP/s."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Bytes a second of a chip's memory, of all its links out, and of its share of the network between slices."""

    memory: float
    links: float
    network: float


# By `device_kind`. From Google's pages on the TPU versions: HBM bandwidth, half of the bidirectional bandwidth of the
# links (400, 800, 1200 GB/s), and the data centre's bandwidth a pod (6.4 and 25.6 Tb/s for 256 chips) or a chip
# (50 Gb/s).
CHIPS = {
    "TPU v5 lite": Chip(819e9, 200e9, 3.125e9),
    "TPU v6 lite": Chip(1638e9, 400e9, 12.5e9),
    "TPU v5": Chip(2765e9, 600e9, 6.25e9),  # v5p
}

# bfloat16 products, dense, in FLOP/s of one device as JAX counts them.
TPU_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device: jax.Device) -> float | None:
    """In bfloat16, where the kind of the device is known."""
    kind = device.device_kind
    return TPU_PEAKS.get(kind) or next((peak for name, peak in GPU_PEAKS.items() if name in kind), None)
