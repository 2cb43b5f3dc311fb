"""`bench.py sample` and `bench.py steps`: the sampler beside its peers, and a decode step by length.

All systems get the same random weights in float32 and the same prompts of random ids, and sample at temperature 1 until
one of the stop ids, the last of the vocabulary, or --max-new tokens. What counts is useful tokens a second: new tokens
up to and with the stop. Compilation and other first calls are made before and timed apart.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_common import Comparison, Range, Shape, model_config, say

from rmr1_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Comparison):
    """Groups of samples of long prompts with very unequal lengths: useful tokens a second."""

    speed = "useful_tok_s"

    prompts: int = 8
    group: int = 7
    """Samples of each prompt."""
    prompt_length: Range = (448, 512)
    """The shortest and the longest prompt in tokens, between which lengths are drawn."""
    max_new: int = 1024
    """New tokens a sample at most."""
    stop_ids: int = 16
    """How many ids at the end of the vocabulary stop a sample."""
    slots: int | None = None
    """Samples in flight at once; by default as many as the sampler takes by itself."""

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
        """What a sampler is asked for. No prompt has a stop id."""
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

    def line(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """What is printed for a system, from its seconds, the rows of tokens it drew, and whatever else it tells."""
        rows, seconds = result.pop("rows"), result.pop("seconds")
        assert len(rows) == self.prompts * self.group, f"{name} gave {len(rows)} samples"
        useful = useful_tokens(rows, self.workload()["stop_ids"])
        result["warm_up_seconds"] = round(result["warm_up_seconds"], 3)
        speed = {"name": name, "useful_tok_s": round(useful / seconds, 2), "seconds": round(seconds, 3)}
        return speed | {"useful": useful, "samples": len(rows)} | result

    def measure_ours(self, model_dir: Path | None) -> dict[str, Any]:
        """Warm up, sample, and leave the weights in `model_dir` for the peers."""
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
        """The lines for a reader."""
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
    """Milliseconds of a decode step by the length of the longest live sample. By default most of it is the cache."""

    layers: int = 2
    width: int = 128
    mlp: int = 256
    kv_heads: int = 8
    vocab: int = 512
    slots: int = 64
    prompt_length: Range = (16, 16)
    max_new: int = 4096
    json: bool = False
    """Print one JSON object a length."""

    def run(self) -> None:
        lines = list(self.measure())
        for line in lines:
            if self.json:
                print(json.dumps(line))
            else:
                share = line["ms"] / lines[-1]["ms"]
                print(f"up to {line['live_length']:6} tokens {line['ms']:9.2f} ms a step, {share:5.2f} of the longest")

    def measure(self) -> Iterator[dict[str, Any]]:
        """One line for every width that the samples' part of the cache can have, the best of five dispatches."""
        import jax
        import numpy as np

        from rmr1_jax.distributed.mesh import single_device_mesh
        from rmr1_jax.model.qwen import Qwen, init_params, with_params
        from rmr1_jax.sampler import programs
        from rmr1_jax.sampler.engine import Engine
        from rmr1_jax.sampler.programs import make_controls, stack_slots
        from rmr1_jax.sampler.sample import SamplingConfig
        from rmr1_jax.sampler.slots import Bank
        from rmr1_jax.sampler.weights import sampling_weights

        config, mesh = model_config(self, self.prompt_length[1] + self.max_new), single_device_mesh()
        sampling = SamplingConfig(max_new_tokens=self.max_new, slots=self.slots)
        engine = Engine(Qwen(config), sampling, prompts=self.slots, longest=self.prompt_length[1], mesh=mesh)
        bank = Bank(*engine.shapes.sizes[0])
        for number in range(self.slots):
            bank.admit(number, np.zeros(self.prompt_length[1], np.int32), number, 1)
        bank.seat(1)
        with jax.set_mesh(mesh):
            model = with_params(Qwen(config), init_params(Qwen(config), jax.random.key(0), mesh=mesh))
            weights = sampling_weights(model)
            for width in engine.shapes.widths:
                cache, seconds = engine.empty_cache(width), []
                for _ in range(6):
                    start = time.perf_counter()
                    cache, drawn = programs.decode(
                        engine.graphdef, weights, make_controls(sampling, ()), cache, stack_slots([bank], [0])
                    )
                    jax.block_until_ready(drawn)
                    seconds.append((time.perf_counter() - start) / programs.STEPS)
                held = sum(x.nbytes for x in jax.tree.leaves(cache))
                yield {"live_length": width, "ms": round(1e3 * min(seconds[1:]), 3), "cache_bytes": held}


def useful_tokens(rows: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> int:
    """New tokens up to and with each row's first stop. What a batch draws behind it, until all have stopped, is not
    useful."""
    stops = set(stop_ids)
    return sum(next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows)
