"""The rows of a plan: a program's memory, its traffic, and the least time that it needs.

Next: `plan.py` and `judging.py`, which make them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from rmr1_jax.model.config import QwenConfig
from rmr1_jax.plan.compile import Compiled
from rmr1_jax.plan.costs import Cost, decode_cost, grow_cost, prefill_cost, time_bound
from rmr1_jax.plan.sampler import SamplingTask
from rmr1_jax.plan.slice import GIB
from rmr1_jax.sampler.shapes import Shapes

Line = dict[str, Any]

# The settings that reduce memory, those that cost the least speed first.
MEMORY_SETTINGS = (
    "optimizer.mu_dtype=bfloat16",
    "reference_memory=host (GRPO)",
    "optimizer.memory=host (not for the update)",
    "remat=offload",
    "fewer micro_rows, with a larger mesh.tensor if needed",
    "a shorter row_length",
    "a larger slice",
    "for the sampler: a larger sampling_tensor, or a smaller sampling.max_new_tokens",
)


def plan_line(
    name: str,
    compiled: Compiled,
    cost: Cost | None,
    limit: int,
    mesh: Mesh,
    *,
    settings: Sequence[str] = MEMORY_SETTINGS,
) -> Line:
    """Return the row of one program on chips of `limit` bytes; `settings` are listed if it does not fit."""
    gib = {"arguments": compiled.arguments, "temporaries": compiled.temporaries, "code": compiled.code}
    gib |= {"total": compiled.total, "limit": limit}
    traffic, fits = compiled.traffic, compiled.fits(limit)
    bound = time_bound(cost, traffic, mesh.devices.flat[0]) if cost and traffic else None
    line: Line = {"program": name} | {f"{key}_gib": round(value / GIB, 2) for key, value in gib.items()}
    line |= {"fits": fits, "knobs": [] if fits else list(settings)}
    line |= {"compile_s": round(compiled.seconds, 1), "chips": mesh.size}
    line |= {"tokens": cost and cost.tokens, "flops": cost and cost.model_flops}
    line |= {"hardware_flops": cost and cost.flops, "memory_bytes": cost and cost.memory}
    line |= {"collective_bytes": traffic and traffic.links, "network_bytes": traffic and traffic.network}
    return line | {"bound": bound and bound.name, "seconds": bound and bound.seconds, "mfu": bound and bound.mfu}


def sampler_lines(
    config: QwenConfig,
    mesh: Mesh,
    shapes: Shapes,
    task: SamplingTask,
    programs: Mapping[str, Compiled],
    limit: int,
    *,
    settings: Sequence[str] = MEMORY_SETTINGS,
) -> Iterator[Line]:
    """Yield the rows of a sampler's programs, which `sampler.sampler_programs` compiled."""
    costs = {"decode": decode_cost, "prefill": prefill_cost, "grow": grow_cost}
    for name, compiled in programs.items():
        yield plan_line(name, compiled, costs[name](config, mesh, shapes, task), limit, mesh, settings=settings)


def mesh_text(mesh: Mesh) -> str:
    """Return the axes of a mesh that are larger than 1."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
