"""Compiles a program for devices that this machine may not have, and reads how much memory of a chip it needs.

Next: `traffic.py`, the bytes that the program sends between chips; `train.py` and `sampler.py`, the programs of a run.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.stages import Wrapped

from rmr1_jax.distributed.chips import bytes_per_chip
from rmr1_jax.distributed.mesh import slice_of
from rmr1_jax.plan.slice import parse_out_of_memory
from rmr1_jax.plan.traffic import Traffic, read_traffic


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The memory of one chip in bytes while a program runs.

    arguments: the program's inputs, and all other data that stays on the chip meanwhile. temporaries: intermediate
    results, and outputs that do not reuse an input's memory. code: the program's instructions. seconds: compile time.
    traffic: bytes between chips; None if the compiler refused the program because it needs too much memory.
    """

    arguments: int
    temporaries: int
    code: int
    seconds: float
    traffic: Traffic | None

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.code

    def fits(self, limit: int) -> bool:
        return self.traffic is not None and self.total <= limit


def compile_program(
    program: Wrapped, *arguments: Any, devices: Sequence[jax.Device], resident: int = 0, dynamic_trips: float = 1
) -> Compiled:
    """Compile a jitted function for its `arguments`: `ShapeDtypeStruct`s with shardings, and static values.
    `devices` are those of the mesh, in its order; `resident` is the bytes per chip of data that stays there and is no
    argument; for `dynamic_trips` see `traffic.read_traffic`."""
    lowered = program.lower(*arguments)
    start, given = time.perf_counter(), bytes_per_chip(arguments)
    try:
        compiled, text = _compile(lowered, devices[0].platform)
    except jax.errors.JaxRuntimeError as e:
        needed, _ = parse_out_of_memory(e)
        return Compiled(given + resident, max(0, needed - given), 0, time.perf_counter() - start, None)
    seconds, m = time.perf_counter() - start, compiled.memory_analysis()
    slices = len({slice_of(d) for d in devices})
    traffic = read_traffic(text, len(devices) // slices, slices=slices, dynamic_trips=dynamic_trips)
    # XLA drops arguments that the program does not read, but they stay on the chip; padding makes arguments larger.
    held = max(given, m.argument_size_in_bytes) + resident
    temporaries = m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return Compiled(held, temporaries, m.generated_code_size_in_bytes, seconds, traffic)


def _compile(lowered: Any, platform: str) -> tuple[Any, str]:
    """Return the compiled program and its HLO text."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # `as_text` may fail: libtpu and jaxlib have different dates, and jaxlib cannot read all of libtpu's instructions.
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        # The files are numbered; those after the first are parts that the compiler compiled separately.
        file = min(Path(folder).glob("*.after_optimizations.txt"))
        return compiled, file.read_text(encoding="utf-8")


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Replace arrays by their shapes and dtypes, with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
