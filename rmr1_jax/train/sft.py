"""Stage one: distillation SFT on reasoning traces.

Packed rows, cross-entropy on the tokens of the traces only, AdamW. `sft` is the whole stage, in the order in which data
flows; the arithmetic of a step is `sft_micro_loss` inside `optim.update`. A killed run continues from its last
checkpoint when it is called again with the same config. Next: `grpo.py`, the second stage.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from rmr1_jax.data.examples import Example
from rmr1_jax.data.packing import Batch, Packing, mean_length, sft_batches
from rmr1_jax.data.store import open_examples, prompt_of
from rmr1_jax.distributed.mesh import check_micro_rows, own_rows
from rmr1_jax.distributed.terminal import say
from rmr1_jax.model.attention import segment_limit
from rmr1_jax.model.qwen import Params, split
from rmr1_jax.policy import Policy
from rmr1_jax.train.announce import header
from rmr1_jax.train.config import SftConfig
from rmr1_jax.train.evaluation import sft_evaluation
from rmr1_jax.train.health import check_finite
from rmr1_jax.train.logprobs import forward_options, row_logprobs
from rmr1_jax.train.losses import sft_loss
from rmr1_jax.train.metrics import as_floats, mfu, throughput, train_flops
from rmr1_jax.train.micro_batches import drop_longer, to_micro_batches
from rmr1_jax.train.optim import compile_update, init_state, lr_schedule, make_optimizer, master_weights
from rmr1_jax.train.run import load_policy, open_run
from rmr1_jax.train.run_directory import check_run, data_digest, save_model, start_run


def sft(
    config: SftConfig,
    *,
    policy: Policy | None = None,
    examples: Sequence[Example] | None = None,
    eval_examples: Sequence[Example] | None = None,
) -> Policy:
    """Train, and return the trained policy (float32 weights), which is also saved as `out/model`. `policy`, `examples`
    and `eval_examples` are used instead of `config.model`, `config.data` and `config.eval_data`.

    Raises InputError if the config or the data is wrong; RunError if the loss is not finite, a checkpoint cannot be
    written, or all are damaged; Preempted after SIGTERM, when the state is saved.
    """
    check_run(config, Path(config.out))
    given, prompt = policy is not None, None
    policy = policy or load_policy(config, reads_data=examples is None)
    if examples is None:
        examples, prompt = open_examples(config.data, "sft", policy.tokenizer), prompt_of(config.data)
    if eval_examples is None and config.eval_data:
        eval_examples = open_examples(config.eval_data, "sft", policy.tokenizer)
    if config.on_too_long == "drop":
        examples = drop_longer(examples, config.row_length, "examples")
    check_micro_rows(policy.mesh, config.micro_rows)
    forward = forward_options(config, policy.config, policy.mesh, mean_length(examples))
    make_batches = batches_of(config, examples, policy.mesh, segment_limit(forward["attention"]))
    total = make_batches()[1]
    steps = min(total, config.max_steps or total)
    evaluation = sft_evaluation(config, policy, eval_examples)
    start_run(config, Path(config.out))
    say(header(config, policy, examples, steps))
    with jax.set_mesh(policy.mesh), open_run(config, "sft") as run:
        optimizer, schedule = make_optimizer(config.optimizer, steps), lr_schedule(config.optimizer, steps)
        state = init_state(master_weights(policy.params, keep=given), optimizer, config.optimizer.memory)
        state, cursor = run.restore(state, {"skipped": 0, "data": data_digest(examples)})
        loss = functools.partial(sft_micro_loss, split(policy.model)[0], **forward)
        update = compile_update(state, loss=loss, optimizer=optimizer, clip=config.optimizer.clip)
        batches, _ = make_batches(start=int(state.step))
        for step in run.steps(int(state.step), steps):
            batch = next(batches)
            stacks, facts = to_micro_batches(batch, config.micro_rows, policy.mesh)
            run.lap("data_seconds")
            state, metrics = update(state, stacks)
            row = as_floats(metrics)
            run.lap("update_seconds")
            lr = float(schedule(step - cursor["skipped"]))
            what = f"batch {step} of the data order (seed {config.seed})"
            describe = functools.partial(describe_batch, examples, batch)
            if not check_finite(row, step, what, state=state, describe=describe, config=config):
                cursor["skipped"] += 1
            row |= {"lr": lr, "skipped": cursor["skipped"]} | throughput(facts["tokens"], run.seconds, policy.mesh)
            row |= mfu(train_flops(policy.config, batch.lengths), run.seconds, policy.mesh) | facts
            row |= run.evaluate(evaluation, state.params)
            shown = {"loss": f"{row['loss']:.3f}", "tok_s": f"{row['tokens_per_second']:.0f}"}
            run.record(row, state, cursor, **shown)
    return save_model(policy.with_params(state.params), Path(config.out), prompt)


def sft_micro_loss(
    graphdef: nnx.GraphDef, params: Params, batch: dict[str, Shaped[Array, "B _"]], **forward: Any
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Cross-entropy over one micro-batch of packed rows, weighted by `weights` [B, T]; see `optim.MicroLoss`."""
    logp = row_logprobs(nnx.merge(graphdef, params), batch, **forward).logp
    return sft_loss(logp, batch["weights"]), {}


def batches_of(
    config: SftConfig, examples: Sequence[Example], mesh: Mesh, max_items: int | None = None
) -> functools.partial:
    """`sft_batches` of a run, of which this process reads its own rows; takes `start`."""
    own = own_rows(mesh, config.micro_rows)
    own = [first + row for first in range(0, config.rows_per_step, config.micro_rows) for row in own]
    options = {"row_length": config.row_length, "batch_rows": config.rows_per_step, "seed": config.seed, "own": own}
    options["packing"] = Packing(max_items, config.short_rows, config.micro_rows)
    return functools.partial(sft_batches, examples, epochs=config.epochs, **options)


def describe_batch(examples: Sequence[Example], batch: Batch) -> list[dict[str, Any]]:
    """Id, tokens and trained tokens of every example in a batch."""
    members = [examples[i] for i in batch.items]
    return [{"id": x.id, "length": len(x), "trained": int(x.trained[1:].sum())} for x in members]
