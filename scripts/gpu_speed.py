"""`gpu_check.py`: the speed of training and of decode at the shapes of real models, with random weights.
Read next: `gpu_stages.py`."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_alternation import CompiledUpdate
from bench_common import timed
from bench_sample import decode_dispatch, full_bank
from gpu_trace import profile

from rmr1_jax.data.examples import Example
from rmr1_jax.data.packing import mean_length
from rmr1_jax.distributed.chips import chip_of
from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.model.attention import segment_limit
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen, init_params, split, with_params
from rmr1_jax.plan.model import model_shape
from rmr1_jax.sampler import programs
from rmr1_jax.sampler.engine import Engine
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.shapes import PREFILL_ROWS
from rmr1_jax.sampler.weights import Weights, sampling_weights
from rmr1_jax.train.config import SftConfig
from rmr1_jax.train.logprobs import forward_options
from rmr1_jax.train.metrics import forward_flops, mfu, train_flops
from rmr1_jax.train.micro_batches import to_micro_batches
from rmr1_jax.train.optim import init_state, make_optimizer
from rmr1_jax.train.sft import batches_of, sft_micro_loss

STEPS = 5  # timed updates
MEAN_LENGTH = 1800  # tokens of an example, prompt and trace
PROMPT, NEW = 1024, 512  # tokens, of decode

Rows = Iterator[dict[str, Any]]


def shape(name: str, tiny: bool) -> QwenConfig:
    """The shape of a Qwen2.5 of this size; `7b/4` has four of its layers."""
    size, _, layers = name.partition("/")
    config = model_shape(f"Qwen2.5-{size}")
    if tiny:
        small = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2}
        return dataclasses.replace(config, **small, vocab_size=512)
    return dataclasses.replace(config, num_layers=int(layers)) if layers else config


def peak_gib() -> float:
    return round((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, 2)


def sft(case: str, *, out: Path, tiny: bool) -> Rows:
    """One step of SFT on packed rows of about 1,800 tokens an example; case: the model, and after a comma remat."""
    name, _, remat = case.partition(",")
    model, mesh = shape(name, tiny), single_device_mesh()
    T, rows, mean = (128, 2, 40) if tiny else (4096, 4, MEAN_LENGTH)
    config = SftConfig(out="unused", row_length=T, micro_rows=rows, rows_per_step=rows, remat=remat or "full")
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean * 0.94), 0.357, 32 if tiny else 1024).astype(int), 8, T)
    examples = [
        Example(str(i), rng.integers(0, model.vocab_size, n).astype(np.int32), np.arange(n) >= n // 2)
        for i, n in enumerate(lengths)
    ]
    forward = forward_options(config, model, mesh, mean_length(examples))
    attention, most = forward["attention"], segment_limit(forward["attention"])
    batches, _ = batches_of(config, examples, mesh, most)()
    batch = next(batches)
    ((micro, _),), facts = to_micro_batches(batch, rows, mesh)
    optimizer = make_optimizer(config.optimizer, 100)
    with jax.set_mesh(mesh):
        state = init_state(init_params(Qwen(model), jax.random.key(0), mesh=mesh), optimizer)
        loss = functools.partial(sft_micro_loss, split(Qwen(model))[0], **forward)
        update = CompiledUpdate(state, micro, len(micro["tokens"]), loss=loss, optimizer=optimizer)
        del state
        made = [update() for _ in range(1 + STEPS)]
        seconds = float(np.median([one["seconds"] for one in made[1:]]))
        named = f"sft-{name.replace('/', '_')}-{config.remat}"
        traced = profile(out, named, update)
    yield {
        "name": f"{name} {rows}x{T} {config.remat}",
        "ok": bool(np.isfinite([one["loss"] for one in made]).all()),
        "tokens_s": facts["tokens"] / seconds,
        "mfu": mfu(train_flops(model, batch.lengths), seconds, mesh).get("mfu"),
        "ms": 1e3 * seconds,
        "packed": facts["packed"],
        "attention": attention if most is None else f"cudnn, {most} segments",
        "compile_s": update.compile_seconds,
        "temporaries_gib": round(update.temporaries / 2**30, 2),
        "peak_gib": peak_gib(),
        **traced,
    }


def decode(case: str, *, out: Path, tiny: bool) -> Rows:
    """A step of decode: prompts of 1,024 tokens, rings of 512 columns, samples at their end, where each step reads
    most. case: the model, the slots, and the samples of a prompt; with one, the prefill is measured too."""
    name, slots, group = (*case.split(","), "1")[:3]
    slots, group = (8, 2) if tiny else (int(slots), int(group))
    prompt, new = (64, 64) if tiny else (PROMPT, NEW)
    model, mesh, dtype = shape(name, tiny), single_device_mesh(), jnp.bfloat16
    sampling = SamplingConfig(n=group, max_new_tokens=new, slots=slots, cache_gib=None if tiny else 60)
    engine = Engine(Qwen(model), sampling, prompts=slots // group, longest=prompt, mesh=mesh, dtype=dtype)
    weights = random_weights(model, dtype)
    width = engine.shapes.widths[-1]
    if group == 1 or tiny:
        yield prefill(name, engine, weights)
    bank = full_bank(engine, slots, prompt, drawn=width - programs.STEPS - 1)
    dispatch, cache = decode_dispatch(engine, weights, bank, width)
    compiling = timed(dispatch)
    seconds = float(np.median([timed(dispatch) for _ in range(10)])) / programs.STEPS
    traced = profile(out, f"decode-{name}-{slots}x{group}", dispatch)
    column = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.dtype.itemsize
    read = {"weights": weight_bytes(weights, model)}
    read["cache"] = column * (slots // group * (prompt - 1) + slots * (width - programs.STEPS / 2))
    chip = chip_of(jax.devices()[0])
    yield {
        "name": f"{name} {slots} slots, n={group}",
        "ok": True,
        "tokens_s": slots / seconds,
        "bandwidth": sum(read.values()) / seconds / chip.memory if chip and chip.memory else None,
        "ms": 1e3 * seconds,
        "weights_gib": round(read["weights"] / 2**30, 2),
        "live_cache_gib": round(read["cache"] / 2**30, 2),
        "held_cache_gib": round(sum(x.nbytes for x in jax.tree.leaves(cache[0])) / 2**30, 2),
        "compile_s": compiling,
        "peak_gib": peak_gib(),
        **traced,
    }


def random_weights(model: QwenConfig, dtype: Any) -> Weights:
    """Random weights in the layout of the sampler; only its copy stays on the device."""
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        params = init_params(Qwen(model), jax.random.key(0), dtype=dtype, mesh=mesh)
        weights = jax.block_until_ready(sampling_weights(with_params(Qwen(model), params), dtype=dtype))
    del params
    gc.collect()
    return weights


def weight_bytes(weights: Weights, model: QwenConfig) -> int:
    """The bytes that a step reads: of an embedding that is no head, only a few rows."""
    total = sum(x.nbytes for x in jax.tree.leaves(weights))
    return total - (0 if model.tie_word_embeddings else weights["embed"].nbytes)


def prefill(name: str, engine: Engine, weights: Weights) -> dict[str, Any]:
    """The last chunk of as many prompts as one prefill computes."""
    shapes, model = engine.shapes, engine.config
    chunk = min(256, shapes.room)
    rows = min(PREFILL_ROWS, shapes.entries)
    with jax.set_mesh(engine.mesh):
        cache = [engine.empty_cache(shapes.widths[0])]
    tokens = np.zeros((1, PREFILL_ROWS, chunk), np.int32)
    entries = np.arange(PREFILL_ROWS, dtype=np.int32)[None] % shapes.entries
    starts = np.full_like(entries, shapes.room - chunk)

    def call() -> None:
        with jax.set_mesh(engine.mesh):
            cache[0] = programs.prefill(
                engine.graphdef, weights, cache[0], tokens, entries, starts, np.arange(PREFILL_ROWS)[None] < rows
            )
            jax.block_until_ready(cache[0])

    compiling = timed(call)
    seconds = float(np.median([timed(call) for _ in range(5)]))
    flops = PREFILL_ROWS * (forward_flops(model, [shapes.room]) - forward_flops(model, [shapes.room - chunk]))
    flops -= 2 * PREFILL_ROWS * chunk * model.vocab_size * model.hidden_size  # it has no head
    return {
        "name": f"{name} prefill {PREFILL_ROWS}x{chunk}",
        "ok": True,
        "tokens_s": PREFILL_ROWS * chunk / seconds,
        "mfu": mfu(flops, seconds, engine.mesh).get("mfu"),
        "ms": 1e3 * seconds,
        "compile_s": compiling,
    }


PARTS = {"sft": sft, "decode": decode}
