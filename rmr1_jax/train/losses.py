"""Every loss of both stages: cross-entropy, advantages, KL estimators, the policy loss.

One convention holds everywhere. A batch consists of packed rows: `tokens`, `segment_ids` (0 is padding) and `weights`,
all [B, T]. A value that concerns a token has that token's index: `logp[b, t]` is log p(tokens[b, t] | those before),
computed from `hidden[b, t - 1]`. A loss is the plain sum over t of `weights[b, t]` times the token's term. So how
tokens are averaged is decided once, on the host, by `aggregation_weights`, and micro-batches add up to the mini-batch
exactly, however they were packed. A token of weight 0 is not trained and counts nowhere, neither in a sequence's ratio
nor in a metric. Next: `logprobs.py`, where the log-probabilities come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Real
from pydantic import Field, FiniteFloat, PositiveFloat

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import InputError

KLKind = Literal["k1", "k2", "k3"]
AggregationKind = Literal["sequence", "micro_batch", "token", "constant"]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

LOG_RATIO_LIMIT = 20.0  # exp(20) is still far from overflow; the reference trainer's value
K3_LIMIT = 10.0


def sft_loss(logp: Float[Array, "B T"], weights: Float[Array | np.ndarray, "B T"]) -> Float[Array, ""]:
    """Cross-entropy: -sum(weights * logp). With weights of 1 / (trained tokens in the mini-batch) it is their mean."""
    return -jnp.sum(weights * jnp.where(weights > 0, logp, 0.0))


# ---- rewards to token weights, on the host


def group_advantages(
    rewards: Real[np.ndarray, "..."], *, normalize_std: bool = True, eps: float = 1e-6
) -> Float[np.ndarray, "P R"]:
    """GRPO's advantages (arXiv 2402.03300): (r - mean) / (std + eps) within each group, std unbiased.

    rewards: [P, R], NaN for a text without one, which has the advantage 0 and counts in no mean; the result is float32.
    A group with one reward has mean 0 and std 1. `normalize_std=False` is the r - mean of Dr.GRPO (arXiv 2503.20783).
    Raises InputError for another rank or an infinite reward.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2:
        raise InputError(f"rewards have shape {rewards.shape}; expected [prompts, samples per prompt]")
    if np.isinf(rewards).any():
        p, r = np.argwhere(np.isinf(rewards))[0]
        raise InputError(f"the reward of prompt {p}, sample {r} is {rewards[p, r]}; a reward must be finite")
    advantages = np.zeros(rewards.shape)
    for row, out in zip(rewards, advantages, strict=True):
        known = ~np.isnan(row)
        mean, std = (row[known].mean(), row[known].std(ddof=1)) if known.sum() > 1 else (0.0, 1.0)
        out[known] = (row[known] - mean) / (std + eps if normalize_std else 1.0)
    return advantages.astype(np.float32)


def aggregation_weights(
    response_lengths: Int[np.ndarray, " S"],
    kind: str,
    *,
    micro_batch_of: Int[np.ndarray, " S"] | None = None,
    max_length: int | None = None,
) -> Float[np.ndarray, " S"]:
    """The weight of each trained token of each sequence of a mini-batch, so that loss = sum of weight * term.

    response_lengths: trained tokens of each sequence. The result is float32. kind: an `AggregationKind`:
    - "sequence": the mean over each sequence, then over sequences (the paper).
    - "micro_batch": the mean over the tokens of a micro-batch, then over micro-batches (the released trainer);
      needs `micro_batch_of` [S], the micro-batch each sequence is in.
    - "token": the mean over all tokens of the mini-batch (DAPO).
    - "constant": the sum over S * `max_length` (Dr.GRPO), the one kind whose weights need not sum to 1.
    A sequence of length 0 is not trained: it gets 0 and counts in no mean (in "constant" it counts in S).
    """
    if kind not in get_args(AggregationKind):
        raise InputError(f"aggregation={kind!r} is not known; give one of {', '.join(get_args(AggregationKind))}")
    lengths = np.asarray(response_lengths, np.float64)
    trained = lengths > 0
    weights = np.zeros(lengths.shape, np.float32)
    if not trained.any():
        return weights
    if kind == "sequence":
        weights[trained] = 1.0 / (trained.sum() * lengths[trained])
    elif kind == "token":
        weights[trained] = 1.0 / lengths.sum()
    elif kind == "constant":
        if max_length is None or max_length < 1:
            raise InputError(f"aggregation 'constant' got max_length={max_length}; give the response limit in tokens")
        weights[trained] = 1.0 / (lengths.size * max_length)
    else:
        if micro_batch_of is None or np.shape(micro_batch_of) != lengths.shape:
            raise InputError("aggregation 'micro_batch' needs micro_batch_of, one micro-batch number per sequence")
        _, group = np.unique(np.asarray(micro_batch_of)[trained], return_inverse=True)
        tokens = np.bincount(group, weights=lengths[trained])
        weights[trained] = 1.0 / (tokens.size * tokens[group])
    return weights


# ---- the policy loss


def kl_estimate(logp: Float[Array, "*B"], ref_logp: Float[Array, "*B"], kind: KLKind) -> Float[Array, "*B"]:
    """Schulman's per-token estimators of KL(policy || reference) from tokens of the policy; same shape, float32.

    With d = ref_logp - logp clamped to +-20: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 clamped to +-10. As a loss
    term, on policy and in expectation, the gradient of k1 is zero, that of k2 is the gradient of
    KL(policy || reference), and that of k3 is the gradient of KL(reference || policy).
    """
    d = jnp.clip(ref_logp - logp, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    assert kind == "k3", kind
    return jnp.clip(jnp.expm1(d) - d, -K3_LIMIT, K3_LIMIT)  # expm1: d is tiny early in training


@config_dataclass
class PolicyLossConfig:
    """The policy loss. The defaults are RM-R1's; the other published losses are these changes to them:

    - DAPO (arXiv 2503.14476): clip_high=0.28, aggregation "token", kl_coef=0.
    - Dr.GRPO (arXiv 2503.20783): normalize_std=False in the advantages, aggregation "constant", kl_coef=0.
    - GSPO (arXiv 2507.18071): ratio="sequence", clip_low=3e-4, clip_high=4e-4, kl_coef=0, aggregation "sequence".
    - CISPO (arXiv 2506.13585): surrogate="cispo", a clip_low of 1 (no lower bound), aggregation "token".
    - Truncated importance sampling: importance_cap=2.0, against a sampler whose numbers differ from the trainer's.
    """

    clip_low: NonNegative = 0.2
    """The ratio of probabilities is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: NonNegative = 0.2
    """See clip_low."""
    ratio: Literal["token", "sequence"] = "token"
    """Whether a ratio is that of a token, or the geometric mean over its sequence (GSPO)."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """Clipped surrogate of PPO, or CISPO's."""
    kl_coef: NonNegative = 1e-3
    """Weight of the KL divergence from the reference. 0 needs no reference."""
    kl_kind: KLKind = "k3"
    """Estimator of the KL divergence."""
    entropy_coef: FiniteFloat = 0.0
    """Weight of the policy's entropy, which is maximised."""
    importance_cap: PositiveFloat | None = None
    """Largest weight of truncated importance sampling, which corrects for a sampler whose numbers differ from the
    trainer's. null: no correction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossInputs:
    """The inputs of a policy loss, [B, T] of packed rows, in nats. Only `logp` and `entropy` carry a gradient.

    logp: of the policy that is trained. old_logp: of the same weights before the first update of this rollout batch.
    advantages, weights: each token's. segment_ids: 1..max_segments within a row, 0 is padding; a prompt that responses
    share is a segment of its own, without weight. ref_logp: of the frozen reference. sampler_logp: as the sampler
    recorded it. entropy: of the policy's distribution. Of tokens without weight all of these mean nothing.
    old_is_sampler: old_logp is sampler_logp, so the ratio is also the importance ratio.
    """

    logp: Float[Array, "B T"]
    old_logp: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    weights: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    ref_logp: Float[Array, "B T"] | None = None
    sampler_logp: Float[Array, "B T"] | None = None
    entropy: Float[Array, "B T"] | None = None
    max_segments: int
    old_is_sampler: bool = False


# A policy loss: `policy_loss` below, or a function of one's own with the same arguments and results.
PolicyLoss = Callable[[PolicyLossConfig, LossInputs], tuple[Array, dict[str, Array]]]


def policy_loss(config: PolicyLossConfig, inputs: LossInputs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """sum of weights * (surrogate + kl_coef * KL - entropy_coef * entropy), and sums for the metrics.

    Values at tokens of weight 0 are ignored, even if they are not finite. With ratio="sequence" a sequence is the
    trained tokens of one segment, its ratio exp(mean log-ratio), in the stop-gradient form GSPO-token: where weight and
    advantage are constant within a sequence (as ours are) its gradient is GSPO's; an importance weight scales its own
    token's gradient. A segment id above max_segments then gives NaN. With old_is_sampler the importance is that of the
    policy which is trained, it is part of the ratio already, and the cap bounds it there.

    Returns (loss, metrics), float32 scalars. The metrics are sums over trained tokens, for `add_metrics` to join and
    `mean_metrics` to divide: tokens, ratio_mean, ratio_max, clip_fraction (tokens whose surrogate the clip changed);
    where their input is given, kl, entropy, and the sampler's importance ratio after the cap: importance_mean,
    importance_max, importance_capped (only with a cap). Raises InputError if the input that an option needs is missing.
    """
    for option, name in (("kl_coef", "ref_logp"), ("importance_cap", "sampler_logp"), ("entropy_coef", "entropy")):
        if (value := getattr(config, option)) and getattr(inputs, name) is None:
            raise InputError(f"{option}={value} needs {name}, which was not given; pass it, or turn the option off")
    trained = inputs.weights > 0

    def only_trained(x: Array) -> Array:
        return jnp.where(trained, x, 0.0)

    logp, advantages = only_trained(inputs.logp), only_trained(inputs.advantages)
    old_logp = only_trained(lax.stop_gradient(inputs.old_logp))
    ratio = _ratio(config, inputs, logp, old_logp)
    terms, clipped = _surrogate(config, ratio, logp, advantages)
    metrics = {"tokens": trained, "clip_fraction": trained & clipped}
    metrics["ratio_mean"] = metrics["ratio_max"] = only_trained(ratio)
    if inputs.sampler_logp is not None:
        trainer_logp = lax.stop_gradient(logp) if inputs.old_is_sampler else old_logp
        log_importance = trainer_logp - only_trained(lax.stop_gradient(inputs.sampler_logp))
        importance = jnp.exp(jnp.clip(log_importance, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        if (cap := config.importance_cap) is not None:
            metrics["importance_capped"] = trained & (importance > cap)
            in_ratio = importance if inputs.old_is_sampler else 1.0
            importance = jnp.minimum(importance, cap)
            terms = terms * (importance / in_ratio)
        metrics["importance_mean"] = metrics["importance_max"] = only_trained(importance)
    if inputs.ref_logp is not None:
        metrics["kl"] = kl_estimate(logp, only_trained(lax.stop_gradient(inputs.ref_logp)), config.kl_kind)
        terms = terms + config.kl_coef * metrics["kl"]
    if inputs.entropy is not None:
        metrics["entropy"] = only_trained(inputs.entropy)
        terms = terms - config.entropy_coef * metrics["entropy"]
    reduced = {k: (jnp.max if k.endswith("_max") else jnp.sum)(v.astype(jnp.float32)) for k, v in metrics.items()}
    return jnp.sum(inputs.weights * terms), lax.stop_gradient(reduced)


def _ratio(config: PolicyLossConfig, inputs: LossInputs, logp: Array, old_logp: Array) -> Array:
    """The importance ratio of each token [B, T], differentiable in logp."""
    log_ratio = logp - old_logp
    if config.ratio == "sequence":
        sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=inputs.max_segments + 1))
        totals = sums(lax.stop_gradient(log_ratio), inputs.segment_ids)  # [B, max_segments + 1]
        counts = sums((inputs.weights > 0).astype(jnp.float32), inputs.segment_ids)
        means = jnp.take_along_axis(totals / jnp.maximum(counts, 1.0), inputs.segment_ids, axis=1, mode="fill")
        # GSPO-token: the sequence's value, the token's own gradient.
        log_ratio = means + (logp - lax.stop_gradient(logp))
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def _surrogate(config: PolicyLossConfig, ratio: Array, logp: Array, advantages: Array) -> tuple[Array, Array]:
    """Each token's term, to be minimised, and whether the clip changed it: [B, T] float32 and bool."""
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.surrogate == "cispo":
        return -lax.stop_gradient(clipped) * advantages * logp, clipped != ratio
    free, bound = ratio * advantages, clipped * advantages
    clip_holds = bound < free
    return -jnp.where(clip_holds, bound, free), clip_holds  # a tie keeps the gradient whole


def add_metrics(first: Mapping[str, Array], second: Mapping[str, Array]) -> dict[str, Array]:
    """Join two micro-batches' metrics: the larger of what ends in `_max`, the sum of the rest. Zeros are neutral."""
    return {k: (jnp.maximum if k.endswith("_max") else jnp.add)(v, second[k]) for k, v in first.items()}


def mean_metrics(metrics: Mapping[str, Array]) -> dict[str, Array]:
    """Sums over trained tokens -> means over them; `tokens` and what ends in `_max` stay as they are."""
    tokens = jnp.maximum(metrics["tokens"], 1.0)
    return {k: v if k == "tokens" or k.endswith("_max") else v / tokens for k, v in metrics.items()}
