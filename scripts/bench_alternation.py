"""Updates of several systems in alternation, so that a machine that becomes slower does so for all of them.

A system is a call that makes one update: a `CompiledUpdate` of ours, or a `PeerProcess`.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_common import Comparison, PeerProcess, peer_pythons, say, warn_of_load

System = Callable[[], dict[str, float]]


class Alternated(Comparison):
    """Compares updates of ours with those of peers."""

    def prepare(self, model_dir: Path | None) -> tuple[dict[str, CompiledUpdate], dict[str, Any]]:
        """Compiles updates of ours, by their names, and makes the work of the peers. Saves the weights to `model_dir`,
        if given, for them."""
        raise NotImplementedError

    def peers(self) -> tuple[str, ...]:
        """The names of the peers to measure."""
        return self.peer

    def alternated(self, runs: int) -> dict[str, dict[str, Any]]:
        """Makes `runs` updates with each system, ours first, in turn. Returns the facts about each by its name, and the
        lists of what each update returned."""
        peers = peer_pythons(self.peers())
        warn_of_load()
        with tempfile.TemporaryDirectory(prefix="rmr1-bench-") as folder, contextlib.ExitStack() as stack:
            systems, work = self.prepare(Path(folder) / "model" if peers else None)
            (Path(folder) / "workload.json").write_text(json.dumps(work))
            for name, python in peers.items():
                systems[name] = stack.enter_context(PeerProcess(name, python, Path(folder)))
            results = alternate(systems, runs)
            return {name: systems[name].facts | made for name, made in results.items()}


def alternate(systems: Mapping[str, System], runs: int) -> dict[str, dict[str, list[float]]]:
    """Makes `runs` updates with each system, in turn. Returns the values that each gave, by their keys, in order."""
    results = {name: [] for name in systems}
    for run in range(runs):
        say(f"run {run + 1} of {runs}: {', '.join(systems)}")
        for name, system in systems.items():
            results[name].append(system())
    return {name: {key: [one[key] for one in made] for key in made[0]} for name, made in results.items()}


class CompiledUpdate:
    """A compiled update of training, as a call that makes one and returns its seconds, its loss and its norm.

    compile_seconds: for tracing and compiling. temporaries: bytes on the device. facts: these and others, for a line.
    """

    def __init__(self, state: Any, batch: dict[str, Any], count: int, *, loss: Callable, optimizer: Any):
        import jax

        from rmr1_jax.train.optim import compile_update

        start = time.perf_counter()
        update = compile_update(state, loss=loss, optimizer=optimizer, clip=1.0)
        self._step = update.lower(state, [(batch, count)]).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporaries = self._step.memory_analysis().temp_size_in_bytes
        self._state, self._batch, self._count = state, batch, count
        self.facts = {"compile_seconds": self.compile_seconds, "temporaries_mib": self.temporaries / 2**20}
        self.facts |= {"device": jax.default_backend(), "version": f"jax {jax.__version__}"}

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, [(self._batch, self._count)])
        loss = float(metrics["loss"])
        return {"seconds": time.perf_counter() - start, "loss": loss, "grad_norm": float(metrics["grad_norm"])}
