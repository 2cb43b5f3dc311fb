"""`gpu_check.py`: versions and ceilings of the machine, and whether a small model computes on a GPU what it computes on
a CPU. Read next: `gpu_attention.py`."""

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
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.model import cudnn
from rmr1_jax.model.qwen import Qwen, init_params, split, with_params
from rmr1_jax.plan.model import model_shape
from rmr1_jax.sampler.engine import Engine
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.weights import sampling_weights
from rmr1_jax.train.config import SftConfig
from rmr1_jax.train.logprobs import forward_options
from rmr1_jax.train.sft import sft_micro_loss

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "transformers", "nvidia-cudnn-cu13")

Rows = Iterator[dict[str, Any]]


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """The seconds of a call among several in flight, after a first one that compiles."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready([call() for _ in range(repeats)])
    return (time.perf_counter() - start) / repeats


def versions(case: str, *, out: Path, tiny: bool) -> Rows:
    """What is installed, which modules cannot be imported, and what the device reaches in the two simplest programs: a
    copy (the bytes read and written), and a product of two matrices."""
    device = jax.devices()[0]
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    facts = {"kind": device.device_kind, "capability": getattr(device, "compute_capability", None)}
    stats = device.memory_stats() or {}
    facts["memory_gib"] = round(stats.get("bytes_limit", 0) / 2**30, 1)
    yield {"name": "device", **facts, "driver": driver(), "xla_flags": os.environ.get("XLA_FLAGS", "")}
    yield {"name": "packages", **{name: installed.get(name) for name in PACKAGES}}
    failed = {}
    modules = [m.name for m in pkgutil.walk_packages(rmr1_jax.__path__, "rmr1_jax.")]
    for name in modules:
        if not name.endswith("__main__"):
            try:
                importlib.import_module(name)
            except Exception as e:
                failed[name] = repr(e)[:100]
    needed = not {name for name in failed if name.split(".")[1] in ("model", "sampler", "train", "quickstart")}
    yield {"name": "imports", "modules": len(modules), "not_imported": failed, "ok": needed}
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


def model(case: str, *, out: Path, tiny: bool) -> Rows:
    """A small model on the device against the same on the CPU in float32. case: `loss`, that of SFT and its gradients,
    or `greedy`, samples."""
    config = dataclasses.replace(model_shape("Qwen2.5-0.5B"), num_layers=2, hidden_size=256, intermediate_size=512)
    config = dataclasses.replace(config, num_heads=4, num_kv_heads=2, vocab_size=512)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    mesh = make_mesh(MeshConfig(fsdp=1), [cpu])
    with jax.default_device(cpu), jax.set_mesh(mesh):
        params = jax.device_get(init_params(Qwen(config), jax.random.key(0), mesh=mesh))
    if case == "greedy":
        ours, theirs = (_greedy(config, params, where) for where in (device, cpu))
        same = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
        of = sum(map(len, theirs))
        yield {"name": "greedy tokens, float32", "ok": same == of, "same": same, "of": of}
        return
    expected = _loss_and_gradients(config, params, cpu, "float32", "highest")
    for dtype, precision, most in (("float32", "highest", 1e-4), ("bfloat16", None, 3e-2), ("float32", None, 3e-2)):
        found = _loss_and_gradients(config, params, device, dtype, precision)
        norm = np.sqrt(sum(float(np.sum(np.square(b))) for b in expected[1]))
        error = np.sqrt(sum(float(np.sum(np.square(a - b))) for a, b in zip(found[1], expected[1], strict=True))) / norm
        loss = abs(found[0] - expected[0]) / expected[0]
        ok = bool(error < most and loss < most)
        yield {"name": f"{dtype} {precision or 'default'} precision", "ok": ok, "loss": loss, "gradients": float(error)}


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
    # All are cut into chunks of 16 tokens, so that each device compiles one prefill.
    prompts = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (5, 16, 33, 47)]
    sampling = SamplingConfig(max_new_tokens=32, temperature=0.0)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"), jax.default_device(device):
        weights = sampling_weights(with_params(Qwen(config), jax.device_put(params, device)), mesh=mesh)
        engine = Engine.for_prompts(Qwen(config), weights, prompts, sampling, mesh=mesh)
        samples, _ = engine.generate(weights, prompts, [])
    return [group[0].token_ids for group in samples]


PARTS = {"versions": versions, "model": model}
