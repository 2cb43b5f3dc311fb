"""Shared by the benchmarks of bench.py: the model's shape, and peers in environments of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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
    """Compares our code with peers on one workload. A subclass measures, and formats its lines as a table."""

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
        """Yields the lines of the systems, ours first."""
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


def peer_pythons(names: Iterable[str]) -> dict[str, Path]:
    """Finds the interpreters of peers, each once. Raises InputError as `peer_python`."""
    return {name: peer_python(name) for name in dict.fromkeys(names)}


def run_peer(name: str, python: Path, folder: Path) -> dict[str, Any]:
    """Runs a peer on the workload and the model in `folder`; returns its measurements."""
    with PeerProcess(name, python, folder) as peer:
        return peer.facts


class PeerProcess:
    """`bench_peers.py` in a process of its own, which has warmed up and makes one update for each call.

    facts: the measurements that it began with; of a peer that samples, all of them.
    """

    def __init__(self, name: str, python: Path, folder: Path):
        say(f"{name}: warming up; this can take minutes")
        self._name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by __exit__
        self._process = subprocess.Popen(
            [python, ROOT / "scripts" / "bench_peers.py", name, folder],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.__exit__()
            raise

    def __call__(self) -> dict[str, float]:
        """Makes one update. Returns its seconds and its loss."""
        with contextlib.suppress(BrokenPipeError):  # a peer that has ended gives no answer
            print("update", file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        sys.stderr.write(self._errors.read())
        raise RunError(f"the peer {self._name} failed with exit code {code}; its error output is above")

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


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
