"""The benchmarks by name. Next: `evaluate.py`, which runs them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rmr1_jax.eval.benchmark import Benchmark
from rmr1_jax.eval.judgebench import JudgeBench
from rmr1_jax.eval.rewardbench import RewardBench
from rmr1_jax.eval.rm_bench import RmBench
from rmr1_jax.eval.rmb import Rmb
from rmr1_jax.eval.scores import Scoring

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {benchmark.name: benchmark for benchmark in (RewardBench(), RmBench(), Rmb(), JudgeBench())}
)


def scoring_of(row: Mapping[str, Any]) -> Scoring:
    """How a judgement row counts: as its benchmark says, or each pair by itself if it is of none."""
    return BENCHMARKS.get((row.get("meta") or {}).get("benchmark"), Scoring())
