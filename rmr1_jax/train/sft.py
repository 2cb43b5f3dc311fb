"""Stage one: distillation SFT on reasoning traces.

Packed rows in, cross-entropy on the traces' tokens only, AdamW. `sft()` is the whole stage, read from top to bottom;
the arithmetic of a step is `sft_micro_loss` under `optim.update`. A run that was killed goes on from its last
checkpoint when it is called again with the same config. Next: `grpo.py`, the second stage.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from rmr1_jax.data.examples import Example
from rmr1_jax.data.packing import Batch, View, lengths_of, sft_batches
from rmr1_jax.data.store import open_examples
from rmr1_jax.distributed.mesh import check_micro_rows, make_mesh, own_rows
from rmr1_jax.distributed.preemption import Preempted
from rmr1_jax.model.qwen import Params, split
from rmr1_jax.policy import Policy, load
from rmr1_jax.train.config import SftConfig
from rmr1_jax.train.health import check_finite
from rmr1_jax.train.logprobs import forward_options, row_logprobs
from rmr1_jax.train.losses import sft_loss
from rmr1_jax.train.metrics import MetricsLog, mfu, progress, say, throughput, train_flops
from rmr1_jax.train.micro_batches import to_micro_batches
from rmr1_jax.train.optim import compile_update, init_state, lr_schedule, make_optimizer, master_weights
from rmr1_jax.train.run_directory import data_digest, kept_safe, same_data, save_model, start_run


def sft(config: SftConfig, *, policy: Policy | None = None, examples: Sequence[Example] | None = None) -> Policy:
    """Train, and return the trained policy (float32 weights), also saved as `out/model`.

    Args:
        policy, examples: used in place of `config.model` and `config.data` where given.

    Raises:
        InputError: something in the config or the data. RunError: the loss is no longer finite, a checkpoint cannot be
        written or none is sound. Preempted: on SIGTERM, when the state is on the disk.
    """
    out = Path(config.out)
    start_run(config, out)
    given = policy is not None
    policy = policy or load(config.model, config.dtype, make_mesh(config.mesh), master_dtype="float32")
    if examples is None:
        examples = open_examples(config.data, "sft", policy.tokenizer)
    examples = fitting(examples, config.row_length, config.on_too_long)
    check_micro_rows(policy.mesh, config.micro_rows)
    batching = {"row_length": config.row_length, "batch_rows": config.rows_per_step, "seed": config.seed}
    own = own_rows(policy.mesh, config.micro_rows)
    batching["own"] = [first + row for first in range(0, config.rows_per_step, config.micro_rows) for row in own]
    batches_of = functools.partial(sft_batches, examples, epochs=config.epochs, **batching)
    _, total = batches_of()
    total = min(total, config.max_steps or total)
    with jax.set_mesh(policy.mesh), kept_safe(config, out) as (checkpoints, preemption):
        params = master_weights(policy.params, keep=given)
        optimizer = make_optimizer(config.optimizer, total)
        state = init_state(params, optimizer, config.optimizer.memory)
        cursor = {"skipped": 0, "data": data_digest(examples)}
        if restored := checkpoints.restore(state):
            state, cursor = restored[0], same_data(restored[1], cursor)
        start = int(state.step)
        loss = functools.partial(sft_micro_loss, split(policy.model)[0], **forward_options(config, policy.mesh))
        step = compile_update(state, loss=loss, optimizer=optimizer, clip=config.optimizer.clip)
        log, schedule = MetricsLog(out, next_step=start), lr_schedule(config.optimizer, total)
        batches, _ = batches_of(start=start)
        bar = progress(start, total, "sft")
        saving = 0.0
        for i in bar:
            checkpoints.check()
            began = time.perf_counter()
            batch = next(batches)
            micro, facts = to_micro_batches(batch, config.micro_rows, policy.mesh)
            ready = time.perf_counter()
            state, metrics = step(state, micro, len(micro["tokens"]))
            row = {k: float(v) for k, v in jax.device_get(metrics).items()}
            done = time.perf_counter()
            lr = float(schedule(i - cursor["skipped"]))
            what = f"batch {i} of the data order (seed {config.seed})"
            members = functools.partial(members_of, examples, batch)
            if not check_finite(row, i, what, directory=out, state=state, batch=members, then=config.on_nonfinite):
                cursor["skipped"] += 1
            row |= {"lr": lr, "skipped": cursor["skipped"], "seconds": done - began}
            row |= {"data_seconds": ready - began, "update_seconds": done - ready, "checkpoint_seconds": saving}
            row |= throughput(facts["tokens"], done - began, policy.mesh)
            row |= mfu(train_flops(policy.config, batch.lengths), done - began, policy.mesh)
            log.write({"step": i, "stage": "sft"} | row | facts)
            bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=f"{row['tokens_per_second']:.0f}", refresh=False)
            saving, stopping = 0.0, preemption.reached()
            if checkpoints.due(i + 1) or stopping or i + 1 == total:
                saving = checkpoints.save(state, cursor, row)
            if stopping:
                raise Preempted
    trained = policy.with_params(state.params)
    save_model(trained, out / "model")
    return trained


def sft_micro_loss(
    graphdef: nnx.GraphDef, params: Params, batch: dict[str, jax.Array], **forward: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Cross-entropy over one micro-batch of packed rows, weighted by `weights` [B, T]; see `optim.MicroLoss`."""
    logp = row_logprobs(nnx.merge(graphdef, params), batch, **forward).logp
    return sft_loss(logp, batch["weights"]), {}


def members_of(examples: Sequence[Example], batch: Batch) -> list[dict[str, Any]]:
    """Id, tokens and trained tokens of every example in a batch."""
    members = [examples[i] for i in batch.items]
    return [{"id": x.id, "length": len(x), "trained": int(x.trained[1:].sum())} for x in members]


def fitting(examples: Sequence[Example], row_length: int, on_too_long: str) -> Sequence[Example]:
    """The examples that fit in a row; the others are dropped and counted aloud, where `on_too_long` is drop."""
    if on_too_long == "error":
        return examples  # sft_batches names them
    fits = lengths_of(examples) <= row_length
    if not fits.all():
        say(f"dropped {(~fits).sum()} of {len(examples)} examples longer than {row_length} tokens")
    return View(examples, fits.nonzero()[0])
