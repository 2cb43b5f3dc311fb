"""`gpu_check.py`: versions and ceilings of the machine, and whether a GPU computes what XLA on a CPU computes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rmr1_jax
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh, single_device_mesh
from rmr1_jax.model import cudnn
from rmr1_jax.model.attention import Resolved, attend
from rmr1_jax.model.qwen import Qwen, init_params, split, with_params
from rmr1_jax.plan.model import model_shape
from rmr1_jax.sampler.engine import Engine
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.weights import sampling_weights
from rmr1_jax.train.config import SftConfig
from rmr1_jax.train.logprobs import forward_options
from rmr1_jax.train.sft import sft_micro_loss

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "transformers", "nvidia-cudnn-cu13")
SHAPES = ((28, 4, 128), (14, 2, 64), (40, 8, 128))  # N, K, H of 7B, 0.5B and 32B
MOST_ERROR = 2e-2  # relative, in the norm; bfloat16 operands give 1e-3 to 1e-2

Rows = Iterator[dict[str, Any]]


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """The seconds of a call among several in flight, after a first one that compiles."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready([call() for _ in range(repeats)])
    return (time.perf_counter() - start) / repeats


def versions(case: str, *, out: Path, tiny: bool) -> Rows:
    """What is installed, which modules cannot be imported, and the ceilings of the device: a copy, and a product."""
    device = jax.devices()[0]
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    facts = {"kind": device.device_kind, "capability": getattr(device, "compute_capability", None)}
    stats = device.memory_stats() or {}
    facts["memory_gib"] = round(stats.get("bytes_limit", 0) / 2**30, 1)
    yield {"name": "device", **facts, "driver": driver(), "xla_flags": os.environ.get("XLA_FLAGS", "")}
    yield {"name": "packages", "packages": installed, **{name: installed.get(name) for name in PACKAGES}}
    failed = {}
    modules = [m.name for m in pkgutil.walk_packages(rmr1_jax.__path__, "rmr1_jax.")]
    for name in modules:
        if not name.endswith("__main__"):
            try:
                importlib.import_module(name)
            except Exception as e:
                failed[name] = repr(e)[:100]
    needed = not {name for name in failed if name.split(".")[1] in ("model", "sampler", "train", "quickstart")}
    yield {"name": "imports", "modules": len(modules), "failed": failed, "ok": needed}
    yield {"name": "cudnn", "obstacle": cudnn.obstacle(device, jnp.bfloat16, 128)}
    size, columns = (64, 256) if tiny else (2**15, 2**16)
    x = jax.random.normal(jax.random.key(0), (size, columns), jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    yield {"name": "copy", "tb_s": 2 * x.nbytes / timed(lambda: copy(x)) / 1e12}
    n = 128 if tiny else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (1, 2))
    product = jax.jit(jnp.matmul)
    yield {"name": "product", "tflop_s": 2 * n**3 / timed(lambda: product(a, b)) / 1e12}


def driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        return type(e).__name__


def attention(case: str, *, out: Path, tiny: bool) -> Rows:
    """cuDNN and XLA in bfloat16 against the whole square in float32: values and the three gradients."""
    shapes = ((4, 2, 64),) if tiny else SHAPES
    on_gpu = cudnn.obstacle(jax.devices()[0], jnp.bfloat16, 64) is None
    for N, K, H in shapes:
        for T in (256,) if tiny else (1024, 4096):
            case = _Attention(N, K, H, T)
            if T != 1024:
                yield case.row("xla", "xla")
            if on_gpu:
                yield case.row("cudnn", cudnn.Cudnn(16))
                if T == 1024:
                    yield case.row("cudnn, in shard_map", cudnn.Cudnn(16), mesh=True)
                    yield case.row("cudnn, 64 segments", cudnn.Cudnn(64))
    if on_gpu:
        yield _grouped(_Attention(28, 4, 128, 2048))


class _Attention:
    """Random q, k, v, with rows of random segments (one of a single token) and padding at the end, of one segment with
    padding, and of one segment as long as the row."""

    def __init__(self, N: int, K: int, H: int, T: int):
        self.shape, rng = (N, K, H, T), np.random.default_rng([N, T])
        self.positions, self.segments = np.zeros((2, 3, T), np.int32)
        for b, lengths in enumerate(([1, *rng.integers(2, T // 6, 8)], [T - T // 5], [T])):
            end = 0
            for number, length in enumerate(lengths, start=1):
                start, end = end, end + int(length)
                self.segments[b, start:end], self.positions[b, start:end] = number, np.arange(length)
        self.real = (self.segments > 0)[:, :, None, None]
        sizes = [(3, T, heads, H) for heads in (N, K, K, N)]
        arrays = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in sizes)
        *self.arrays, cotangent = arrays
        self.cotangent = jnp.where(self.real, cotangent, 0)

    def name(self, what: str) -> str:
        N, K, H, T = self.shape
        return f"{what} {N},{K},{H} T={T}"

    def run(self, attention: Callable, arrays: list[jax.Array]) -> Callable:
        """A call that returns the output and the gradients of q, k and v."""

        # All arrays are arguments: as constants they would be folded, for minutes.
        rest = (self.cotangent, jnp.asarray(self.real), jnp.asarray(self.positions), jnp.asarray(self.segments))

        def loss(q, k, v, cotangent, real, positions, segments) -> tuple[jax.Array, jax.Array]:
            out = attention(q, k, v, positions, segments)
            return jnp.sum((out * cotangent).astype(jnp.float32)), jnp.where(real, out, 0)

        both = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

        def call() -> list[jax.Array]:
            grads, out = both(*arrays, *rest)
            return [out, *grads]

        return call

    @functools.cached_property
    def expected(self) -> list[np.ndarray]:
        """The whole square in float32."""
        N, K, H, T = self.shape

        def square(q, k, v, positions, segments) -> jax.Array:
            seen = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None]
            seen &= jnp.arange(T)[:, None] >= jnp.arange(T)
            k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
            scores = jnp.where(seen[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5, -1e30)
            return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)

        with jax.default_matmul_precision("highest"):
            call = self.run(square, [x.astype(jnp.float32) for x in self.arrays])
            return [np.asarray(x) for x in call()]

    def row(self, what: str, implementation: Resolved, *, mesh: bool = False) -> dict[str, Any]:
        """Errors of the output and the gradients, and the speed of both passes (of what the masks leave)."""
        call = self.run(lambda *x: attend(*x, implementation), self.arrays)
        try:
            if mesh:
                with jax.set_mesh(single_device_mesh()):
                    errors, seconds = self.errors(call()), timed(call)
            else:
                errors, seconds = self.errors(call()), timed(call)
        except Exception as e:
            return {"name": self.name(what), "ok": False, "failed": " ".join(str(e).split())[:300]}
        N, _, H, _ = self.shape
        lengths = [int(n) for row in self.segments for n in np.bincount(row)[1:]]
        flops = sum(3.5 * 4 * N * H * n * (n + 1) / 2 for n in lengths)
        return {"name": self.name(what), **errors, "ms": 1e3 * seconds, "tflop_s": flops / seconds / 1e12}

    def errors(self, found: list[jax.Array]) -> dict[str, Any]:
        names, errors = ("out", "d_q", "d_k", "d_v"), {}
        for name, a, b in zip(names, found, self.expected, strict=True):
            a = np.asarray(a, np.float32)
            errors[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))  # NaN is no success
        return {"ok": all(error < MOST_ERROR for error in errors.values()), **errors}


def _grouped(case: _Attention) -> dict[str, Any]:
    """Whether cuDNN's own grouped heads are right in this JAX: then K and V need not be repeated."""
    from rmr1_jax.jax_private import cudnn_packed_attention

    def grouped(q, k, v, positions, segments) -> jax.Array:
        lengths, offsets, _ = cudnn.segment_spans(segments, 16)
        real = (segments > 0)[:, :, None, None]
        q, k, v = (jnp.where(real, x, 0) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jnp.where(real, cudnn_packed_attention(q, k, v, lengths, offsets), 0)

    try:
        call = case.run(grouped, case.arrays)
        return {"name": case.name("cudnn, grouped heads"), "found": case.errors(call()), "ms": 1e3 * timed(call)}
    except Exception as e:
        return {"name": case.name("cudnn, grouped heads"), "failed": " ".join(str(e).split())[:200]}


def model(case: str, *, out: Path, tiny: bool) -> Rows:
    """A small model on the device against the same on the CPU in float32: the loss of SFT, its gradients, and greedy
    samples."""
    config = dataclasses.replace(model_shape("Qwen2.5-0.5B"), num_layers=2, hidden_size=256, intermediate_size=512)
    config = dataclasses.replace(config, num_heads=4, num_kv_heads=2, vocab_size=512)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    mesh = make_mesh(MeshConfig(fsdp=1), [cpu])
    with jax.default_device(cpu), jax.set_mesh(mesh):
        params = jax.device_get(init_params(Qwen(config), jax.random.key(0), mesh=mesh))
    expected = _loss_and_gradients(config, params, cpu, "float32", "highest")
    for dtype, precision, most in (("float32", "highest", 1e-4), ("float32", None, 3e-2), ("bfloat16", None, 3e-2)):
        found = _loss_and_gradients(config, params, device, dtype, precision)
        norm = np.sqrt(sum(float(np.sum(np.square(b))) for b in expected[1]))
        error = np.sqrt(sum(float(np.sum(np.square(a - b))) for a, b in zip(found[1], expected[1], strict=True))) / norm
        loss = abs(found[0] - expected[0]) / expected[0]
        ok = bool(error < most and loss < most)
        yield {"name": f"{dtype} {precision or 'default'} precision", "ok": ok, "loss": loss, "gradients": float(error)}
    ours, theirs = (_greedy(config, params, where) for where in (device, cpu))
    same = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    yield {
        "name": "greedy tokens, float32",
        "ok": same == sum(map(len, theirs)),
        "same": same,
        "of": sum(map(len, theirs)),
    }


def _loss_and_gradients(config, params, device, dtype: str, precision: str | None) -> tuple[float, list[np.ndarray]]:
    mesh, rng = make_mesh(MeshConfig(fsdp=1), [device]), np.random.default_rng(0)
    segments = np.repeat(np.int32([1, 2, 3, 0]), [100, 250, 100, 62])[None].repeat(2, axis=0)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (100, 250, 100, 62)])[None].repeat(2, axis=0)
    batch = {"tokens": rng.integers(0, 512, (2, 512)).astype(np.int32), "positions": positions, "segment_ids": segments}
    batch["weights"] = np.where((segments > 0) & (positions > 0), 1 / 894, 0).astype(np.float32)
    forward = forward_options(SftConfig(out="unused", row_length=512, dtype=dtype), config, mesh)
    loss = functools.partial(sft_micro_loss, split(Qwen(config))[0], **forward)
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision), jax.default_device(device):
        placed = jax.device_put((params, batch), device)
        value, grads = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b)[0]))(*placed)
        return float(value), [np.asarray(x, np.float64) for x in jax.tree.leaves(grads)]


def _greedy(config, params, device) -> list[list[int]]:
    mesh = make_mesh(MeshConfig(fsdp=1), [device])
    prompts = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (5, 40, 70, 100)]
    sampling = SamplingConfig(max_new_tokens=32, temperature=0.0)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"), jax.default_device(device):
        weights = sampling_weights(with_params(Qwen(config), jax.device_put(params, device)), mesh=mesh)
        engine = Engine.for_prompts(Qwen(config), weights, prompts, sampling, mesh=mesh)
        samples, _ = engine.generate(weights, prompts, [])
    return [group[0].token_ids for group in samples]


PARTS = {"versions": versions, "attention": attention, "model": model}
