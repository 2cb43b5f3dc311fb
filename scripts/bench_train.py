"""`bench.py train`: one step of SFT (forward, backward, AdamW), compared with peers and with its matrix products alone.

All systems get the same random weights in float32 and the same full rows of random ids, and every token counts. The
limit is the speed of a step that consists of nothing but its matrix products, each timed alone in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from bench_common import Comparison, model_config, say, timed

LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Comparison):
    """Measure the tokens per second of a training step."""

    speed = "tok_s"

    batch: int = 4
    """Rows in a step."""
    length: int = 1024
    """Tokens in a row."""
    steps: int = 5
    """Steps to time; the result is their median."""
    remat: Literal["none", "dots", "full"] = "dots"
    """Rematerialization in our backward pass. The peers keep all activations."""

    def rows(self):
        """[B, T] int32 random ids."""
        import numpy as np

        return np.random.default_rng(self.seed).integers(0, self.vocab, (self.batch, self.length), np.int32)

    def workload(self) -> dict[str, Any]:
        """The rows and settings for every trainer."""
        return {"task": "train", "rows": self.rows().tolist(), "steps": self.steps, "lr": LEARNING_RATE}

    def line(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        seconds = sorted(result.pop("seconds"))[self.steps // 2]
        tokens = self.batch * self.length
        speed = {"name": name, "tok_s": round(tokens / seconds, 1), "seconds": round(seconds, 4), "tokens": tokens}
        return speed | {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}

    def measure_ours(self, model_dir: Path | None) -> dict[str, Any]:
        """Times the step and its matrix products; saves the weights to `model_dir`, if given, for the peers."""
        import jax
        import numpy as np

        from rmr1_jax.distributed.mesh import single_device_mesh
        from rmr1_jax.model.hf import save_params
        from rmr1_jax.model.qwen import Qwen, init_params, split
        from rmr1_jax.train.optim import OptimConfig, init_state, make_optimizer
        from rmr1_jax.train.sft import sft_micro_loss

        config, mesh = model_config(self, self.length), single_device_mesh()
        params = init_params(Qwen(config), jax.random.key(self.seed), mesh=mesh)
        if model_dir:
            save_params(model_dir, Qwen(config), params, dtype="float32")
        rows = self.rows()[None]
        places = np.broadcast_to(np.arange(self.length, dtype=np.int32), rows.shape)
        weights = np.full(rows.shape, 1 / (self.batch * (self.length - 1)), np.float32) * (places > 0)
        batch = {"tokens": rows, "positions": places, "segment_ids": np.ones_like(rows), "weights": weights}
        optimizer = make_optimizer(OptimConfig(lr=LEARNING_RATE, schedule="constant", warmup_ratio=0.0), self.steps)
        with jax.set_mesh(mesh):
            loss = functools.partial(sft_micro_loss, split(Qwen(config))[0], remat=self.remat)
            update = Update(init_state(params, optimizer), batch, 1, loss=loss, optimizer=optimizer)
            update()
            seconds = [timed(update) for _ in range(self.steps)]
        say("rmr1_jax: timing the matrix products alone")
        products, flops = self.products()
        tokens, ours = self.batch * self.length, sorted(seconds)[self.steps // 2]
        return self.line(
            "rmr1_jax",
            {
                "seconds": seconds,
                "first_loss": update.losses[0],
                "compile_seconds": update.compile_seconds,
                "temporaries_mib": update.temporaries / 2**20,
                "gflop_s": flops / ours / 1e9,
                "products_gflop_s": flops / products / 1e9,
                "limit_tok_s": tokens / products,
                "share_of_limit": products / ours,
                "device": jax.default_backend(),
                "version": f"jax {jax.__version__}",
            },
        )

    def products(self) -> tuple[float, float]:
        """Times each kind of a step's matrix products alone; returns (seconds, FLOPs) of all of them.

        Causal attention counts as half of the full square.
        """
        T, B, K = self.batch * self.length, self.batch, self.kv_heads
        heads, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        group = self.heads // self.kv_heads * self.length
        linear = [(self.width, heads)] * 2 + [(self.width, keys)] * 2 + [(self.width, self.mlp)] * 3
        seconds = flops = 0.0
        for shape, count in [(s, self.layers * linear.count(s)) for s in dict.fromkeys(linear)] + [
            ((self.width, self.vocab), 1)
        ]:
            inner, outer = shape
            one = (
                _product("td,df->tf", (T, inner), (inner, outer))  # forward
                + _product("tf,df->td", (T, outer), (inner, outer))  # the input's gradient
                + _product("td,tf->df", (T, inner), (T, outer))  # the weight's
            )
            seconds, flops = seconds + count * one, flops + count * 6 * T * inner * outer
        by_head, scores = (B, K, group, self.head_dim), (B, K, group, self.length)
        other = (B, K, self.length, self.head_dim)
        one = (
            2 * _product("bkqh,bksh->bkqs", by_head, other)  # the scores, and the gradient of the weights
            + 2 * _product("bkqs,bksh->bkqh", scores, other)  # the values, and the gradient of the queries
            + 2 * _product("bkqs,bkqh->bksh", scores, by_head)  # the gradients of keys and values
        )
        count = self.layers / 2
        return seconds + count * one, flops + count * 12 * B * K * group * self.head_dim * self.length

    def table(self, lines: list[dict[str, Any]]) -> str:
        """Formats the lines as a table."""
        text = ["system       tokens/s   ms a step   first loss   ours / its"]
        for line in lines:
            speed = f"{line['name']:<10}{line['tok_s']:11.1f}{1e3 * line['seconds']:12.1f}{line['first_loss']:13.4f}"
            text.append(speed + (f"{line['ratio']:13.2f}" if "ratio" in line else ""))
        ours = lines[0]
        text.append(
            f"rmr1_jax: {ours['share_of_limit']:.0%} of the limit, {ours['limit_tok_s']:.0f} tokens/s with matrix "
            f"products alone ({ours['products_gflop_s']:.0f} GFLOP/s); temporaries {ours['temporaries_mib']:.0f} MiB, "
            f"compiled in {ours['compile_seconds']:.1f} s"
        )
        text += [f"{line['name']}: {line['version']}; {line['note']}" for line in lines if "note" in line]
        return "\n".join(text)


class Update:
    """A compiled update of training, as a call that makes one and waits for its loss.

    losses: of the updates so far. compile_seconds: for tracing and compiling. temporaries: bytes on the device.
    """

    def __init__(self, state: Any, batch: dict[str, Any], count: int, *, loss: Callable, optimizer: Any):
        from rmr1_jax.train.optim import compile_update

        start = time.perf_counter()
        update = compile_update(state, loss=loss, optimizer=optimizer, clip=1.0)
        self._step = update.lower(state, batch, count).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporaries = self._step.memory_analysis().temp_size_in_bytes
        self.losses: list[float] = []
        self._state, self._batch, self._count = state, batch, count

    def __call__(self) -> None:
        self._state, metrics = self._step(self._state, self._batch, self._count)
        self.losses.append(float(metrics["loss"]))


def _product(equation: str, *shapes: tuple[int, ...]) -> float:
    """Seconds of one einsum of random arrays: the median of five runs."""
    import jax
    import jax.numpy as jnp

    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    product = jax.jit(lambda a, b: jnp.einsum(equation, a, b))
    jax.block_until_ready(product(*arrays))
    return sorted(timed(lambda: jax.block_until_ready(product(*arrays))) for _ in range(5))[2]
