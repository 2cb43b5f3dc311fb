"""Estimates the memory and time of a run on a TPU slice that you do not have, by compiling its programs on a CPU.

No program runs: the sizes are the compiler's, the times come from formulas. Next: `slice.py` and `compile.py`, then
`train.py` and `sampler.py` for the programs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rmr1_jax.config import load_config, read_yaml
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen
from rmr1_jax.plan.compile import Compiled
from rmr1_jax.plan.costs import forward_cost, update_cost
from rmr1_jax.plan.judging import JudgingConfig, judging_config, judging_lines
from rmr1_jax.plan.lines import Line, mesh_text, plan_line, sampler_lines
from rmr1_jax.plan.model import model_shape
from rmr1_jax.plan.sampler import SamplingTask, fit_slots
from rmr1_jax.plan.slice import GIB, Target, slice_target
from rmr1_jax.plan.traffic import COLLECTIVES
from rmr1_jax.plan.train import (
    Config,
    Lengths,
    batch_shape,
    mean_lengths,
    resident_bytes,
    training_mesh,
    training_programs,
)
from rmr1_jax.policy import DTYPES
from rmr1_jax.sampler.layout import layout, weight_bytes
from rmr1_jax.sampler.shapes import cache_ways
from rmr1_jax.train.config import GrpoConfig, SftConfig

COLUMNS = ("program", "mesh", "rows", "arguments", "temporaries", "total", "of", "fits", "compile", "TFLOP")
COLUMNS += (*COLLECTIVES, "bound", "seconds", "MFU")


def print_plan(
    path: Path,
    overrides: Sequence[str],
    *,
    topology: str,
    slices: int,
    sampler_only: bool,
    as_json: bool,
    lengths: Lengths | None = None,
) -> None:
    """Print the plan of a run (`rmr1 plan`), as a table with remarks or as a JSON list. With `sampler_only`, `path` may
    be a model: then the plan is that of `rmr1 judge`. lengths: of the texts of a GRPO run; None: half of the largest.

    Raises:
        InputError: a mistake in the config, or in the name of the model or the slice; libtpu is not installed; no mesh
            divides the rows; or `sampler_only` for a run that does not sample.
    """
    jax.config.update("jax_platforms", "cpu")  # do not occupy a TPU of this machine
    jax.config.update("jax_enable_compilation_cache", False)  # compile times would be those of reading files
    judging = sampler_only and path.suffix not in (".yaml", ".yml")
    config = judging_config(path, overrides) if judging else read_run(path, overrides)
    if sampler_only and isinstance(config, SftConfig):
        raise InputError(
            f"--sampler-only: {path} is an SFT run, which does not sample; give the config of a GRPO run, or a model"
        )
    model, target = model_shape(config.model), slice_target(topology, slices)
    if isinstance(config, JudgingConfig):
        lines = judging_lines(config, model, target)
    else:
        lines = plan(config, model, target, sampler_only=sampler_only, lengths=lengths)
    lines = ({"topology": topology, "slices": slices} | line for line in lines)
    if as_json:
        print(json.dumps(list(lines), indent=1))
        return
    for text in table(config, lines, lengths):
        print(text, flush=True)


def read_run(path: Path, overrides: Sequence[str]) -> Config:
    """Read the config of an SFT or a GRPO run; the keys tell which it is. Raises InputError as `load_config`, or if all
    keys belong to both kinds of run."""
    sft, grpo = ({f.name for f in dataclasses.fields(kind)} for kind in (SftConfig, GrpoConfig))
    keys = {o.partition("=")[0].split(".")[0] for o in overrides} | set(read_yaml(path))
    of_grpo = len(keys & (grpo - sft)) - len(keys & (sft - grpo))
    if not of_grpo:
        raise InputError(f"{path}: SFT or GRPO? All keys belong to both; add rows_per_step or prompts_per_step")
    return load_config(GrpoConfig if of_grpo > 0 else SftConfig, path, overrides)


def plan(
    config: Config,
    model: QwenConfig,
    target: Target,
    *,
    sampler_only: bool = False,
    lengths: Lengths | None = None,
) -> Iterator[Line]:
    """Compile the programs of a run, or with `sampler_only` those of a GRPO run's sampler without the data of training
    in memory; yield one line for each."""
    mesh = training_mesh(config, model, target.devices, target.slices)
    shape = batch_shape(config, lengths)
    overrides = " ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items())
    facts = {"mesh": mesh_text(mesh), "rows": shape.rows, "overrides": overrides}
    for name, compiled in () if sampler_only else training_programs(config, model, mesh, shape):
        cost = update_cost if name.endswith("update") else forward_cost
        yield plan_line(name, compiled, cost(config, model, mesh, shape), target.memory, mesh) | facts
    if isinstance(config, GrpoConfig):
        resident = 0 if sampler_only else resident_bytes(config, model, mesh)
        yield from _sampler_lines(config, model, mesh, target, resident, overrides)


def _sampler_lines(
    config: GrpoConfig, model: QwenConfig, mesh: Mesh, target: Target, resident: int, overrides: str
) -> Iterator[Line]:
    """Yield the sampler's lines. resident: bytes per chip of training's data, which stays there during sampling."""
    dtype, limit = jnp.dtype(DTYPES[config.dtype]), target.memory
    local = layout(Qwen(model), dtype, target.host, limit - resident, config.sampling_tensor)
    hosts = mesh.size // local.size
    budget = config.sampling.cache_gib and config.sampling.cache_gib / hosts
    sampling = dataclasses.replace(config.sampling, cache_gib=budget)
    task = SamplingTask(sampling, -(-config.prompts_per_step // hosts), config.max_prompt_length, dtype)
    facts: Line = {"mesh": f"{mesh_text(local)} a host", "rows": 0, "slots": 0}
    overrides += f" sampling_tensor={local.shape['tensor']}"
    try:
        shapes, programs = fit_slots(model, local, task, limit, resident=resident)
    except InputError:
        held = Compiled(resident + weight_bytes(Qwen(model), local, dtype), 0, 0, 0.0, None)
        yield plan_line("decode", held, None, limit, local) | facts | {"overrides": overrides}
        return
    slots = hosts * shapes.banks * shapes.slots
    cache = shapes.cache_bytes(model, dtype.itemsize)
    cache_gib = math.ceil(hosts * cache / GIB * 1000) / 1000  # rounded up, or a slot would be lost
    overrides += f" sampling.slots={slots} sampling.cache_gib={cache_gib:g}"
    facts |= {"rows": slots, "slots": slots, "cache_gib": round(cache / cache_ways(model, local) / GIB, 2)}
    for line in sampler_lines(model, local, shapes, task, programs, limit):
        yield line | facts | {"overrides": overrides}


def table(config: Config | JudgingConfig, lines: Iterable[Line], lengths: Lengths | None = None) -> Iterator[str]:
    """Yield the plan as text: a row as soon as its line is there, then remarks."""
    widths = [18, 24] + [max(len(name), 8) for name in COLUMNS[2:]]
    done = []
    for line in lines:
        for cells in ([COLUMNS] if not done else []) + [_cells(line)]:
            yield "  ".join(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))
        done.append(line)
    yield ""
    yield from _remarks(config, done, lengths)


def _cells(line: Line) -> list[Any]:
    traffic = line["collective_bytes"] or {}
    cells = [line["program"], line["mesh"], line["rows"]]
    cells += [f"{line[f'{key}_gib']:.2f}" for key in ("arguments", "temporaries", "total", "limit")]
    cells += ["yes" if line["fits"] else "NO", f"{line['compile_s']:.0f} s", _number(line["flops"], 1e12)]
    cells += [_number(traffic.get(kind), GIB) for kind in COLLECTIVES]
    return [*cells, line["bound"] or "?", _number(line["seconds"], 1), _number(line["mfu"], 0.01) + " %"]


def _number(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:.3g}"


def _remarks(config: Config | JudgingConfig, lines: Sequence[Line], lengths: Lengths | None) -> Iterator[str]:
    yield "Compiled, not run. Memory and bytes between chips are in GiB per chip, TFLOP are of one call on all chips."
    yield "The time is a lower bound: the longest of those for compute, memory and links, each at its peak speed."
    if getattr(config, "short_rows", None):
        yield "The plan does not know short_row_length: it is that of rows of row_length alone, which take more memory."
    if any(line["program"] == "grpo_update" for line in lines):
        yield from _row_remarks(config, lengths)
    too_large = [line for line in lines if not line["fits"]]
    for line in too_large:
        excess = max(0.0, line["total_gib"] - line["limit_gib"])
        yield f"{line['program']} does not fit: {excess:.2f} GiB per chip too much."
    if too_large:
        yield "Settings that reduce memory, those that cost the least speed first:"
        yield from (f"  {setting}" for setting in too_large[0]["knobs"])
    yield f"Settings of this plan: {lines[-1]['overrides']}"


def _row_remarks(config: GrpoConfig, lengths: Lengths | None) -> Iterator[str]:
    (prompt, response), rows = lengths or mean_lengths(config), batch_shape(config, lengths).rows
    yield (
        f"An update has {rows} rows: {config.mini_batch_prompts} prompts of {prompt} tokens with {config.sampling.n} "
        f"responses of {response}, {'as given' if lengths else 'half of the largest lengths'}, packed without gaps."
    )
    shared, separate = (
        config.updates_per_step * batch_shape(dataclasses.replace(config, share_prompts=share), lengths).tokens
        for share in (True, False)
    )
    ratio = shared / separate
    yield f"A step trains {shared:,} positions with share_prompts, {separate:,} without: {ratio:.2f} times as many."
