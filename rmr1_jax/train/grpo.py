"""Stage two: GRPO with a verifiable reward (arXiv 2402.03300, 2505.02387).

Each step samples R traces for each of P prompts, scores them, packs them into mini-batches, and makes one update for
each mini-batch. `grpo` is the whole stage, in the order in which data flows; `grpo_micro_loss` is what is minimised. A
killed run continues as one of `sft`. Of several processes each samples for itself, and all train together.

To extend it, pass functions: a reward (`rewards.py`), and `loss(config, inputs)` as `losses.policy_loss`. Next:
`rollout.py`, which makes what is trained on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from rmr1_jax.data.packing import View, batched, mean_length
from rmr1_jax.data.store import open_examples, prompt_of
from rmr1_jax.distributed.mesh import check_micro_rows, own_rows, place_rows, sampling_mesh
from rmr1_jax.distributed.terminal import say
from rmr1_jax.errors import InputError
from rmr1_jax.model.attention import segment_limit, unfolded_limit
from rmr1_jax.model.qwen import Params, split
from rmr1_jax.policy import DTYPES, Policy, model_directory
from rmr1_jax.prompts.prompt import Prompt
from rmr1_jax.sampler.generation_config import with_recommended_sampling
from rmr1_jax.train.announce import header
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.evaluation import grpo_evaluation
from rmr1_jax.train.health import CollapseWatch, check_finite
from rmr1_jax.train.logprobs import forward_options, row_logprobs
from rmr1_jax.train.losses import LossInputs, PolicyLoss, mean_metrics, policy_loss
from rmr1_jax.train.metrics import as_floats, mfu, throughput, train_flops
from rmr1_jax.train.micro_batches import MiniBatch, drop_longer, mini_batch, positions_of
from rmr1_jax.train.optim import (
    Stack,
    TrainState,
    compile_update,
    in_memory,
    init_state,
    lr_schedule,
    make_optimizer,
    master_weights,
)
from rmr1_jax.train.rewards import Reward, make_reward
from rmr1_jax.train.rollout import Group, RlPrompt, describe_groups, roll_out, rollout_metrics
from rmr1_jax.train.rollout_log import RolloutLog
from rmr1_jax.train.run import load_policy, open_run
from rmr1_jax.train.run_directory import check_run, data_digest, save_model, start_run


def grpo(
    config: GrpoConfig,
    *,
    policy: Policy | None = None,
    prompts: Sequence[RlPrompt] | None = None,
    reward: Reward | None = None,
    loss: PolicyLoss = policy_loss,
    on_rollout: Callable[[int, list[Group]], None] | None = None,
    eval_prompts: Sequence[RlPrompt] | None = None,
) -> Policy:
    """Train, and return the trained policy (float32 weights), which is also saved as `out/model`.

    policy, prompts, eval_prompts: used instead of model, data and eval_data of the config. reward, loss: see the module
    docstring; those of the config by default. on_rollout: gets each step and its groups, on every process all groups.

    Raises InputError if the config or the data is wrong, or `out` has a run with another reward or loss (`functions.py`
    says what counts); RunError if the loss is not finite, a checkpoint cannot be written, or all are damaged; Preempted
    after SIGTERM, when the state is saved.
    """
    config = with_own_sampling(config, policy)
    functions = {"reward": reward, "loss": None if loss is policy_loss else loss}
    check_run(config, Path(config.out), functions)
    given, reward = policy is not None, reward or make_reward(config.reward, config.structure)
    policy = policy or load_policy(config, reads_data=prompts is None)
    prompts, held_out, own_prompt = _open_prompts(config, policy, prompts, eval_prompts)
    steps = config.steps or max(1, len(prompts) // config.prompts_per_step)
    evaluation = grpo_evaluation(config, policy, held_out, reward)
    start_run(config, Path(config.out), functions)
    say(header(config, policy, prompts, steps))
    with jax.set_mesh(policy.mesh), open_run(config, "grpo") as run:
        optimizer = make_optimizer(config.optimizer, steps * config.updates_per_step)
        state = init_state(master_weights(policy.params, keep=given), optimizer, config.optimizer.memory)
        cursor = {"prompts_consumed": 0, "skipped": 0, "data": data_digest(prompts)}
        state, cursor = run.restore(state, cursor)
        trainer = _Trainer(config, policy, loss, optimizer, state, mean_length(prompts))
        schedule = lr_schedule(config.optimizer, steps * config.updates_per_step)
        watch, start = CollapseWatch(), int(state.step) // config.updates_per_step
        readers = [RolloutLog(config, policy.tokenizer, start).write, *([on_rollout] if on_rollout else [])]
        for step in run.steps(start, steps):
            with run.saved_if_preempted(state, cursor), jax.profiler.TraceAnnotation("rollout"):
                policy, consumed = policy.with_params(state.params), cursor["prompts_consumed"]
                rollout = roll_out(config, policy, prompts, consumed, step, reward, run.preemption.interruptible)
            run.lap("rollout_seconds")
            for read in readers:
                read(step, rollout.groups)
            batches = trainer.prepare(rollout.groups, state.params)
            run.lap("reference_seconds")
            state, row, skipped = trainer.update(state, batches, step)
            cursor["skipped"] += skipped
            cursor["prompts_consumed"] += rollout.consumed
            row["lr"] = float(schedule(int(state.step) - 1 - cursor["skipped"]))
            flops = sum(train_flops(policy.config, batch.lengths, batch.starts) for _, batch in batches)
            row |= mfu(flops, run.lap("update_seconds"), policy.mesh)
            row |= rollout_metrics(rollout.groups, config.structure) | rollout.facts
            row |= {k: cursor[k] for k in ("prompts_consumed", "skipped")}
            row |= throughput(row["prompt_tokens"] + row["new_tokens"], run.seconds, policy.mesh)
            watch.look(row, step)
            row |= run.evaluate(evaluation, state.params)
            run.record(row, state, cursor, reward=f"{row['reward']:.3f}", length=f"{row['response_length']:.0f}")
    return save_model(policy.with_params(state.params), Path(config.out), own_prompt)


def grpo_micro_loss(
    graphdef: nnx.GraphDef,
    config: GrpoConfig,
    loss: PolicyLoss,
    params: Params,
    batch: dict[str, Shaped[Array, "B _"]],
    **forward: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The policy loss of one packed micro-batch; see `optim.MicroLoss`. Where `old_logp` is missing or NaN, the policy
    is the one that sampled. The number of trained tokens is among the metrics whatever `loss` returns, for the means.
    """
    kind = "value" if loss is policy_loss and not config.loss.entropy_coef else "gradient"
    logp, entropy = row_logprobs(nnx.merge(graphdef, params), batch, entropy=kind, **forward)
    own, old = jax.lax.stop_gradient(logp), batch.get("old_logp")
    inputs = LossInputs(
        logp=logp,
        old_logp=own if old is None else jnp.where(jnp.isnan(old), own, old),
        advantages=batch["advantages"],
        weights=batch["weights"],
        segment_ids=batch["segment_ids"],
        ref_logp=batch.get("ref_logp"),
        sampler_logp=batch["sampler_logp"],
        entropy=entropy,
        max_segments=config.max_segments * (2 if config.share_prompts else 1),  # a shared prompt is a segment too
        old_is_sampler=config.old_logp == "sampler",
    )
    value, metrics = loss(config.loss, inputs)
    return value, {"tokens": (batch["weights"] > 0).sum(dtype=jnp.float32)} | metrics


def batch_logprobs(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: dict[str, Int[Array, "A B _"]],
    count: Int[Array, ""],
    **forward: Any,
) -> Float[Array, "A B T"]:
    """Log-probabilities of the first `count` micro-batches under `params`, one micro-batch at a time."""

    def one(i, out):
        micro = {k: v[i] for k, v in batch.items()}
        return out.at[i].set(row_logprobs(nnx.merge(graphdef, params), micro, **forward).logp)

    return jax.lax.fori_loop(0, count, one, jnp.zeros(batch["tokens"].shape, jnp.float32))


def with_own_sampling(config: GrpoConfig, policy: Policy | None) -> GrpoConfig:
    """The config with the sampling that `generation_config` asks for, and without that key: the run's config.yaml holds
    the values themselves. Raises InputError as `with_recommended_sampling`, or if the model's file asks for greedy
    sampling, which would give a group equal texts."""
    if not config.generation_config:
        return config
    directory = policy.tokenizer.directory if policy else model_directory(config.model)
    sampling = with_recommended_sampling(config.sampling, directory)
    if not sampling.temperature:
        raise InputError(
            f"{directory}/generation_config.json: asks for greedy sampling, with which the samples of a group are "
            "equal; leave generation_config out and set sampling.temperature"
        )
    return dataclasses.replace(config, sampling=sampling, generation_config=False)


def _open_prompts(
    config: GrpoConfig, policy: Policy, given: Sequence[RlPrompt] | None, held_out: Sequence[RlPrompt] | None
) -> tuple[Sequence[RlPrompt], Sequence[RlPrompt] | None, Prompt | None]:
    """The prompts to train on, those to evaluate on if there are any, and the prompt file that the former were rendered
    with if it is known; read from the config's files unless they are given."""
    own_prompt = prompt_of(config.data) if given is None else None
    prompts = read_prompts(config.data, policy) if given is None else given
    prompts = drop_longer(prompts, config.max_prompt_length, "prompts")  # as the paper does
    _check_sizes(config, prompts, policy.mesh)
    if held_out is None and config.eval_data:
        held_out = read_prompts(config.eval_data, policy)
    return prompts, held_out, own_prompt


def read_prompts(path: str | Path, policy: Policy) -> Sequence[RlPrompt]:
    """Read published RLVR rows, or a prepared set of them, as prompts. Raises InputError if a row holds a trace and
    does not name the better side."""
    examples = open_examples(path, "grpo", policy.tokenizer)
    return View(examples, np.arange(len(examples)), lambda x: RlPrompt(x.id, x.tokens, x.better, x))


class _Trainer:
    """The compiled programs of a run, and the frozen reference if the loss needs one. prompt_length: in the mean."""

    def __init__(
        self,
        config: GrpoConfig,
        policy: Policy,
        loss: PolicyLoss,
        optimizer: optax.GradientTransformation,
        state: TrainState,
        prompt_length: float,
    ):
        self.mesh, self.reference = policy.mesh, None
        if config.loss.kl_coef:
            # In the dtype of the matrix products, to which its weights would be cast anyway.
            reference = jax.tree.map(lambda x: jnp.array(x, DTYPES[config.dtype]), policy.params)
            self.reference = in_memory(reference, config.reference_memory)
        # Only our own loss is known to be zero where the advantage is, and only without its other terms.
        self.skip_unmixed = loss is policy_loss and not (config.loss.kl_coef or config.loss.entropy_coef)
        forward = forward_options(config, policy.config, policy.mesh, prompt_length)
        most = min(config.max_segments, segment_limit(forward["attention"]) or config.max_segments)
        self.max_separate = unfolded_limit(forward["attention"])
        self.config = dataclasses.replace(config, max_segments=most)
        forward["temperature"] = config.sampling.temperature or 1.0
        graphdef = split(policy.model)[0]
        micro_loss = functools.partial(grpo_micro_loss, graphdef, self.config, loss, **forward)
        self._update = compile_update(state, loss=micro_loss, optimizer=optimizer, clip=config.optimizer.clip)
        self._logprobs = jax.jit(functools.partial(batch_logprobs, graphdef, **forward))

    def prepare(self, groups: list[Group], params: Params) -> list[tuple[list[Group], MiniBatch]]:
        """The groups of each update, and their mini-batch on the mesh, with the log-probabilities of the reference and
        of the weights before the first update, as far as the loss needs them."""
        prepared: list[tuple[list[Group], MiniBatch]] = []
        own = own_rows(self.mesh, self.config.micro_rows)
        for members in batched(groups, self.config.mini_batch_prompts):
            options = {"skip_unmixed": self.skip_unmixed, "own": own, "max_separate": self.max_separate}
            batch = mini_batch(members, self.config, **options)
            stacks = [self._with_logprobs(*stack, params, first=not prepared) for stack in batch.stacks]
            prepared.append((members, batch._replace(stacks=stacks)))
        return jax.block_until_ready(prepared)

    def _with_logprobs(self, arrays: dict[str, np.ndarray], count: int, params: Params, *, first: bool) -> Stack:
        """A stack on the mesh, with the log-probabilities that its update needs. first: that is the step's first."""
        placed = place_rows(self.mesh, "ABT", arrays, self.config.micro_rows)
        inputs = {k: v for k, v in placed.items() if v.dtype == jnp.int32}
        if self.config.old_logp == "sampler":
            placed["old_logp"] = placed["sampler_logp"]
        elif self.config.updates_per_step > 1:
            # The first update trains the weights that sampled, whose log-probabilities it computes itself.
            placed["old_logp"] = placed["weights"] * jnp.nan if first else self._logprobs(params, inputs, count)
        if self.reference is not None:
            placed["ref_logp"] = self._logprobs(in_memory(self.reference, "device"), inputs, count)
        return placed, count

    def update(
        self, state: TrainState, batches: list[tuple[list[Group], MiniBatch]], step: int
    ) -> tuple[TrainState, dict[str, float], int]:
        """Make one update for each mini-batch. Returns the state, the metrics, and how many updates were skipped. The
        metrics are means over the updates that were applied (over all, if none was); `trained_tokens` is their sum, and
        what ends in `_max` their maximum."""
        applied, skipped = [], []
        for number, (members, batch) in enumerate(batches):
            state, metrics = self._update(state, batch.stacks)
            totals = {k: metrics.pop(k) for k in ("loss", "grad_norm")}  # not sums over tokens, as the others are
            row = as_floats(totals | mean_metrics(metrics))
            what = f"update {number} of the prompts {[g.prompt.id for g in members][:8]}..."
            describe = functools.partial(describe_groups, members)
            is_finite = check_finite(row, step, what, state=state, describe=describe, config=self.config)
            (applied if is_finite else skipped).append(
                row | {"packed": sum(batch.lengths) / positions_of(batch.stacks)}
            )
        trained_tokens = sum(row["tokens"] for row in applied)
        rows = [{k: v for k, v in row.items() if k != "tokens"} for row in applied or skipped]
        joined = {k: float((max if k.endswith("_max") else np.mean)([row[k] for row in rows])) for k in rows[0]}
        joined |= {
            "trained_tokens": trained_tokens,
            "positions": sum(positions_of(batch.stacks) for _, batch in batches),
        }
        return state, joined, len(skipped)


def _check_sizes(config: GrpoConfig, prompts: Sequence[RlPrompt], mesh: Mesh) -> None:
    """Refuse early, with an InputError, what the devices and processes cannot share, and prompts that are all long."""
    if not len(prompts):
        limit = config.max_prompt_length
        raise InputError(f"no prompt is at most max_prompt_length={limit} tokens; raise it, or check the data")
    check_micro_rows(mesh, config.micro_rows)
    sampling_mesh(mesh, config.sampling_tensor)
    if config.prompts_per_step < (n := jax.process_count()):
        raise InputError(f"prompts_per_step={config.prompts_per_step} must be at least {n}, one for each process")
