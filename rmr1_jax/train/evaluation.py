"""Evaluation while training: the policy is measured on held-out data every `eval_every` steps.

SFT measures the loss, GRPO samples greedily and counts right verdicts and complete traces. It changes no state and
draws nothing at random, so the training has the same bits with it and without it. Next: `run.py`, which calls it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from rmr1_jax.data.examples import Example
from rmr1_jax.data.packing import Packing, mean_length, sft_batches
from rmr1_jax.distributed.mesh import own_rows
from rmr1_jax.errors import InputError
from rmr1_jax.model.attention import segment_limit
from rmr1_jax.model.qwen import Params, split
from rmr1_jax.policy import Policy
from rmr1_jax.train.config import GrpoConfig, RunConfig, SftConfig
from rmr1_jax.train.logprobs import forward_options, row_logprobs
from rmr1_jax.train.losses import sft_loss
from rmr1_jax.train.metrics import is_held_out
from rmr1_jax.train.micro_batches import drop_longer, to_micro_batches
from rmr1_jax.train.rewards import Reward
from rmr1_jax.train.rollout import RlPrompt, roll_out, rollout_metrics

Evaluation = Callable[[Params], dict[str, float]]  # the weights -> the metrics, without the `eval_` before their names

MEASURED = ("reward", "accuracy", "valid", "response_length", "truncated")


def sft_evaluation(config: SftConfig, policy: Policy, examples: Sequence[Example] | None) -> Evaluation | None:
    """The evaluation of an SFT run: `loss`, the mean cross-entropy over all trained tokens of the examples. None
    without examples. Raises InputError if they do not fit into rows, or as `_check`."""
    if examples is not None and config.on_too_long == "drop":
        examples = drop_longer(examples, config.row_length, "held-out examples")
    if not _check(config, examples):
        return None
    forward = forward_options(config, policy.config, policy.mesh, mean_length(examples))
    graphdef = split(policy.model)[0]

    @jax.jit
    def mean_loss(params: Params, micro: dict[str, jax.Array]) -> jax.Array:
        batch = {name: array[0] for name, array in micro.items()}
        logp = row_logprobs(nnx.merge(graphdef, params), batch, **forward).logp
        return sft_loss(logp, batch["weights"])

    options = {"row_length": config.row_length, "batch_rows": config.micro_rows, "epochs": 1, "seed": 0}
    options |= {
        "own": own_rows(policy.mesh, config.micro_rows),
        "packing": Packing(segment_limit(forward["attention"])),
    }
    make_batches = functools.partial(sft_batches, examples, **options)
    try:
        make_batches()
    except InputError as e:
        raise InputError(f"eval_data: {e}") from e

    def measure(params: Params) -> dict[str, float]:
        total, count = 0.0, 0
        for batch in make_batches()[0]:
            ((micro, _),), facts = to_micro_batches(batch, config.micro_rows, policy.mesh)
            total += float(mean_loss(params, micro)) * facts["trained_tokens"]
            count += facts["trained_tokens"]
        return {"loss": total / count}

    return measure


def grpo_evaluation(
    config: GrpoConfig, policy: Policy, prompts: Sequence[RlPrompt] | None, reward: Reward
) -> Evaluation | None:
    """The evaluation of a GRPO run: one greedy text for each prompt, and the means of `rollout_metrics` in `MEASURED`.
    None without prompts. Raises InputError as `_check`."""
    if prompts is not None:
        prompts = drop_longer(prompts, config.max_prompt_length, "held-out prompts")
    if not _check(config, prompts):
        return None
    greedy = dataclasses.replace(config.sampling, n=1, temperature=0.0)
    whole = {"prompts_per_step": len(prompts), "mini_batch_prompts": len(prompts)}
    config = dataclasses.replace(config, sampling=greedy, dynamic_sampling=1, **whole)

    def measure(params: Params) -> dict[str, float]:
        groups = roll_out(config, policy.with_params(params), prompts, 0, 0, reward).groups
        metrics = rollout_metrics(groups, config.structure)
        return {name: metrics[name] for name in MEASURED}

    return measure


def _check(config: RunConfig, items: Sequence | None) -> bool:
    """Return True if there are held-out items. Raises InputError if all of them were too long, if there are fewer than
    processes, or if there are none and `best` needs them."""
    if items is None:
        if config.best and is_held_out(config.best.metric):
            raise InputError(f"best.metric={config.best.metric!r} is measured on held-out data, and eval_data is empty")
        return False
    if len(items) < (count := jax.process_count()):
        raise InputError(f"eval_data has {len(items)} rows that are short enough; expected at least {count}")
    return True
