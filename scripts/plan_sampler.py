"""Compile the sampler's programs for TPU slices that are not there, and say how many samples each holds in flight.

    python scripts/plan_sampler.py --model 7b 32b --topology v5e:4x4 v6e:4x4 v5p:2x2x2

Runs on a CPU, and needs libtpu in an environment of its own (with libtpu, jax looks for a TPU wherever it is imported):

    python3 -m venv .venv-tpu && .venv-tpu/bin/pip install -e '.[tpu]'

The mesh follows from a rule, data-parallel replicas before tensor parallelism. The slots follow from the memory that is
left beside the weights; what the compiler then says decides. Nothing runs: these are sizes, not speeds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tyro.conf import FlagCreatePairsOff

from rmr1_jax.errors import InputError
from rmr1_jax.mesh import MeshConfig, activation_sharding, make_mesh, rows_divisor
from rmr1_jax.model.cache import Cache
from rmr1_jax.model.config import QwenConfig, parse_config, read_config
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.config import SamplingConfig
from rmr1_jax.sampler.run import make_controls, to_slots
from rmr1_jax.sampler.schedule import Bank
from rmr1_jax.sampler.shapes import CHUNKS, PREFILL_ROWS, Shapes, plan_shapes

GIB = 2**30
WEIGHTS_SHARE = 0.5  # of a chip's memory, at most, before the tensor axis is made larger
MANY = 1024  # slots and prompts a bank: more than any chip holds

# Width, MLP width, layers, heads, key-value heads, vocabulary, tied. Qwen2.5, and R1's distillations of the same sizes.
MODELS = {
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """How many samples a TPU slice holds in flight, by compiling the sampler's programs for it."""

    model: tuple[str, ...] = ("7b", "32b")
    """1.5b, 7b, 14b, 32b, or the path of a config.json; several may be given."""
    topology: tuple[str, ...] = ("v5e:4x4", "v6e:4x4", "v5p:2x2x2")
    """Slices; several may be given."""
    prompt_length: int = 4096
    """Tokens of the longest prompt."""
    max_new: int = 8192
    """New tokens a sample at most."""
    group: int = 7
    """Samples of each prompt."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights and the cache."""
    json: bool = False
    """Print one JSON object a program instead of a table."""

    def run(self) -> None:
        if self.prompt_length < 1:
            raise InputError(f"--prompt-length {self.prompt_length} must be at least 1")
        sampling = SamplingConfig(n=self.group, max_new_tokens=self.max_new)
        configs = {name: model_config(name) for name in self.model}
        slices = {name: slice_devices(name) for name in self.topology}
        widths: dict[str, int] = {}
        for model, config in configs.items():
            for topology, devices in slices.items():
                for line in plan(config, devices, sampling, self.prompt_length, jnp.dtype(self.dtype)):
                    line = {"model": model, "topology": topology} | line
                    if not self.json and not widths:
                        widths = {key: max(len(key), len(str(value)) + 3) for key, value in line.items()}
                        print("  ".join(key.rjust(width) for key, width in widths.items()))
                    text = "  ".join(str(value).rjust(widths.get(key, 0)) for key, value in line.items())
                    print(json.dumps(line) if self.json else text, flush=True)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What lies on a chip while a program runs, in bytes.

    arguments: the weights and the cache, whether this program reads them or not. temporaries: what it needs beside
    them. code: its own. compiled: False where the compiler refused, for lack of memory. seconds: to compile.
    """

    arguments: int
    temporaries: int
    code: int
    compiled: bool
    seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def plan(
    config: QwenConfig, devices: Sequence[jax.Device], sampling: SamplingConfig, longest: int, dtype
) -> Iterator[dict[str, Any]]:
    """One line a program, at the largest number of slots at which all of them fit; where not even one slot is left
    room by the weights, one line for these."""
    limit = memory_limit(devices[0])
    mesh = sampling_mesh(config, devices, limit, dtype)
    try:
        shapes, memory = fit(config, mesh, sampling, longest, dtype, limit, on_try=say)
        slots, cache = shapes.banks * shapes.slots, shapes.cache_bytes(config, dtype.itemsize)
    except InputError:
        slots, cache, memory = 0, 0, {"weights": Memory(weight_bytes(config, mesh, dtype), 0, 0, False, 0.0)}
    for program, m in memory.items():
        yield {
            "mesh": " ".join(f"{axis}={mesh.shape[axis]}" for axis in ("fsdp", "tensor")),
            "slots": slots,
            "cache_gib": round(cache / GIB, 2),
            "program": program,
            "arguments_gib": round(m.arguments / GIB, 2),
            "temporaries_gib": round(m.temporaries / GIB, 2),
            "total_gib": round(m.total / GIB, 2),
            "limit_gib": round(limit / GIB, 2),
            "fits": m.compiled and m.total <= limit,
            "compile_s": round(m.seconds, 1),
        }


def fit(
    config: QwenConfig,
    mesh: Mesh,
    sampling: SamplingConfig,
    longest: int,
    dtype,
    limit: int,
    *,
    on_try: Callable[[Shapes, QwenConfig], None] = lambda *_: None,
) -> tuple[Shapes, dict[str, Memory]]:
    """The most slots at which every program fits in `limit` bytes a chip, and what the programs take there.

    A model of two layers tells first what the programs need beside weights and cache; from then on it is the last try
    that did not fit. Where not even one slot does, that try is returned.

    Raises:
        InputError: the weights and what the programs need leave no room for one slot.
    """
    banks, ways = rows_divisor(mesh), cache_ways(config, mesh)

    def shapes_beside(used: int) -> Shapes:
        room = max(limit - used, 1) * ways / GIB
        asked = dataclasses.replace(sampling, slots=MANY * banks, cache_gib=room)
        return plan_shapes(config, asked, prompts=MANY * banks, longest=longest, banks=banks, itemsize=dtype.itemsize)

    def used_beside(config: QwenConfig, shapes: Shapes, memory: dict[str, Memory]) -> int:
        return max(m.total for m in memory.values()) - shapes.cache_bytes(config, dtype.itemsize) // ways

    shallow, weights = dataclasses.replace(config, num_layers=2), weight_bytes(config, mesh, dtype)
    shapes = shapes_beside(weights)
    on_try(shapes, shallow)
    memory = sampler_memory(shallow, mesh, shapes, dtype)
    used = weights + used_beside(shallow, shapes, memory) - weight_bytes(shallow, mesh, dtype)
    best = None
    while True:
        try:
            shapes = shapes_beside(used)
        except InputError:
            if best is None:
                raise
            return best
        on_try(shapes, config)
        memory = sampler_memory(config, mesh, shapes, dtype)
        best = shapes, memory
        if all(m.compiled and m.total <= limit for m in memory.values()):
            return best
        # At least a byte less for the cache than now, or the same shapes would come again.
        used = max(used_beside(config, shapes, memory), limit + 1 - shapes.cache_bytes(config, dtype.itemsize) // ways)


def say(shapes: Shapes, config: QwenConfig) -> None:
    print(f"compiling {config.num_layers} layers, {shapes.banks} x {shapes.slots} slots", file=sys.stderr, flush=True)


def sampler_memory(config: QwenConfig, mesh: Mesh, shapes: Shapes, dtype) -> dict[str, Memory]:
    """Compile decode, prefill and the last growth of the rings for the mesh's devices, at the largest cache.

    Args:
        mesh: over devices that are there, or over those of a topology description.
    """
    with jax.set_mesh(mesh):
        size = max(shapes.sizes, key=lambda s: s[0] * shapes.widths[-1] + s[1] * shapes.room)
        weights = programs.weight_shapes(config, mesh, dtype)
        cache = abstract_cache(config, mesh, shapes, size, shapes.widths[-1], dtype)
        held = _bytes_here((weights, cache))
        idle = [Bank(*size) for _ in range(shapes.banks)]
        controls = _abstract(make_controls(SamplingConfig(), ()), NamedSharding(mesh, PartitionSpec()))
        by_bank = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
        slots = _abstract(to_slots(idle, [0] * shapes.banks), by_bank)
        memory = {"decode": _compile(programs.decode.lower(config, weights, controls, cache, slots), held)}

        per_prompt = np.zeros((shapes.banks, PREFILL_ROWS), np.int32)
        tokens = np.zeros((*per_prompt.shape, max(c for c in CHUNKS if c <= shapes.room)), np.int32)
        chunk = _abstract((tokens, per_prompt, per_prompt, per_prompt > 0), by_bank)
        memory["prefill"] = _compile(
            programs.prefill_prompts.lower(config, weights, cache._replace(own_k=[], own_v=[]), *chunk), held
        )

        if len(shapes.widths) > 1:
            grow = jax.jit(lambda layer: programs.grow(layer, width=shapes.widths[-1]))
            old = _first_layer(abstract_cache(config, mesh, shapes, size, shapes.widths[-2], dtype))
            # One layer at a time: beside the new cache, the last layer of which is being made, lie its old rings.
            beside = _bytes_here(old) - _bytes_here(_first_layer(cache))
            memory["grow"] = _compile(grow.lower(old), held, beside)
    # The engine keeps a decode program for every width and number of rows, and their code lies on the chip too.
    decodes, prefills = len(shapes.widths) * len(shapes.sizes), 2 * len(CHUNKS)
    code = decodes * memory["decode"].code + prefills * memory["prefill"].code
    return {name: dataclasses.replace(m, arguments=m.arguments + code) for name, m in memory.items()}


def _compile(lowered: jax.stages.Lowered, held: int, beside: int = 0) -> Memory:
    """held: bytes a chip of the weights and the cache. beside: of what else lies there, but the program's own."""
    start = time.perf_counter()
    try:
        m = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        needed, _ = _overflow(e)
        return Memory(held, max(0, needed - held), 0, False, time.perf_counter() - start)
    # What the program does not read is no argument of it; padding makes arguments larger than their shapes.
    padding = max(0, m.argument_size_in_bytes - held)
    temporaries = m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + padding + beside
    return Memory(held, temporaries, m.generated_code_size_in_bytes, True, time.perf_counter() - start)


def _abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes in the place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _first_layer(cache: Cache) -> Cache:
    return Cache(*(part[:1] for part in cache))


def abstract_cache(
    config: QwenConfig, mesh: Mesh, shapes: Shapes, size: tuple[int, int, int], width: int, dtype
) -> Cache:
    """What `programs.empty_cache` makes, without making it. size: one of `shapes.sizes`."""
    slots, entries, _ = size
    sizes = {"banks": shapes.banks, "entries": entries, "room": shapes.room, "slots": slots, "width": width}
    cache = jax.eval_shape(lambda: programs.empty_cache(config, **sizes, dtype=dtype))
    shape = cache.own_k[0].shape
    return _abstract(cache, activation_sharding(mesh, "BKCC", shape))


def sampling_mesh(config: QwenConfig, devices: Sequence[jax.Device], limit: int, dtype) -> Mesh:
    """Data-parallel replicas before tensor parallelism: the smallest tensor axis at which the weights take no more than
    half of a chip. Axes that divide the key-value heads first, as with others every chip has the whole cache."""
    sizes = [t for t in range(1, len(devices) + 1) if len(devices) % t == 0]
    sizes.sort(key=lambda t: config.num_kv_heads % t != 0)
    for tensor in sizes:
        mesh = make_mesh(MeshConfig(tensor=tensor), devices)
        if weight_bytes(config, mesh, dtype) <= WEIGHTS_SHARE * limit:
            break
    return mesh


def weight_bytes(config: QwenConfig, mesh: Mesh, dtype) -> int:
    """Of the sampling weights on one chip."""
    return _bytes_here(programs.weight_shapes(config, mesh, dtype))


def cache_ways(config: QwenConfig, mesh: Mesh) -> int:
    """Over how many chips the cache of all banks is split."""
    tensor = mesh.shape["tensor"]
    return rows_divisor(mesh) * (tensor if config.num_kv_heads % tensor == 0 else 1)


def _bytes_here(tree: Any) -> int:
    """Of the arrays' parts on one chip."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_limit(device: jax.Device) -> int:
    """A chip's memory in bytes, which the compiler tells when it is asked for too much."""
    sharding = NamedSharding(Mesh([device], "x"), PartitionSpec())
    too_much = jax.ShapeDtypeStruct((2**20, 2**30), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: x[0]).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as e:
        return _overflow(e)[1]
    raise AssertionError(f"{device.device_kind} took a petabyte")


def _overflow(error: Exception) -> tuple[int, int]:
    """The bytes (needed, available) that a compiler's out-of-memory error tells; any other error is raised again."""
    size = r"([\d.]+)([KMGTP])"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)|Used {size} of {size} hbm", str(error))
    if not found:
        raise error
    units = {unit: 2 ** (10 * (i + 1)) for i, unit in enumerate("KMGTP")}
    needed, needed_unit, available, unit = (x for x in found.groups() if x)
    return int(float(needed) * units[needed_unit]), int(float(available) * units[unit])


def slice_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice that is not there.

    Raises:
        InputError: no libtpu, or not a slice that it knows.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "compiling for a TPU needs libtpu, which is not installed here; make an environment for it: "
            "python3 -m venv .venv-tpu && .venv-tpu/bin/pip install -e '.[tpu]'"
        )
    # libtpu reads these when it is loaded. Without them it asks the network for a TPU, and locks out a second process.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.update(settings)
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"\w+:1(x1)*", topology) else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **one_chip).devices
    except jax.errors.JaxRuntimeError as e:
        raise InputError(
            f"--topology {topology}: {e}; expected a slice as v5e:4x4, v6e:16x16 (two dimensions) or v5p:2x2x2 (three)"
        ) from None


def model_config(name: str) -> QwenConfig:
    """A Qwen2.5 by its size, or from a config.json or the folder that holds one."""
    if name in MODELS:
        width, mlp, layers, heads, kv_heads, vocab, tied = MODELS[name]
        fields = {
            "model_type": "qwen2",
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
        }
        return parse_config(fields, name)
    path = Path(name)
    if not path.exists():
        raise InputError(f"--model {name}: no such file, and none of {', '.join(MODELS)}")
    return read_config(path.parent if path.is_file() else path)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, by the rules of `rmr1`."""
    jax.config.update("jax_platforms", "cpu")
    try:
        tyro.cli(Command, prog="plan_sampler.py", args=argv, config=(FlagCreatePairsOff,)).run()
    except InputError as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
