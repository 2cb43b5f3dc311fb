"""Metrics: `metrics.jsonl` with one JSON object a step, and throughput and MFU by formula.

A continued run continues the file as if it had never stopped. Of several processes only the first writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.distributed.chips import chip_of
from rmr1_jax.distributed.exchange import first
from rmr1_jax.errors import InputError
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.model.config import QwenConfig


class StepLog:
    """Appends to a JSONL file of rows with a `step`. Lines from `next_step` on are removed first: they came after the
    checkpoint that the run continues from, and will be written again."""

    def __init__(self, path: Path, *, next_step: int):
        self.path = path
        if first() and self.path.exists():
            write_whole(self.path, (line for line in _whole_lines(self.path) if json.loads(line)["step"] < next_step))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one row. Numbers that are not finite are written as null: JSON has no NaN. Raises RunError if the
        file cannot be written; a half-written line is removed when the run is continued."""
        if not first():
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = (json.dumps(row) + "\n").encode()
        then = "the last checkpoint is valid; make the file writable and run the same command again"
        with writing(self.path, len(line), then), self.path.open("ab") as file:
            file.write(line)


class MetricsLog(StepLog):
    """Appends to the `metrics.jsonl` of a run directory, a row each step."""

    def __init__(self, directory: Path, *, next_step: int):
        super().__init__(directory / "metrics.jsonl", next_step=next_step)


def is_held_out(name: str) -> bool:
    """Return True for a metric that is measured on held-out data, and so not at every step."""
    return name.startswith("eval_")


def as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Device scalars as Python numbers; waits for them."""
    return {k: float(v) for k, v in jax.device_get(dict(metrics)).items()}


def read_metrics(directory: str | Path) -> list[dict]:
    """Read every step of a run directory's metrics.jsonl. Raises InputError if there is no such file."""
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the directory of a run")
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[str]:
    """The complete lines: a killed run may leave half a line at the end."""
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from (line for line in file if line.endswith("\n"))


def layer_params(config: QwenConfig) -> int:
    """The number of weights in the matrix products of a layer."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size * (heads + 3 * config.intermediate_size)


def forward_flops(config: QwenConfig, lengths: Iterable[int], starts: Iterable[int] | None = None) -> float:
    """FLOPs of the forward pass over sequences of `lengths` tokens: the products with weights, and causal attention
    within each sequence. starts: how many tokens before its first one each sequence sees too; None: none."""
    lengths = np.asarray(list(lengths), np.float64)
    before = np.zeros(len(lengths)) if starts is None else np.asarray(list(starts), np.float64)
    heads = config.num_heads * config.head_dim
    weights = config.num_layers * layer_params(config) + config.vocab_size * config.hidden_size
    # Scores and their product with the values: two FLOPs for each number of a head, query and earlier key.
    seen = config.num_layers * 4 * heads * lengths * (before + (lengths + 1) / 2)
    return float((2 * weights * lengths + seen).sum())


def train_flops(config: QwenConfig, lengths: Iterable[int], starts: Iterable[int] | None = None) -> float:
    """FLOPs of a forward and a backward pass, which has two products for each one of the forward pass."""
    return 3 * forward_flops(config, lengths, starts)


def throughput(tokens: int, seconds: float, mesh: Mesh) -> dict[str, float]:
    """Tokens a second, of all devices of `mesh` together and of one."""
    return {"tokens_per_second": tokens / seconds, "tokens_per_second_per_device": tokens / seconds / mesh.size}


def mfu(flops: float, seconds: float, mesh: Mesh) -> dict[str, float]:
    """The metric `mfu`: model FLOPs over the peak FLOPs of `mesh` in that time. Empty if the peak is unknown."""
    chip = chip_of(mesh.devices.flat[0])
    return {"mfu": flops / (seconds * mesh.size * chip.flops)} if chip else {}
