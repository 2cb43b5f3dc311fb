"""How fast a step was: FLOPs by formula, and the share of the devices' peak that they are (MFU).

Model FLOPs: what the mathematics needs, without what remat computes twice and without padding.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.model.config import QwenConfig

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


def layer_params(config: QwenConfig) -> int:
    """Weights in the matrix products of a layer."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size * (heads + 3 * config.intermediate_size)


def forward_flops(config: QwenConfig, lengths: Iterable[int]) -> float:
    """Of the forward pass over sequences of `lengths` tokens: the weights' products, and causal attention within each
    sequence."""
    lengths = np.asarray(list(lengths), np.float64)
    heads = config.num_heads * config.head_dim
    weights = config.num_layers * layer_params(config) + config.vocab_size * config.hidden_size
    # Scores and their product with the values: two FLOPs for each number of a head, query and earlier key.
    seen = config.num_layers * 4 * heads * lengths * (lengths + 1) / 2
    return float((2 * weights * lengths + seen).sum())


def train_flops(config: QwenConfig, lengths: Iterable[int]) -> float:
    """Of a forward and a backward pass, which has two products for each one of the forward pass."""
    return 3 * forward_flops(config, lengths)


def peak_flops(device: jax.Device) -> float | None:
    """In bfloat16, where the kind of the device is known."""
    kind = device.device_kind
    return TPU_PEAKS.get(kind) or next((peak for name, peak in GPU_PEAKS.items() if name in kind), None)


def throughput(tokens: int, seconds: float, mesh: Mesh) -> dict[str, float]:
    """Metrics of a step over `mesh`: tokens a second, of all devices together and of one."""
    return {"tokens_per_second": tokens / seconds, "tokens_per_second_per_device": tokens / seconds / mesh.size}


def mfu(flops: float, seconds: float, mesh: Mesh) -> dict[str, float]:
    """The metric `mfu`, model FLOPs over what `mesh` could have done in the time; nothing where its peak is unknown."""
    peak = peak_flops(mesh.devices.flat[0])
    return {"mfu": flops / (seconds * mesh.size * peak)} if peak else {}
