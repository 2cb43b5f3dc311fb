"""Stage one: distillation SFT on reasoning traces.

Packed rows in, cross-entropy on the traces' tokens only, AdamW. `sft()` is the whole stage, read from top to bottom;
the arithmetic of a step is `sft_micro_loss` under `optim.update`. A run that was killed goes on from its last
checkpoint when it is called again with the same config. Next: `grpo.py`, the second stage.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rmr1_jax.data.pipeline import Batch, sft_batches
from rmr1_jax.data.published import read_published
from rmr1_jax.data.tokens import Example
from rmr1_jax.errors import InputError
from rmr1_jax.mesh import MeshConfig, check_micro_rows, make_mesh, own_rows, place_rows
from rmr1_jax.model import qwen
from rmr1_jax.model.attention import Implementation
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.policy import DTYPES, Policy, load
from rmr1_jax.train.checkpoint import Checkpointer, start_run
from rmr1_jax.train.logprobs import forward_options, row_logprobs
from rmr1_jax.train.losses import sft_loss
from rmr1_jax.train.metrics import MetricsLog, progress, say
from rmr1_jax.train.optim import (
    OptimConfig,
    check_finite,
    compile_update,
    init_state,
    lr_schedule,
    make_optimizer,
    master_weights,
)
from rmr1_jax.train.throughput import mfu, throughput, train_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """A distillation run. Lengths are in tokens, batches in packed rows.

    model: a Hugging Face directory or hub id. data: published rows (`context_messages`, `winner` = the trace), JSONL
    or parquet. out: the run directory. micro_rows: rows that are on the device at once; a step accumulates
    rows_per_step / micro_rows of them.
    """

    model: str = ""
    data: str = ""
    out: str
    seed: int = 0
    epochs: int = 1
    max_steps: int | None = None
    row_length: int = 12288
    rows_per_step: int = 8
    micro_rows: int = 8
    on_too_long: str = "error"
    optimizer: OptimConfig = OptimConfig()
    dtype: str = "bfloat16"
    remat: qwen.Remat = "full"
    attention: Implementation = "auto"
    mesh: MeshConfig = MeshConfig()
    save_every: int = 100
    keep: int = 2

    def __post_init__(self):
        for name in ("epochs", "max_steps", "row_length", "rows_per_step", "micro_rows", "save_every", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed={self.seed} must be at least 0")
        if self.rows_per_step % self.micro_rows:
            raise InputError(f"rows_per_step={self.rows_per_step} must be a multiple of micro_rows={self.micro_rows}")
        if self.on_too_long not in ("error", "drop"):
            raise InputError(f"on_too_long={self.on_too_long!r} must be error or drop")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")


def sft(config: SftConfig, *, policy: Policy | None = None, examples: Sequence[Example] | None = None) -> Policy:
    """Train, and return the trained policy (float32 weights), also saved as `out/model`.

    Args:
        policy, examples: used in place of `config.model` and `config.data` where given.

    Raises:
        InputError: something in the config or the data. RunError: the loss is no longer finite.
    """
    out = Path(config.out)
    start_run(config, out)
    given = policy is not None
    policy = policy or load(config.model, config.dtype, make_mesh(config.mesh), master_dtype="float32")
    if examples is None:
        examples = [policy.tokenizer.example(r.id, r.messages, r.trace) for r in read_published(config.data)]
    examples = fitting(examples, config.row_length, config.on_too_long)
    check_micro_rows(policy.mesh, config.micro_rows)
    batching = {"row_length": config.row_length, "batch_rows": config.rows_per_step, "seed": config.seed}
    own = own_rows(policy.mesh, config.micro_rows)
    batching["own"] = [first + row for first in range(0, config.rows_per_step, config.micro_rows) for row in own]
    batches_of = functools.partial(sft_batches, examples, epochs=config.epochs, **batching)
    _, total = batches_of()
    total = min(total, config.max_steps or total)
    with jax.set_mesh(policy.mesh):
        params = master_weights(policy.params, keep=given)
        optimizer = make_optimizer(config.optimizer, total)
        state = init_state(params, optimizer, config.optimizer.memory)
        checkpoints = Checkpointer(out, keep=config.keep)
        restored = checkpoints.restore(state)
        state = restored[0] if restored else state
        start = int(state.step)
        loss = functools.partial(sft_micro_loss, policy.config, **forward_options(config, policy.mesh))
        step = compile_update(state, loss=loss, optimizer=optimizer, clip=config.optimizer.clip)
        log, schedule = MetricsLog(out, next_step=start), lr_schedule(config.optimizer, total)
        batches, _ = batches_of(start=start)
        bar = progress(start, total, "sft")
        saving = 0.0
        for i in bar:
            began = time.perf_counter()
            batch = next(batches)
            micro, facts = to_micro_batches(batch, config.micro_rows, policy.mesh)
            ready = time.perf_counter()
            state, metrics = step(state, micro, len(micro["tokens"]))
            row = {k: float(v) for k, v in jax.device_get(metrics).items()}
            check_finite(row, i, f"batch {i} of the data order (seed {config.seed})")
            done = time.perf_counter()
            row |= {"lr": float(schedule(i)), "seconds": done - began}
            row |= {"data_seconds": ready - began, "update_seconds": done - ready, "checkpoint_seconds": saving}
            row |= throughput(facts["tokens"], done - began, policy.mesh)
            row |= mfu(train_flops(policy.config, batch.lengths), done - began, policy.mesh)
            log.write({"step": i, "stage": "sft"} | row | facts)
            bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=f"{row['tokens_per_second']:.0f}", refresh=False)
            saving = 0.0
            if (i + 1) % config.save_every == 0 or i + 1 == total:
                saving = checkpoints.save(state, {"next_batch": i + 1})
        checkpoints.close()
    trained = policy.with_params(state.params)
    trained.save(out / "model")
    return trained


def sft_micro_loss(
    config: QwenConfig, params: qwen.Params, batch: dict[str, jax.Array], **forward: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Cross-entropy over one micro-batch of packed rows, weighted by `weights` [B, T]; see `optim.MicroLoss`."""
    logp = row_logprobs(config, params, batch, **forward).logp
    return sft_loss(logp, batch["weights"]), {}


def to_micro_batches(batch: Batch, micro_rows: int, mesh: Mesh) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """[rows, T] -> [A, micro_rows, T] on the mesh, with the loss averaged over the trained tokens of the whole step;
    and facts about the whole batch for the metrics."""
    rows = dict(batch.rows)
    rows["weights"] = rows.pop("trained") / max(1, batch.trained_tokens)
    own = len(own_rows(mesh, micro_rows))
    micro = {k: v.reshape(-1, own, v.shape[-1]) for k, v in rows.items()}
    positions = len(micro["tokens"]) * micro_rows * rows["tokens"].shape[-1]
    tokens = sum(batch.lengths)
    facts = {"tokens": tokens, "trained_tokens": batch.trained_tokens, "packed": tokens / positions}
    return place_rows(mesh, "ABT", micro, micro_rows), facts


def fitting(examples: Sequence[Example], row_length: int, on_too_long: str) -> list[Example]:
    """The examples that fit in a row; the others are dropped and counted aloud, where `on_too_long` is drop."""
    if on_too_long == "error":
        return list(examples)  # sft_batches names them
    kept = [x for x in examples if len(x) <= row_length]
    if len(kept) < len(examples):
        say(f"dropped {len(examples) - len(kept)} of {len(examples)} examples longer than {row_length} tokens")
    return kept
