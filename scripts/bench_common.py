"""Shared by the benchmarks of bench.py: the model's shape, and peers in environments of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from tyro.conf import UseAppendAction
from tyro.constructors import PrimitiveConstructorSpec

from rmr1_jax.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[1]


class Peer(NamedTuple):
    environment: Path
    package: str


PEERS = {"hf": Peer(ROOT / ".venv", "torch"), "tunix": Peer(ROOT / ".venv-tunix", "tunix")}


def _parse_range(text: list[str]) -> tuple[int, int]:
    low, _, high = text[0].partition(":")
    return int(low), int(high or low)


Range = Annotated[
    tuple[int, int],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="LOW:HIGH",
        instance_from_str=_parse_range,
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [f"{x[0]}:{x[1]}"],
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a Qwen2 with random weights and an output head of its own."""

    layers: int = 8
    """Number of layers."""
    width: int = 512
    """Size of the residual stream."""
    mlp: int = 1536
    """Width of the MLP."""
    heads: int = 8
    """Number of query heads."""
    kv_heads: int = 2
    """Number of key-value heads."""
    head_dim: int = 64
    """Size of a head."""
    vocab: int = 4096
    """Size of the vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Shape):
    """Compares our code with peers on one workload.

    A subclass defines the workload, measures our code, turns a system's measurements into one line, and formats the
    lines as a table. `speed` is the key of a line whose values are compared.
    """

    speed: ClassVar[str]

    seed: int = 0
    """Seed of the weights and of the workload."""
    peer: UseAppendAction[tuple[Literal["hf", "tunix"], ...]] = ()
    """Also measure Transformers with torch (hf) or tunix. May be given twice."""
    json: bool = False
    """Print one JSON object for each system instead of a table."""

    def run(self) -> None:
        lines = []
        for line in self.measure():
            lines.append(line)
            if self.json:
                print(json.dumps(line), flush=True)
        if not self.json:
            print(self.table(lines))

    def measure(self) -> Iterator[dict[str, Any]]:
        """Yields one line for each system, ours first; a peer's has the ratio of our speed to its own."""
        peers = {name: peer_python(name) for name in dict.fromkeys(self.peer)}
        warn_of_load()
        with tempfile.TemporaryDirectory(prefix="rmr1-bench-") as folder:
            ours = self.measure_ours(Path(folder) / "model" if peers else None)
            yield ours
            if peers:
                (Path(folder) / "workload.json").write_text(json.dumps(self.workload()))
            for name, python in peers.items():
                line = self.line(name, run_peer(name, python, Path(folder)))
                yield line | {"ratio": round(ours[self.speed] / line[self.speed], 2)}

    def workload(self) -> dict[str, Any]:
        raise NotImplementedError

    def measure_ours(self, model_dir: Path | None) -> dict[str, Any]:
        """Measures our code; saves the weights to `model_dir`, if given, for the peers."""
        raise NotImplementedError

    def line(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def table(self, lines: list[dict[str, Any]]) -> str:
        raise NotImplementedError


def model_config(shape: Shape, positions: int):
    """Builds the configuration through the reader of config.json, which reports an impossible shape."""
    from rmr1_jax.model.config import parse_config

    fields = {
        "model_type": "qwen2",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": positions,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return parse_config(fields, "the shape on the command line")


def peer_python(name: str) -> Path:
    """Finds the interpreter of a peer's environment.

    Raises:
        InputError: there is no environment, or the peer is not installed in it.
    """
    folder, package = PEERS[name]
    python = folder / "bin" / "python"
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    if not python.exists() or subprocess.run([python, "-c", look]).returncode:
        raise InputError(f"--peer {name} needs {package} in {folder}, which lacks it; run: bash scripts/peers")
    return python


def run_peer(name: str, python: Path, folder: Path) -> dict[str, Any]:
    """Runs `bench_peers.py` on the workload and the model in `folder`; returns its measurements."""
    say(f"{name}: warming up and running; this can take minutes")
    command = [python, ROOT / "scripts" / "bench_peers.py", name, folder]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RunError(f"the peer {name} failed with exit code {done.returncode}; its error output is above")
    return json.loads((folder / "result.json").read_text())


def timed(call: Callable[[], Any]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def warn_of_load() -> None:
    if (load := os.getloadavg()[0]) > 0.5:
        # Peers that wait for all threads at every step suffer most: torch was once 50 times slower.
        say(f"warning: the load average is {load:.1f}; other processes on this machine distort the comparison")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
