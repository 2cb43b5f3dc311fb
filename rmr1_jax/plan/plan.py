"""What a run takes on a TPU slice that is not there: its own programs, compiled for the slice on a CPU.

`plan()` compiles and gives one line a program: memory against the chip's, FLOPs, bytes between chips, and the time that
these bound. Nothing runs: the sizes are the compiler's, the times are bounds by formula. Read `plan_train.py` and
`plan_sampler.py` for the programs, `plan_costs.py` for the formulas, `plan_knobs.py` for what helps where it is too
much.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from jax.sharding import Mesh

from rmr1_jax.config import load_config
from rmr1_jax.distributed.mesh import rows_divisor
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.plan.compile import Compiled, bytes_here
from rmr1_jax.plan.costs import Cost, decode_cost, grow_cost, prefill_cost, time_bound
from rmr1_jax.plan.model import model_shape
from rmr1_jax.plan.sampler import Demand, fit, host_mesh, weight_bytes
from rmr1_jax.plan.slice import GIB, host_devices, memory_limit, slice_devices
from rmr1_jax.plan.traffic import KINDS
from rmr1_jax.plan.train import (
    Config,
    mean_length,
    reference_bytes,
    resident_bytes,
    rows_of,
    training_mesh,
    training_programs,
    weights,
)
from rmr1_jax.policy import DTYPES
from rmr1_jax.sampler.shapes import Shapes, cache_ways
from rmr1_jax.train.config import GrpoConfig, SftConfig


def training_knobs(
    config: Config, model: QwenConfig, mesh: Mesh, compiled: Compiled, over: int, *, update: bool
) -> list[str]:
    """Settings that make room for a program of training, the cheapest in speed first. over: bytes too much. update:
    whether it is the update, which has the moments on the chip wherever they lie otherwise."""
    knobs = [*_resident_knobs(config, model, mesh, update), *_activation_knobs(config, model, mesh, compiled)]
    return _texts(knobs, over)


def sampling_knobs(config: GrpoConfig, model: QwenConfig, mesh: Mesh, local: Mesh, limit: int) -> list[str]:
    """Settings that make room for the sampler beside training. mesh: of training; local: of the sampler on a host."""
    knobs = list(_resident_knobs(config, model, mesh, update=False))
    tensor = local.shape["tensor"]
    if local.size % (2 * tensor) == 0:
        dtype = DTYPES[config.dtype]
        knobs.append((f"sampling_tensor={2 * tensor}", weight_bytes(model, local, dtype) / 2))
    return [
        *_texts(knobs, limit),
        f"sampling.max_new_tokens below {config.sampling.max_new_tokens}: a slot has as many columns in the cache",
    ]


def _resident_knobs(config: Config, model: QwenConfig, mesh: Mesh, update: bool) -> Iterator[tuple[str, float]]:
    """What can lie elsewhere than on the chips, or in fewer bytes."""
    float32 = bytes_here(weights(model, mesh, jnp.float32))
    if isinstance(config, GrpoConfig) and (reference := reference_bytes(config, model, mesh)):
        yield "reference_memory=host", reference
    if config.optimizer.mu_dtype == "float32" and config.optimizer.memory == "device":
        yield "optimizer.mu_dtype=bfloat16", float32 / 2
    if config.optimizer.memory == "device" and not update:
        yield "optimizer.memory=host", (1.5 + 0.5 * (config.optimizer.mu_dtype == "float32")) * float32


def _activation_knobs(config: Config, model: QwenConfig, mesh: Mesh, compiled: Compiled) -> Iterator[tuple[str, float]]:
    rows, shards = rows_of(config), rows_divisor(mesh)
    mine = rows.micro // shards
    kept = model.num_layers * mine * rows.length * model.hidden_size * jnp.dtype(DTYPES[config.dtype]).itemsize
    moving = compiled.temporaries - kept  # a layer at work, the head, gradients: part of it goes with the rows
    if config.remat in ("none", "dots"):
        wide = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + 3 * model.intermediate_size
        yield "remat=full", kept * wide / model.hidden_size / mesh.shape["tensor"]
    elif config.remat == "full":
        yield "remat=offload", kept
    if mine > 1:
        yield f"micro_rows={shards} (one row a chip)", (kept + moving / 2) * (1 - 1 / mine)
    else:
        yield f"mesh.tensor={2 * mesh.shape['tensor']} micro_rows={max(1, rows.micro // 2)}", moving / 2
    if not isinstance(config, GrpoConfig):
        yield f"row_length={rows.length // 2}", (kept + moving / 2) / 2
    params = bytes_here(weights(model, mesh, jnp.float32))
    yield "a slice of twice as many chips", 2 * params


def _texts(knobs: list[tuple[str, float]], over: float) -> list[str]:
    enough = {True: ", enough by itself", False: ""}
    return [f"{name}: about {saved / GIB:.2f} GiB less{enough[saved >= over]}" for name, saved in knobs]


Line = dict[str, Any]


def print_plan(
    path: Path,
    overrides: Sequence[str],
    *,
    topology: str,
    slices: int = 1,
    sampler_only: bool = False,
    as_json: bool = False,
) -> None:
    """`rmr1 plan`: a table and what to do, or with `as_json` a list of objects. sampler_only: see `plan`.

    Raises:
        InputError: in the config, the model's name or the slice's; no libtpu; rows and devices that do not divide;
            the sampler alone of a run that does not sample.
    """
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is not to be taken
    jax.config.update("jax_enable_compilation_cache", False)  # a program from there would have taken no time
    config = read_run(path, overrides)
    if sampler_only and not isinstance(config, GrpoConfig):
        raise InputError(f"--sampler-only: {path} is an SFT run, which does not sample; give the config of a GRPO run")
    model = model_shape(config.model)
    devices = slice_devices(topology, slices)
    host = host_devices(topology, devices)
    limit = memory_limit(host[0])
    lines = plan(config, model, devices, host, slices=slices, limit=limit, sampler_only=sampler_only)
    lines = ({"topology": topology, "slices": slices} | line for line in lines)
    if as_json:
        print(json.dumps(list(lines), indent=1))
        return
    for text in table(config, lines):
        print(text, flush=True)


def read_run(path: Path, overrides: Sequence[str]) -> Config:
    """The config of an SFT or a GRPO run; which of them, its keys say.

    Raises:
        InputError: as `load_config`; or the keys fit both.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return load_config(SftConfig, path, overrides)  # says what is wrong with the file
    sft, grpo = ({f.name for f in dataclasses.fields(kind)} for kind in (SftConfig, GrpoConfig))
    keys = {o.partition("=")[0].split(".")[0] for o in overrides} | set(tree if isinstance(tree, dict) else ())
    of_grpo = len(keys & (grpo - sft)) - len(keys & (sft - grpo))
    if not of_grpo and isinstance(tree, dict):
        raise InputError(
            f"{path}: SFT or GRPO? It has no key of one of them alone; say rows_per_step or prompts_per_step"
        )
    return load_config(GrpoConfig if of_grpo > 0 else SftConfig, path, overrides)


def plan(
    config: Config,
    model: QwenConfig,
    devices: Sequence[jax.Device],
    host: Sequence[jax.Device],
    *,
    limit: int,
    slices: int = 1,
    sampler_only: bool = False,
) -> Iterator[Line]:
    """One line a program of the run, compiled for devices of a topology description, or for any that are there.

    Args:
        devices: for training. host: for the sampler, which stays within a host: as many as one has.
        limit: bytes of memory a chip has. sampler_only: a GRPO run's sampler, with nothing of training beside it.
    """
    mesh = training_mesh(config, model, list(devices), slices)
    rows, shape = rows_of(config), mesh_text(mesh)
    overrides = mesh_overrides(mesh)
    for name, compiled, cost in () if sampler_only else training_programs(config, model, mesh):
        line = _line(name, compiled, cost, limit, mesh)
        over, update = compiled.total - limit, name.endswith("update")
        knobs = [] if line["fits"] else training_knobs(config, model, mesh, compiled, over, update=update)
        yield line | {"mesh": shape, "rows": rows.count * rows.micro, "knobs": knobs, "overrides": overrides}
    if isinstance(config, GrpoConfig):
        resident = 0 if sampler_only else resident_bytes(config, model, mesh)
        yield from _sampler_lines(config, model, mesh, host, limit, overrides, resident)


def mesh_overrides(mesh: Mesh) -> str:
    return " ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items())


def mesh_text(mesh: Mesh) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def _sampler_lines(
    config: GrpoConfig,
    model: QwenConfig,
    mesh: Mesh,
    host: Sequence[jax.Device],
    limit: int,
    overrides: str,
    resident: int,
) -> Iterator[Line]:
    """resident: bytes a chip of the policy, its moments and the reference, which stay while samples are drawn."""
    dtype = jnp.dtype(DTYPES[config.dtype])
    local = host_mesh(model, host, limit, dtype, resident=resident, tensor=config.sampling_tensor)
    hosts = mesh.size // local.size
    budget = config.sampling.cache_gib and config.sampling.cache_gib / hosts
    sampling = dataclasses.replace(config.sampling, cache_gib=budget)
    demand = Demand(sampling, -(-config.prompts_per_step // hosts), config.max_prompt_length, dtype)
    facts: Line = {"mesh": f"{mesh_text(local)} a host", "rows": 0, "slots": 0}
    overrides += f" sampling_tensor={local.shape['tensor']}"
    try:
        shapes, programs = fit(model, local, demand, limit, resident=resident)
    except InputError:
        held = Compiled(resident + weight_bytes(model, local, dtype), 0, 0, 0.0, None)
        knobs = sampling_knobs(config, model, mesh, local, limit)
        yield _line("decode", held, None, limit, local) | facts | {"knobs": knobs, "overrides": overrides}
        return
    slots = hosts * shapes.banks * shapes.slots
    cache = shapes.cache_bytes(model, dtype.itemsize)
    # Rounded up, or a slot would be lost.
    overrides += f" sampling.slots={slots} sampling.cache_gib={math.ceil(hosts * cache / GIB * 1000) / 1000:g}"
    facts |= {"rows": slots, "slots": slots, "cache_gib": round(cache / cache_ways(model, local) / GIB, 2)}
    costs = _sampler_costs(config, model, local, shapes, dtype.itemsize)
    for name, compiled in programs.items():
        line = _line(name, compiled, costs[name](), limit, local)
        knobs = [] if line["fits"] else sampling_knobs(config, model, mesh, local, limit)
        yield line | facts | {"knobs": knobs, "overrides": overrides}


def _sampler_costs(
    config: GrpoConfig, model: QwenConfig, mesh: Mesh, shapes: Shapes, itemsize: int
) -> dict[str, Callable[[], Cost]]:
    ways = cache_ways(model, mesh)
    longest = config.max_prompt_length
    return {
        "decode": lambda: decode_cost(model, mesh, shapes, config.sampling, longest, itemsize, ways),
        "prefill": lambda: prefill_cost(model, mesh, shapes, itemsize, ways),
        "grow": lambda: grow_cost(model, mesh, shapes, itemsize, ways),
    }


def _line(name: str, compiled: Compiled, cost: Cost | None, limit: int, mesh: Mesh) -> Line:
    gib = {"arguments": compiled.arguments, "temporaries": compiled.temporaries, "code": compiled.code}
    line: Line = {"program": name} | {f"{key}_gib": round(value / GIB, 2) for key, value in gib.items()}
    line |= {"total_gib": round(compiled.total / GIB, 2), "limit_gib": round(limit / GIB, 2)}
    line |= {"fits": compiled.fits(limit), "compile_s": round(compiled.seconds, 1), "chips": mesh.size}
    traffic = compiled.traffic
    known = cost is not None and traffic is not None
    bound = time_bound(cost, traffic, mesh.devices.flat[0]) if known else None
    line |= {
        "tokens": cost.tokens if cost else None,
        "flops": cost.model_flops if cost else None,
        "hardware_flops": cost.flops if cost else None,
        "memory_bytes": cost.memory if cost else None,
        "collective_bytes": traffic.links if traffic else None,
        "network_bytes": traffic.slices if traffic else None,
        "bound": bound.name if bound else None,
        "seconds": bound.seconds if bound else None,
        "mfu": bound.mfu if bound else None,
    }
    return line


COLUMNS = ("program", "mesh", "rows", "arguments", "temporaries", "total", "of", "fits", "compile", "TFLOP")


COLUMNS += (*KINDS, "bound", "seconds", "MFU")


def table(config: Config, lines: Iterable[Line]) -> Iterator[str]:
    """The plan as text: a row as soon as its line is there, then what does not fit and how to call the run."""
    widths = [18, 24] + [max(len(name), 8) for name in COLUMNS[2:]]
    done = []
    for line in lines:
        for cells in ([COLUMNS] if not done else []) + [_cells(line)]:
            yield "  ".join(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))
        done.append(line)
    yield ""
    yield from _remarks(config, done)


def _cells(line: Line) -> list[Any]:
    """Memory and bytes between chips in GiB a chip, FLOPs of a call on all chips."""
    traffic = line["collective_bytes"] or {}
    cells = [line["program"], line["mesh"], line["rows"]]
    cells += [f"{line[f'{key}_gib']:.2f}" for key in ("arguments", "temporaries", "total", "limit")]
    cells += ["yes" if line["fits"] else "NO", f"{line['compile_s']:.0f} s", _number(line["flops"], 1e12)]
    cells += [_number(traffic.get(kind), GIB) for kind in KINDS]
    cells += [line["bound"] or "?", _number(line["seconds"], 1), _number(line["mfu"], 0.01) + " %"]
    return cells


def _number(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:.3g}"


def _remarks(config: Config, lines: Sequence[Line]) -> Iterator[str]:
    yield "Compiled, not run. Memory and bytes between chips: GiB a chip. TFLOP: of one call on all its chips. The time"
    yield "is a bound: the largest of compute, memory and links, where nothing waits for anything else."
    if any(line["program"] == "grpo_update" for line in lines):
        rows = rows_of(config)
        yield (
            f"An update's {rows.count * rows.micro} rows: {config.mini_batch_prompts} x {config.sampling.n} texts of "
            f"{mean_length(config)} tokens, half of the longest, packed without gaps."
        )
    for line in lines:
        if not line["fits"]:
            over = line["total_gib"] - line["limit_gib"]
            yield f"{line['program']} does not fit: {max(0.0, over):.2f} GiB a chip too much. What would help:"
            yield from (f"  {knob}" for knob in line["knobs"])
    yield f"The run: {lines[-1]['overrides']}"
