"""Plans `rmr1 judge` on one host: compiles the sampler's programs in the layout and with the slots that it would have.

The rules are those of a run: `sampler/layout.py` for the mesh, `sampler/shapes.py` for the slots. Next: `sampler.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import PositiveInt

from rmr1_jax.config import build_config, config_dataclass, with_overrides
from rmr1_jax.distributed.mesh import rows_divisor
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen
from rmr1_jax.plan.lines import Line, mesh_text, sampler_lines
from rmr1_jax.plan.sampler import SamplingTask, sampler_programs
from rmr1_jax.plan.slice import GIB, Target
from rmr1_jax.policy import DTYPES
from rmr1_jax.sampler.layout import check_weights_fit, default_slots, layout, weight_bytes
from rmr1_jax.sampler.sample import LONGEST, SamplingConfig
from rmr1_jax.sampler.shapes import Shapes, cache_gib_beside, cache_ways, plan_shapes

MEMORY_SETTINGS = ("slots=N, fewer texts at once", "a larger tensor", "a smaller max_new_tokens or max_prompt_tokens")


@config_dataclass
class JudgingConfig:
    """The settings that decide the programs of a judge. The names are those of the options of `rmr1 judge`.

    model: its name or its directory. max_prompt_tokens, max_new_tokens: the longest prompt and the longest text that
    are expected. slots, tensor: None is the default of `rmr1 judge`. batch_size: pairs that are judged at a time.
    """

    model: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_prompt_tokens: PositiveInt = 4096
    max_new_tokens: PositiveInt = LONGEST
    votes: PositiveInt = 1
    batch_size: PositiveInt = 1024
    slots: PositiveInt | None = None
    tensor: PositiveInt | None = None


def judging_config(model: Path, overrides: Sequence[str]) -> JudgingConfig:
    """Return the settings for judging with a model. Raises InputError for a mistake in the overrides."""
    return build_config(JudgingConfig, with_overrides({"model": str(model)}, overrides), source="rmr1 plan")


def judging_lines(judging: JudgingConfig, model: QwenConfig, target: Target) -> Iterator[Line]:
    """Compile the programs of a judge on one host; yield a row for each.

    Raises:
        InputError: as a run would, if the weights do not fit on the host or leave no memory for one text.
    """
    mesh, task, shapes = judging_shapes(judging, model, target)
    print(f"compiling {model.num_layers} layers, {shapes.banks} x {shapes.slots} slots", file=sys.stderr, flush=True)
    programs = sampler_programs(model, mesh, shapes, task.dtype)
    slots, cache = shapes.banks * shapes.slots, shapes.cache_bytes(model, task.dtype.itemsize)
    facts = {"mesh": f"{mesh_text(mesh)} a host", "rows": slots, "slots": slots}
    facts |= {"cache_gib": round(cache / cache_ways(model, mesh) / GIB, 2)}
    facts |= {"overrides": f"--tensor {mesh.shape['tensor']} --slots {slots}"}
    for line in sampler_lines(model, mesh, shapes, task, programs, target.memory, settings=MEMORY_SETTINGS):
        yield line | facts


def judging_shapes(judging: JudgingConfig, model: QwenConfig, target: Target) -> tuple[Mesh, SamplingTask, Shapes]:
    """Return what `rmr1 judge` has on the devices of the target's host: the mesh, the sampler's work and its shapes."""
    module, dtype = Qwen(model), jnp.dtype(DTYPES[judging.dtype])
    mesh = layout(module, dtype, target.host, target.memory, judging.tensor)
    check_weights_fit(module, dtype, mesh, target.memory)
    slots = default_slots(mesh) if judging.slots is None else judging.slots
    sampling = SamplingConfig(n=judging.votes, max_new_tokens=judging.max_new_tokens, slots=slots)
    task = SamplingTask(sampling, judging.batch_size, judging.max_prompt_tokens, dtype)
    free = cache_gib_beside(target.memory - weight_bytes(module, mesh, dtype), mesh, model)
    sizes = {"prompts": task.prompts, "longest": task.max_prompt_length, "banks": rows_divisor(mesh)}
    return mesh, task, plan_shapes(model, sampling, **sizes, itemsize=dtype.itemsize, free_gib=free)
