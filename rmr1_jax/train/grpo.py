"""Stage two: GRPO with a verifiable reward.

Each step: sample R traces for each of P prompts, score them, and update the policy on the packed results in
mini-batches (several updates for one rollout batch). `grpo()` is the whole stage, read from top to bottom;
`losses.policy_loss` is the objective and `rollout.py` what is trained on. A killed run goes on from its last
checkpoint when it is called again with the same config. Of several processes each samples and scores its share of the
prompts on its own devices; the results are gathered, and all train on them together.

Extending: `reward(text, prompt) -> float` and `loss` (the signature of `losses.policy_loss`) are functions handed in.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rmr1_jax.data.packing import View, lengths_of
from rmr1_jax.data.store import open_examples
from rmr1_jax.distributed.mesh import check_micro_rows, make_mesh, own_rows, place_rows, sampling_mesh
from rmr1_jax.distributed.preemption import Preempted
from rmr1_jax.errors import InputError
from rmr1_jax.model.qwen import Params, split
from rmr1_jax.policy import DTYPES, Policy, load
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.health import CollapseWatch, check_finite
from rmr1_jax.train.logprobs import forward_options, row_logprobs
from rmr1_jax.train.losses import PolicyLoss, mean_metrics, policy_loss
from rmr1_jax.train.metrics import MetricsLog, mfu, progress, say, throughput, train_flops
from rmr1_jax.train.micro_batches import mini_batch
from rmr1_jax.train.optim import (
    compile_update,
    in_memory,
    init_state,
    lr_schedule,
    make_optimizer,
    master_weights,
)
from rmr1_jax.train.rollout import Group, Reward, RlPrompt, facts_of, make_reward, roll_out, rollout_metrics
from rmr1_jax.train.run_directory import data_digest, kept_safe, same_data, save_model, start_run


def grpo(
    config: GrpoConfig,
    *,
    policy: Policy | None = None,
    prompts: Sequence[RlPrompt] | None = None,
    reward: Reward | None = None,
    loss: PolicyLoss = policy_loss,
    on_rollout: Callable[[int, list[Group]], None] | None = None,
) -> Policy:
    """Train, and return the trained policy (float32 weights), also saved as `out/model`.

    Args:
        policy, prompts: used in place of `config.model` and `config.data` where given.
        reward, loss: see the module's docstring; by default the reward that the config names, and GRPO's loss.
        on_rollout: called with the step and its groups, to look at them; on every process with all groups.

    Raises:
        InputError: something in the config or the data. RunError: the loss is no longer finite, a checkpoint cannot be
        written or none is sound. Preempted: on SIGTERM, when the state is on the disk.
    """
    out = Path(config.out)
    start_run(config, out)
    given, reward = policy is not None, reward or make_reward(config.reward, config.structure)
    policy = policy or load(config.model, config.dtype, make_mesh(config.mesh), master_dtype="float32")
    prompts = prompts if prompts is not None else read_prompts(config.data, policy)
    prompts = _short_enough(prompts, config.max_prompt_length)
    _check_devices(config, policy.mesh)
    steps = config.steps or max(1, len(prompts) // config.prompts_per_step)
    with jax.set_mesh(policy.mesh), kept_safe(config, out) as (checkpoints, preemption):
        trainer = _Trainer(config, policy, loss, steps * config.updates_per_step, keep=given)
        cursor = {"prompts_consumed": 0, "skipped": 0, "data": data_digest(prompts)}
        if restored := checkpoints.restore(trainer.state):
            trainer.state, cursor = restored[0], same_data(restored[1], cursor)
        trainer.skipped = cursor["skipped"]
        start = int(trainer.state.step) // config.updates_per_step
        log, watch = MetricsLog(out, next_step=start), CollapseWatch()
        bar = progress(start, steps, "grpo")
        saving = 0.0
        for step in bar:
            checkpoints.check()
            began = time.perf_counter()
            consumed = cursor["prompts_consumed"]
            try:
                groups, drawn, facts = roll_out(
                    config, policy, trainer.state.params, prompts, consumed, step, reward, preemption.interruptible
                )
                if preemption.reached():
                    raise Preempted
            except Preempted:
                preemption.reached()  # all are here
                checkpoints.save(trainer.state, cursor)  # what goes on from it makes the same rollout again
                raise
            rolled = time.perf_counter()
            if on_rollout:
                on_rollout(step, groups)
            row = trainer.train(groups, step)
            cursor |= {"prompts_consumed": consumed + drawn, "skipped": trainer.skipped}
            seconds = time.perf_counter() - began
            row |= rollout_metrics(groups, config.structure) | facts
            row |= {"seconds": seconds, "rollout_seconds": rolled - began, "checkpoint_seconds": saving}
            tokens = facts["prompt_tokens"] + facts["new_tokens"]
            row |= {k: cursor[k] for k in ("prompts_consumed", "skipped")} | throughput(tokens, seconds, policy.mesh)
            log.write({"step": step, "stage": "grpo"} | row)
            watch.look(row, step)
            bar.set_postfix(reward=f"{row['reward']:.3f}", length=f"{row['response_length']:.0f}", refresh=False)
            saving, stopping = 0.0, preemption.reached()
            if checkpoints.due(step + 1) or stopping or step + 1 == steps:
                saving = checkpoints.save(trainer.state, cursor, row)
            if stopping:
                raise Preempted
    trained = policy.with_params(trainer.state.params)
    save_model(trained, out / "model")
    return trained


def read_prompts(path: str | Path, policy: Policy) -> Sequence[RlPrompt]:
    """Published RLVR rows, or a prepared set of them, as prompts.

    Raises:
        InputError: a row holds a trace and does not say which side is better.
    """
    examples = open_examples(path, "grpo", policy.tokenizer)
    return View(examples, np.arange(len(examples)), lambda x: RlPrompt(x.id, x.tokens, x.better, x))


class _Trainer:
    """The device side of a step: the state, and the two compiled programs that read and write it."""

    def __init__(self, config: GrpoConfig, policy: Policy, loss: PolicyLoss, updates: int, *, keep: bool):
        self.config, self.model, self.mesh, self.out = config, policy.config, policy.mesh, Path(config.out)
        self.reference = None
        if config.loss.kl_coef:
            # In the dtype of the products, to which its weights would be cast anyway.
            reference = jax.tree.map(lambda x: jnp.array(x, DTYPES[config.dtype]), policy.params)
            self.reference = in_memory(reference, config.reference_memory)
        params = master_weights(policy.params, keep=keep)
        optimizer = make_optimizer(config.optimizer, updates)
        self.state = init_state(params, optimizer, config.optimizer.memory)
        self.schedule = lr_schedule(config.optimizer, updates)
        # With one update a step the policy being trained is the one that sampled, and old = new.
        self.needs_old = config.updates_per_step > 1
        # That a zero advantage means a zero term is known of our own loss only, and only where it has no other term.
        self.skip_unmixed = loss is policy_loss and not (config.loss.kl_coef or config.loss.entropy_coef)
        forward = forward_options(config, policy.mesh) | {"temperature": config.sampling.temperature or 1.0}
        graphdef = split(policy.model)[0]
        micro_loss = functools.partial(grpo_micro_loss, graphdef, config, loss, **forward)
        self._update = compile_update(self.state, loss=micro_loss, optimizer=optimizer, clip=config.optimizer.clip)
        self._logprobs = jax.jit(functools.partial(batch_logprobs, graphdef, **forward))
        self.skipped = 0  # updates that were not finite

    def train(self, groups: list[Group], step: int) -> dict[str, float]:
        """All updates of one rollout batch. The metrics are means over its updates, without those that were skipped
        where there are others; `trained_tokens` is their sum, and what ends in `_max` their largest."""
        began = time.perf_counter()
        batches = self._prepare(groups)
        prepared = time.perf_counter()
        rows, skipped = [], []
        flops = 0.0
        for update, (batch, count, lengths) in enumerate(batches):
            self.state, metrics = self._update(self.state, batch, count)
            whole = {k: metrics.pop(k) for k in ("loss", "grad_norm")}  # no sums over tokens, as the others are
            row = {k: float(v) for k, v in jax.device_get(whole | mean_metrics(metrics)).items()}
            mini = groups[update * self.config.mini_batch_prompts :][: self.config.mini_batch_prompts]
            what = f"update {update} of the prompts {[g.prompt.id for g in mini][:8]}..."
            members, then = functools.partial(facts_of, mini), self.config.on_nonfinite
            applied = check_finite(row, step, what, directory=self.out, state=self.state, batch=members, then=then)
            positions = count * self.config.micro_rows * self.config.row_length
            (rows if applied else skipped).append(row | {"packed": sum(lengths) / positions})
            flops += train_flops(self.model, lengths)
        seconds = time.perf_counter() - prepared
        self.skipped += len(skipped)
        trained_tokens = sum(r["tokens"] for r in rows)
        rows = [{k: v for k, v in r.items() if k != "tokens"} for r in rows or skipped]
        joined = {k: float((max if k.endswith("_max") else np.mean)([r[k] for r in rows])) for k in rows[0]}
        lr = float(self.schedule(int(self.state.step) - 1 - self.skipped))
        joined |= {"lr": lr, "trained_tokens": trained_tokens}
        joined |= {"reference_seconds": prepared - began, "update_seconds": seconds}
        return joined | mfu(flops, seconds, self.mesh)

    def _prepare(self, groups: list[Group]) -> list[tuple[dict[str, jax.Array], int, list[int]]]:
        """The rollout batch as mini-batches on the mesh: arrays [A, micro_rows, T], how many micro-batches count, and
        the sequences' lengths. With the log-probabilities of the weights as they are before the first update."""
        config = self.config
        batches = []
        for start in range(0, len(groups), config.mini_batch_prompts):
            own, count, lengths = mini_batch(
                groups[start : start + config.mini_batch_prompts],
                row_length=config.row_length,
                micro_rows=config.micro_rows,
                aggregation=config.aggregation,
                max_new_tokens=config.sampling.max_new_tokens,
                max_segments=config.max_segments,
                skip_unmixed=self.skip_unmixed,
                own=own_rows(self.mesh, config.micro_rows),
            )
            batch = place_rows(self.mesh, "ABT", own, config.micro_rows)
            inputs = {k: batch[k] for k in ("tokens", "positions", "segment_ids")}
            if self.needs_old:
                batch["old_logp"] = self._logprobs(self.state.params, inputs, count)
            if self.reference is not None:
                batch["ref_logp"] = self._logprobs(in_memory(self.reference, "device"), inputs, count)
            batches.append((batch, count, lengths))
        return jax.block_until_ready(batches)


def grpo_micro_loss(
    graphdef: nnx.GraphDef,
    config: GrpoConfig,
    loss: PolicyLoss,
    params: Params,
    batch: dict[str, jax.Array],
    **forward: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The policy loss of one packed micro-batch (arrays [B, T]); see `optim.MicroLoss`. The number of trained tokens is
    among the metrics whatever `loss` returns, for the means."""
    logp, entropy = row_logprobs(nnx.merge(graphdef, params), batch, with_entropy=True, **forward)
    value, metrics = loss(
        config.loss,
        logp=logp,
        old_logp=batch.get("old_logp", jax.lax.stop_gradient(logp)),
        advantages=batch["advantages"],
        weights=batch["weights"],
        segment_ids=batch["segment_ids"],
        ref_logp=batch.get("ref_logp"),
        sampler_logp=batch["sampler_logp"],
        entropy=entropy,
        max_segments=config.max_segments,
    )
    return value, {"tokens": (batch["weights"] > 0).sum(dtype=jnp.float32)} | metrics


def batch_logprobs(
    graphdef: nnx.GraphDef, params: Params, batch: dict[str, jax.Array], count: jax.Array, **forward: Any
) -> jax.Array:
    """Log-probabilities [A, B, T] of the first `count` micro-batches under `params`, one micro-batch at a time."""

    def one(i, out):
        micro = {k: v[i] for k, v in batch.items()}
        return out.at[i].set(row_logprobs(nnx.merge(graphdef, params), micro, **forward).logp)

    return jax.lax.fori_loop(0, count, one, jnp.zeros(batch["tokens"].shape, jnp.float32))


def _check_devices(config: GrpoConfig, mesh: Mesh) -> None:
    """What the devices and processes cannot share is refused at once, not after a restore."""
    check_micro_rows(mesh, config.micro_rows)
    sampling_mesh(mesh, config.sampling_tensor)
    if config.prompts_per_step < (n := jax.process_count()):
        raise InputError(f"prompts_per_step={config.prompts_per_step} must be at least {n}, one for each process")


def _short_enough(prompts: Sequence[RlPrompt], limit: int) -> Sequence[RlPrompt]:
    """Longer prompts are dropped and counted aloud, as in the paper; never cut."""
    fits = lengths_of(prompts) <= limit
    if not fits.all():
        say(f"dropped {(~fits).sum()} of {len(prompts)} prompts longer than {limit} tokens")
    if not fits.any():
        raise InputError(f"no prompt is at most max_prompt_length={limit} tokens; raise it, or check the data")
    return View(prompts, fits.nonzero()[0])
