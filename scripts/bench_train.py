"""`bench.py train`: one step of SFT (forward, backward, AdamW), compared with peers and with its matrix products alone.

All systems get the same random weights in float32 and the same full rows of random ids, and every token counts. The
limit is the speed of a step that consists of nothing but its matrix products, each timed alone in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bench_alternation import Alternated, CompiledUpdate
from bench_common import model_config, say, timed

LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Alternated):
    """Measure the tokens per second of a training step."""

    batch: int = 4
    """Rows in a step."""
    length: int = 1024
    """Tokens in a row."""
    steps: int = 5
    """Steps of each system, made in alternation; the result is their median."""
    remat: Literal["none", "dots", "full"] = "dots"
    """Rematerialization in our backward pass. The peers keep all activations."""

    def measure(self) -> Iterator[dict[str, Any]]:
        """Yields one line for each system, ours first; a peer's has the ratio of our speed to its own."""
        results = self.alternated(self.steps)
        say("rmr1_jax: timing the matrix products alone")
        products, flops = self.products()
        lines = [self.line(name, result) for name, result in results.items()]
        ours = lines[0]
        speeds = {"gflop_s": flops / ours["seconds"] / 1e9, "products_gflop_s": flops / products / 1e9}
        speeds |= {"limit_tok_s": ours["tokens"] / products, "share_of_limit": products / ours["seconds"]}
        yield ours | {k: round(v, 4) for k, v in speeds.items()}
        for line in lines[1:]:
            yield line | {"ratio": round(ours["tok_s"] / line["tok_s"], 2)}

    def line(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        seconds, tokens = statistics.median(result["seconds"]), self.batch * self.length
        speed = {"name": name, "tok_s": round(tokens / seconds, 1), "seconds": round(seconds, 4), "tokens": tokens}
        facts = {k: v for k, v in result.items() if not isinstance(v, list)}
        return speed | {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}

    def prepare(self, model_dir: Path | None) -> tuple[dict[str, CompiledUpdate], dict[str, Any]]:
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
        shape = (1, self.batch, self.length)
        rows = np.random.default_rng(self.seed).integers(0, self.vocab, shape, np.int32)
        places = np.broadcast_to(np.arange(self.length, dtype=np.int32), rows.shape)
        weights = np.full(rows.shape, 1 / (self.batch * (self.length - 1)), np.float32) * (places > 0)
        batch = {"tokens": rows, "positions": places, "segment_ids": np.ones_like(rows), "weights": weights}
        optimizer = make_optimizer(OptimConfig(lr=LEARNING_RATE, schedule="constant", warmup_ratio=0.0), self.steps)
        with jax.set_mesh(mesh):
            loss = functools.partial(sft_micro_loss, split(Qwen(config))[0], remat=self.remat)
            update = CompiledUpdate(init_state(params, optimizer), batch, 1, loss=loss, optimizer=optimizer)
        update.facts["first_loss"] = update()["loss"]
        return {"rmr1_jax": update}, {"task": "train", "rows": rows[0].tolist(), "lr": LEARNING_RATE}

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


def _product(equation: str, *shapes: tuple[int, ...]) -> float:
    """Seconds of one einsum of random arrays: the median of five runs."""
    import jax
    import jax.numpy as jnp

    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    product = jax.jit(lambda a, b: jnp.einsum(equation, a, b))
    jax.block_until_ready(product(*arrays))
    return sorted(timed(lambda: jax.block_until_ready(product(*arrays))) for _ in range(5))[2]
