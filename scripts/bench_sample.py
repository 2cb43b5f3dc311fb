"""`bench.py sample` and `bench.py steps`: the sampler compared with peers, and decode steps by length.

All systems get the same random weights in float32 and the same prompts of random ids. They sample at temperature 1
until one of the stop ids (the last ids of the vocabulary) or --max-new tokens. The result is useful tokens per second:
new tokens up to and including the stop. Compilation and other first calls happen before and are timed separately.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_common import Comparison, Range, Shape, model_config, peer_pythons, run_peer, say, timed, warn_of_load

from rmr1_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Comparison):
    """Measure useful tokens per second: several samples of each of a few long prompts, of very unequal lengths."""

    prompts: int = 8
    """Number of prompts."""
    group: int = 7
    """Samples of each prompt."""
    prompt_length: Range = (448, 512)
    """Range that the lengths of the prompts are drawn from, in tokens."""
    max_new: int = 1024
    """Maximum number of new tokens of a sample."""
    stop_ids: int = 16
    """Number of ids, the last of the vocabulary, that end a sample."""
    slots: int | None = None
    """Samples drawn at the same time. Defaults to the sampler's own choice."""

    def __post_init__(self):
        low, high = self.prompt_length
        for name, ok, wanted in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("prompt-length", 1 <= low <= high, "LOW:HIGH with 1 <= LOW <= HIGH"),
            ("stop-ids", 1 <= self.stop_ids <= min(16, self.vocab - 1), "1 to 16, and less than the vocabulary"),
        ):
            if not ok:
                raise InputError(f"--{name} {getattr(self, name.replace('-', '_'))} must be {wanted}")

    def workload(self) -> dict[str, Any]:
        """The prompts and limits for every sampler. No prompt contains a stop id."""
        import numpy as np

        random = np.random.default_rng(self.seed)
        low, high = self.prompt_length
        lengths = random.integers(low, high + 1, self.prompts)
        return {
            "task": "sample",
            "prompts": [random.integers(0, self.vocab - self.stop_ids, n).tolist() for n in lengths],
            "group": self.group,
            "max_new": self.max_new,
            "stop_ids": list(range(self.vocab - self.stop_ids, self.vocab)),
            "seed": self.seed,
        }

    def measure(self) -> Iterator[dict[str, Any]]:
        """Yields one line for each system, ours first; a peer's has the ratio of our speed to its own."""
        peers = peer_pythons(self.peer)
        warn_of_load()
        with tempfile.TemporaryDirectory(prefix="rmr1-bench-") as folder:
            ours = self.measure_ours(Path(folder) / "model" if peers else None)
            yield ours
            if peers:
                (Path(folder) / "workload.json").write_text(json.dumps(self.workload()))
            for name, python in peers.items():
                line = self.line(name, run_peer(name, python, Path(folder)))
                yield line | {"ratio": round(ours["useful_tok_s"] / line["useful_tok_s"], 2)}

    def line(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Computes a system's line from its seconds, its rows of new tokens, and its other measurements."""
        rows, seconds = result.pop("rows"), result.pop("seconds")
        assert len(rows) == self.prompts * self.group, f"{name} gave {len(rows)} samples"
        useful = useful_tokens(rows, self.workload()["stop_ids"])
        result["warm_up_seconds"] = round(result["warm_up_seconds"], 3)
        speed = {"name": name, "useful_tok_s": round(useful / seconds, 2), "seconds": round(seconds, 3)}
        return speed | {"useful": useful, "samples": len(rows)} | result

    def measure_ours(self, model_dir: Path | None) -> dict[str, Any]:
        """Warms up and samples; saves the weights to `model_dir`, if given, for the peers."""
        import jax

        from rmr1_jax.distributed.mesh import single_device_mesh
        from rmr1_jax.model.hf import save_params
        from rmr1_jax.model.qwen import Qwen, init_params, with_params
        from rmr1_jax.sampler.engine import Engine
        from rmr1_jax.sampler.sample import SamplingConfig
        from rmr1_jax.sampler.weights import sampling_weights

        config = model_config(self, self.prompt_length[1] + self.max_new)
        work, mesh = self.workload(), single_device_mesh()
        slots = {} if self.slots is None else {"slots": self.slots}
        sampling = SamplingConfig(n=self.group, max_new_tokens=self.max_new, seed=self.seed, **slots)
        longest = max(map(len, work["prompts"]))
        engine = Engine(Qwen(config), sampling, prompts=self.prompts, longest=longest, mesh=mesh)
        params = init_params(Qwen(config), jax.random.key(self.seed), mesh=mesh)
        if model_dir:
            save_params(model_dir, Qwen(config), params, dtype="float32")
        with jax.set_mesh(mesh):
            weights = jax.block_until_ready(sampling_weights(with_params(Qwen(config), params)))
        say("rmr1_jax: warming up")
        start = time.perf_counter()
        engine.warm_up(weights)
        warm = time.perf_counter()
        say(f"rmr1_jax: sampling {self.prompts * self.group} samples")
        sampled = time.perf_counter()
        samples, stats = engine.generate(weights, work["prompts"], work["stop_ids"])
        return self.line(
            "rmr1_jax",
            {
                "seconds": time.perf_counter() - sampled,
                "rows": [sample.token_ids for group in samples for sample in group],
                "warm_up_seconds": warm - start,
                "compiles": stats.compiles,
                "occupancy": round(stats.occupancy, 4),
                "slots": stats.slots,
                "cache_bytes": stats.cache_bytes,
                "prefill_tokens": stats.prefill_tokens,
                "unique_prompt_tokens": sum(map(len, set(map(tuple, work["prompts"])))),
                "device": jax.default_backend(),
                "version": f"jax {jax.__version__}",
            },
        )

    def table(self, lines: list[dict[str, Any]]) -> str:
        """Formats the lines as a table."""
        text = ["system      useful tok/s    seconds     useful  samples   ours / its"]
        for line in lines:
            speed = f"{line['name']:<10}{line['useful_tok_s']:14.1f}{line['seconds']:11.1f}{line['useful']:11}"
            text.append(f"{speed}{line['samples']:9}" + (f"{line['ratio']:13.2f}" if "ratio" in line else ""))
        ours = lines[0]
        text.append(
            f"rmr1_jax: occupancy {ours['occupancy']:.1%} of {ours['slots']} slots, {ours['compiles']} compiles in the "
            f"run (warm-up {ours['warm_up_seconds']:.1f} s), cache {ours['cache_bytes'] / 2**20:.1f} MiB, prefilled "
            f"{ours['prefill_tokens']} tokens for {ours['unique_prompt_tokens']} in the prompts"
        )
        text += [f"{line['name']}: {line['version']}; {line['note']}" for line in lines if "note" in line]
        return "\n".join(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Shape):
    """Measure the milliseconds of a decode step as the longest live sample grows. By default the cache dominates."""

    layers: int = 2
    width: int = 128
    mlp: int = 256
    kv_heads: int = 8
    vocab: int = 512
    slots: int = 64
    prompt_length: Range = (16, 16)
    max_new: int = 4096
    json: bool = False
    """Print one JSON object for each length."""

    def run(self) -> None:
        lines = list(self.measure())
        for line in lines:
            if self.json:
                print(json.dumps(line))
            else:
                share = line["ms"] / lines[-1]["ms"]
                print(f"up to {line['live_length']:6} tokens {line['ms']:9.2f} ms a step, {share:5.2f} of the longest")

    def measure(self) -> Iterator[dict[str, Any]]:
        """Yields one line for every width that the samples' part of the cache can have: the best of five dispatches."""
        import jax

        from rmr1_jax.distributed.mesh import single_device_mesh
        from rmr1_jax.model.qwen import Qwen, init_params, with_params
        from rmr1_jax.sampler.engine import Engine
        from rmr1_jax.sampler.programs import STEPS
        from rmr1_jax.sampler.sample import SamplingConfig
        from rmr1_jax.sampler.weights import sampling_weights

        config, mesh = model_config(self, self.prompt_length[1] + self.max_new), single_device_mesh()
        sampling = SamplingConfig(max_new_tokens=self.max_new, slots=self.slots)
        engine = Engine(Qwen(config), sampling, prompts=self.slots, longest=self.prompt_length[1], mesh=mesh)
        with jax.set_mesh(mesh):
            weights = sampling_weights(
                with_params(Qwen(config), init_params(Qwen(config), jax.random.key(0), mesh=mesh))
            )
        bank = full_bank(engine, self.slots, self.prompt_length[1])
        for width in engine.shapes.widths:
            dispatch, cache = decode_dispatch(engine, weights, bank, width)
            dispatch()
            ms = round(1e3 * min(timed(dispatch) for _ in range(5)) / STEPS, 3)
            yield {"live_length": width, "ms": ms, "cache_bytes": sum(x.nbytes for x in jax.tree.leaves(cache[0]))}


def full_bank(engine: Any, slots: int, prompt_length: int, drawn: int = 0) -> Any:
    """A bank with a live sample in each of `slots` slots, which has drawn so many tokens."""
    import numpy as np

    from rmr1_jax.sampler.slots import Bank

    bank, group = Bank(*engine.shapes.sizes[0]), engine.sampling.n
    for number in range(slots // group):
        bank.admit(number, np.zeros(prompt_length, np.int32), number, group)
    bank.fill(group)
    bank.arrays.step[...], bank.arrays.drawn[...] = drawn, drawn
    return bank


def decode_dispatch(engine: Any, weights: Any, bank: Any, width: int) -> tuple[Callable[[], None], list]:
    """A call that runs one dispatch of decode over the slots of `bank`, with rings of `width` columns, and waits for
    it; and the cache, alone in a list, because each dispatch consumes it and makes it again."""
    import jax

    from rmr1_jax.sampler import programs

    controls, slots = programs.make_controls(engine.sampling, ()), programs.stack_slots([bank], [0])
    with jax.set_mesh(engine.mesh):
        cache = [engine.empty_cache(width)]

    def dispatch() -> None:
        with jax.set_mesh(engine.mesh):
            cache[0], drawn = programs.decode(engine.graphdef, weights, controls, cache[0], slots)
            jax.block_until_ready(drawn)

    return dispatch, cache


def useful_tokens(rows: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> int:
    """Counts the new tokens up to and including each row's first stop; what a batch draws after it is of no use."""
    stops = set(stop_ids)
    return sum(next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows)
