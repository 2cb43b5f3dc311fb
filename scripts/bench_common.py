"""What the benchmarks of bench.py share: the shape of a model, and peers in environments of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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


def model_config(shape: Any, positions: int):
    """An untied Qwen2, by the reader of config.json, which says what is wrong with a shape."""
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
    """The interpreter of a peer's environment.

    Raises:
        InputError: there is none, or the peer is not installed in it.
    """
    folder, package = PEERS[name]
    python = folder / "bin" / "python"
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    if not python.exists() or subprocess.run([python, "-c", look]).returncode:
        raise InputError(f"--peer {name} needs {package} in {folder}, where it is not; run: bash scripts/peers")
    return python


def run_peer(name: str, python: Path, folder: Path) -> dict[str, Any]:
    """What `bench_peers.py` found for the workload and the model in `folder`."""
    say(f"{name}: warming up and running; this can take minutes")
    command = [python, ROOT / "scripts" / "bench_peers.py", name, folder]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RunError(f"the peer {name} failed with exit code {done.returncode}; what it said stands above")
    return json.loads((folder / "result.json").read_text())


def warn_of_load() -> None:
    if (load := os.getloadavg()[0]) > 0.5:
        # A peer that waits for all its threads at every step suffers most: torch has been seen 50 times slower.
        say(f"warning: the load average is {load:.1f}; other work on this machine spoils the comparison")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
