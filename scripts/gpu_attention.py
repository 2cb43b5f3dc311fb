"""`gpu_check.py`: cuDNN's attention for packed rows against NumPy and against XLA's blocks, and the speed of both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_parity import timed

from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.jax_private import cudnn_packed_attention
from rmr1_jax.model import cudnn
from rmr1_jax.model.attention import attend

NAMES = ("out", "d_q", "d_k", "d_v")
MOST_ERROR = 2e-2  # relative, in the norm; bfloat16 operands give 1e-3 to 1e-2

Rows = Iterator[dict[str, Any]]


def attention(case: str, *, out: Path, tiny: bool) -> Rows:
    """Values and the three gradients. case: the numbers of query heads and of key-value heads, and the head size.

    Rows of 1,024 tokens are compared with NumPy in float32. Longer ones would need minutes there: cuDNN's are compared
    with XLA's. Each program takes several seconds to compile, so that only the shape of 7B has more than four.
    """
    heads = tuple(map(int, case.split(",")))
    short, long = (_Rows(*heads, T) for T in ((64, 128) if tiny else (1024, 4096)))
    on_gpu = cudnn.obstacle(jax.devices()[0], jnp.bfloat16, heads[-1]) is None
    expected = short.by_numpy()
    yield short.row("xla", expected, _blocks)
    if on_gpu:
        yield short.row("cudnn", expected, _packed)
    blocks = long.call(_blocks)
    yield long.row("xla", None, _blocks, blocks)
    if on_gpu:
        yield long.row("cudnn, errors to xla", [np.asarray(x, np.float32) for x in blocks()], _packed)
        if heads == (28, 4, 128):
            yield short.row("cudnn, in shard_map", expected, _packed, mesh=True)
            # cuDNN's own grouped heads: once they are right in every supported JAX, K and V need not be repeated.
            yield short.row("cudnn, grouped heads", expected, _grouped) | {"ok": None}


def _blocks(*arguments: jax.Array) -> jax.Array:
    return attend(*arguments, "xla")


def _packed(*arguments: jax.Array) -> jax.Array:
    return attend(*arguments, cudnn.Cudnn(16))


def _grouped(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
    lengths, offsets, _ = cudnn.segment_spans(segments, 16)
    real = (segments > 0)[:, :, None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.where(real, cudnn_packed_attention(q, k, v, lengths, offsets), 0)


class _Rows:
    """Random q, k, v in three rows: one of random segments (the first of a single token) with padding at the end, one
    of a single segment with padding, and one of a segment as long as the row."""

    def __init__(self, N: int, K: int, H: int, T: int):
        self.shape, rng = (N, K, H, T), np.random.default_rng([N, T])
        self.positions, self.segments = np.zeros((2, 3, T), np.int32)
        for b, lengths in enumerate(([1, *rng.integers(2, T // 6, 8)], [T - T // 5], [T])):
            end = 0
            for number, length in enumerate(lengths, start=1):
                start, end = end, min(T, end + int(length))
                self.segments[b, start:end], self.positions[b, start:end] = number, np.arange(end - start)
        self.real = (self.segments > 0)[:, :, None, None]
        sizes = [(3, T, heads, H) for heads in (N, K, K, N)]
        *self.arrays, cotangent = (rng.standard_normal(size, np.float32).astype(jnp.bfloat16) for size in sizes)
        self.cotangent = np.where(self.real, cotangent, np.zeros_like(cotangent))

    def call(self, attention: Callable[..., jax.Array]) -> Callable[[], list[jax.Array]]:
        """Return a call that computes the output and the gradients of q, k and v."""

        # All arrays are arguments: as constants they would be folded, for minutes.
        rest = [jnp.asarray(x) for x in (self.cotangent, self.real, self.positions, self.segments)]
        arrays = [jnp.asarray(x) for x in self.arrays]

        def loss(q, k, v, cotangent, real, positions, segments) -> tuple[jax.Array, jax.Array]:
            out = attention(q, k, v, positions, segments)
            return jnp.sum((out * cotangent).astype(jnp.float32)), jnp.where(real, out, 0)

        both = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

        def call() -> list[jax.Array]:
            grads, out = both(*arrays, *rest)
            return [out, *grads]

        return call

    def by_numpy(self) -> list[np.ndarray]:
        """Return the output and the gradients from the whole square of scores, in float32 on the host."""
        N, K, H, T = self.shape
        q, k, v, d_out = (x.astype(np.float32).swapaxes(1, 2) for x in (*self.arrays, self.cotangent))  # B, heads, T, H
        q, (k, v) = q * np.float32(H**-0.5), (np.repeat(x, N // K, axis=1) for x in (k, v))
        seen = (self.segments[:, :, None] == self.segments[:, None]) & np.tri(T, dtype=bool)
        scores = np.where(seen[:, None], q @ k.swapaxes(2, 3), np.float32(-1e30))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        d_p = d_out @ v.swapaxes(2, 3)
        d_scores = p * (d_p - np.sum(d_p * p, -1, keepdims=True))
        d_k, d_v = d_scores.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ d_out
        d_k, d_v = (x.reshape(3, K, N // K, T, H).sum(2) for x in (d_k, d_v))
        found = p @ v, d_scores @ k * np.float32(H**-0.5), d_k, d_v
        return [np.where(self.real, x.swapaxes(1, 2), 0) for x in found]

    def row(
        self,
        what: str,
        expected: list[np.ndarray] | None,
        attention: Callable[..., jax.Array],
        call: Callable[[], list[jax.Array]] | None = None,
        *,
        mesh: bool = False,
    ) -> dict[str, Any]:
        """Errors of the output and the gradients, and the speed of both passes (of what the masks leave).
        call: what `call(attention)` returned, if it was called before."""
        N, K, H, T = self.shape
        name = f"{what} {N},{K},{H} T={T}"
        try:
            with jax.set_mesh(single_device_mesh()) if mesh else contextlib.nullcontext():
                call = call or self.call(attention)
                found, seconds = [np.asarray(x, np.float32) for x in call()], timed(call)
        except Exception as e:
            return {"name": name, "ok": False, "failed": " ".join(str(e).split())[:300]}
        errors = {}
        for part, a, b in zip(NAMES, found, expected or (), strict=bool(expected)):
            errors[part] = float(np.linalg.norm(a - b) / np.linalg.norm(b))  # NaN is no success
        ok = all(np.isfinite(x).all() for x in found) and all(error < MOST_ERROR for error in errors.values())
        lengths = [int(n) for row in self.segments for n in np.bincount(row)[1:]]
        flops = sum(3.5 * 4 * N * H * n * (n + 1) / 2 for n in lengths)
        return {"name": name, "ok": ok, **errors, "ms": 1e3 * seconds, "tflop_s": flops / seconds / 1e12}


PARTS = {"attention": attention}
