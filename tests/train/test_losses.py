"""The losses against versions written apart from them: NumPy, float64, one token at a time."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.distributed.mesh import MeshConfig, activation_sharding, make_mesh, single_device_mesh, weight_sharding
from rmr1_jax.errors import InputError
from rmr1_jax.train.logprobs import token_logprobs
from rmr1_jax.train.losses import (
    LossInputs,
    PolicyLossConfig,
    add_metrics,
    aggregation_weights,
    group_advantages,
    kl_estimate,
    mean_metrics,
    policy_loss,
    sft_loss,
)

# ---- the independent versions


def reference_logprobs(hidden, head, tokens, temperature=1.0):
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logp, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            logits = hidden[b, t - 1] @ head / temperature
            p = np.exp(logits - logits.max())
            p /= p.sum()
            logp[b, t] = np.log(p[tokens[b, t]])
            entropy[b, t] = -sum(q * np.log(q) for q in p)
    return logp, entropy


def reference_policy_loss(config, batch):
    """Token by token, segment by segment. A sequence's ratio is GSPO's plain one, no stop-gradient form."""
    loss, sums = 0.0, dict.fromkeys(("tokens", "kl", "entropy", "clip_fraction", "ratio_mean", "importance_mean"), 0.0)
    sums["ratio_max"] = sums["importance_max"] = sums["importance_capped"] = 0.0
    rows, length = batch["tokens_shape"]
    for b in range(rows):
        for t in range(length):
            if batch["weights"][b, t] == 0:
                continue
            logp, old, advantage = (batch[k][b, t] for k in ("logp", "old_logp", "advantages"))
            ratio = math.exp(logp - old)
            if config.ratio == "sequence":
                mates = [
                    u
                    for u in range(length)
                    if batch["segment_ids"][b, u] == batch["segment_ids"][b, t] and batch["weights"][b, u] > 0
                ]
                ratio = math.exp(sum(batch["logp"][b, u] - batch["old_logp"][b, u] for u in mates) / len(mates))
            low, high = 1 - config.clip_low, 1 + config.clip_high
            clipped = low if ratio < low else high if ratio > high else ratio
            if config.surrogate == "clip":
                gain = min(ratio * advantage, clipped * advantage)
                touched = gain != ratio * advantage
            else:
                gain, touched = clipped * advantage * logp, clipped != ratio
            importance = math.exp(old - batch["sampler_logp"][b, t])
            if config.importance_cap is not None:
                sums["importance_capped"] += importance > config.importance_cap
                importance = min(importance, config.importance_cap)
                gain *= importance
            d = batch["ref_logp"][b, t] - logp
            kl = {"k1": -d, "k2": d**2 / 2, "k3": math.exp(d) - d - 1}[config.kl_kind]
            entropy = batch["entropy"][b, t]
            loss += batch["weights"][b, t] * (-gain + config.kl_coef * kl - config.entropy_coef * entropy)
            sums["tokens"] += 1
            sums["kl"] += kl
            sums["entropy"] += entropy
            sums["clip_fraction"] += touched
            sums["ratio_mean"] += ratio
            sums["ratio_max"] = max(sums["ratio_max"], ratio)
            sums["importance_mean"] += importance
            sums["importance_max"] = max(sums["importance_max"], importance)
    if config.importance_cap is None:
        del sums["importance_capped"]
    return loss, sums


# ---- material


def make_batch(seed=0):
    """Two packed rows: prompt + response, three segments in the first and one in the second, then padding."""
    rng = np.random.default_rng(seed)
    spans = [[(2, 3), (1, 4), (2, 1)], [(3, 5)]]  # (prompt, response) tokens
    rows, length = 2, 15
    batch = {k: np.zeros((rows, length)) for k in ("advantages", "weights")}
    batch["segment_ids"] = np.zeros((rows, length), np.int32)
    batch["logp"] = -rng.uniform(0.1, 3.0, (rows, length))
    batch["old_logp"] = batch["logp"] + 0.4 * rng.normal(size=(rows, length))
    batch["ref_logp"] = batch["logp"] + 0.5 * rng.normal(size=(rows, length))
    batch["sampler_logp"] = batch["old_logp"] + 0.5 * rng.normal(size=(rows, length))
    batch["entropy"] = rng.uniform(0.0, 2.0, (rows, length))
    lengths = [response for row in spans for _, response in row]
    weights = iter(aggregation_weights(np.array(lengths), "sequence"))
    advantages = itertools.cycle((1.3, -0.7, -1.1, 0.9))
    for b, row in enumerate(spans):
        start = 0
        for segment, (prompt, response) in enumerate(row, 1):
            batch["segment_ids"][b, start : start + prompt + response] = segment
            batch["weights"][b, start + prompt : start + prompt + response] = next(weights)
            batch["advantages"][b, start + prompt : start + prompt + response] = next(advantages)
            start += prompt + response
    batch["tokens_shape"] = (rows, length)
    return batch


def as_inputs(batch):
    return {
        k: jnp.asarray(v, jnp.int32 if k == "segment_ids" else jnp.float32)
        for k, v in batch.items()
        if k != "tokens_shape"
    }


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config, inputs):
    inputs = dict(inputs)
    logp, entropy = inputs.pop("logp"), inputs.pop("entropy")

    def f(logp, entropy):
        return policy_loss(config, LossInputs(logp=logp, entropy=entropy, max_segments=3, **inputs))

    return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(logp, entropy)


def finite_differences(f, x, eps=1e-6):
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += eps
        down[i] -= eps
        grad[i] = (f(up) - f(down)) / (2 * eps)
    return grad


CONFIGS = {
    "rm_r1": PolicyLossConfig(),
    "dapo": PolicyLossConfig(clip_high=0.28, kl_coef=0.0),
    "gspo": PolicyLossConfig(ratio="sequence", clip_low=0.1, clip_high=0.15),
    "gspo_tight": PolicyLossConfig(ratio="sequence", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
    "cispo": PolicyLossConfig(surrogate="cispo", clip_low=1.0, clip_high=0.2),
    "cispo_sequence": PolicyLossConfig(surrogate="cispo", ratio="sequence", clip_low=0.1, clip_high=0.1),
    "k1": PolicyLossConfig(kl_kind="k1", kl_coef=0.3),
    "k2": PolicyLossConfig(kl_kind="k2", kl_coef=0.3),
    "k3_large": PolicyLossConfig(kl_coef=0.7),
    "entropy": PolicyLossConfig(entropy_coef=0.05),
    "importance": PolicyLossConfig(importance_cap=1.2),
    "everything": PolicyLossConfig(clip_high=0.28, kl_coef=0.1, entropy_coef=0.02, importance_cap=1.1),
    "gspo_importance": PolicyLossConfig(ratio="sequence", kl_coef=0.0, importance_cap=1.1),
}
# Their gradient is by definition not the derivative of their value; closed forms below.
CLOSED_FORM = ("cispo", "cispo_sequence", "gspo_importance")


# ---- the policy loss


@pytest.mark.parametrize("name", CONFIGS)
def test_policy_loss_and_metrics_agree_with_numpy(name):
    config = CONFIGS[name]
    for seed in range(3):
        batch = make_batch(seed)
        (loss, metrics), _ = loss_and_grads(config, as_inputs(batch))
        expected, sums = reference_policy_loss(config, batch)
        np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=1e-6)
        assert metrics.keys() == sums.keys()
        for key, value in sums.items():
            np.testing.assert_allclose(metrics[key], value, rtol=2e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", [k for k in CONFIGS if k not in CLOSED_FORM])
def test_policy_gradients_agree_with_finite_differences(name):
    # Of GSPO's own formula too: the reference differentiates through the sequence's mean.
    config, batch = CONFIGS[name], make_batch(3)
    _, (by_logp, by_entropy) = loss_and_grads(config, as_inputs(batch))
    expected = finite_differences(lambda x: reference_policy_loss(config, batch | {"logp": x})[0], batch["logp"])
    np.testing.assert_allclose(by_logp, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_entropy, -config.entropy_coef * batch["weights"], rtol=1e-6, atol=1e-9)
    assert name == "gspo_tight" or np.abs(expected).max() > 0.01


def test_gradients_that_are_defined_with_a_stop_gradient():
    batch = make_batch(6)
    trained, log_ratio = batch["weights"] > 0, batch["logp"] - batch["old_logp"]
    sequence = np.ones_like(log_ratio)
    for b, t in np.argwhere(trained):
        mates = trained[b] & (batch["segment_ids"][b] == batch["segment_ids"][b, t])
        sequence[b, t] = np.exp(log_ratio[b, mates].mean())
    pull = -batch["weights"] * batch["advantages"]
    (_, (cispo, _)) = loss_and_grads(PolicyLossConfig(surrogate="cispo", ratio="sequence", kl_coef=0), as_inputs(batch))
    np.testing.assert_allclose(cispo, pull * sequence.clip(0.8, 1.2), rtol=1e-5)
    # Each token's importance weighs that token's own gradient, not its sequence's.
    (_, (gspo, _)) = loss_and_grads(CONFIGS["gspo_importance"], as_inputs(batch))
    importance = np.exp(batch["old_logp"] - batch["sampler_logp"]).clip(max=1.1)
    free = np.where(batch["advantages"] > 0, sequence <= 1.2, sequence >= 0.8)
    np.testing.assert_allclose(gspo, pull * sequence * importance * free, rtol=1e-5)


def test_cispo_gradient_is_the_clipped_ratio_times_the_advantage_and_never_vanishes():
    config, batch = PolicyLossConfig(surrogate="cispo", clip_low=0.2, clip_high=0.2, kl_coef=0.0), make_batch(1)
    (_, metrics), (grad, _) = loss_and_grads(config, as_inputs(batch))
    ratio = np.exp(batch["logp"] - batch["old_logp"])
    np.testing.assert_allclose(grad, -batch["weights"] * batch["advantages"] * ratio.clip(0.8, 1.2), rtol=1e-5)
    assert metrics["clip_fraction"] > 0 and np.all((np.asarray(grad) != 0) == (batch["weights"] > 0))


def test_on_policy_every_surrogate_has_the_policy_gradient():
    batch = make_batch(2)
    batch["old_logp"] = batch["logp"]
    for surrogate, ratio in itertools.product(("clip", "cispo"), ("token", "sequence")):
        config = PolicyLossConfig(surrogate=surrogate, ratio=ratio, kl_coef=0.0)
        (_, metrics), (grad, _) = loss_and_grads(config, as_inputs(batch))
        np.testing.assert_allclose(grad, -batch["weights"] * batch["advantages"], rtol=1e-6)
        assert metrics["clip_fraction"] == 0 and metrics["ratio_max"] == 1


@pytest.mark.parametrize("name", ["rm_r1", "gspo", "everything"])
def test_packed_equals_unpacked(name):
    config, batch = CONFIGS[name], make_batch(4)
    (loss, metrics), (grad, _) = loss_and_grads(config, as_inputs(batch))
    total, joined = 0.0, None
    for b, segment in ((0, 1), (0, 2), (0, 3), (1, 1)):
        places = np.flatnonzero(batch["segment_ids"][b] == segment)
        alone = {k: np.full((2, 15), np.nan) for k in batch if k not in ("tokens_shape", "weights", "segment_ids")}
        alone |= {"weights": np.zeros((2, 15)), "segment_ids": np.zeros((2, 15), np.int32)}  # NaN: padding is not read
        for key in alone:
            alone[key][0, : len(places)] = batch[key][b, places]
        alone["segment_ids"][0, : len(places)] = 1
        (part, part_metrics), (part_grad, _) = loss_and_grads(config, as_inputs(alone))
        total += part
        joined = part_metrics if joined is None else add_metrics(joined, part_metrics)
        np.testing.assert_allclose(part_grad[0, : len(places)], grad[b, places], rtol=1e-5, atol=1e-8)
        assert np.all(np.asarray(part_grad)[0, len(places) :] == 0)
    np.testing.assert_allclose(total, loss, rtol=1e-5)
    for key, value in mean_metrics(metrics).items():
        np.testing.assert_allclose(mean_metrics(joined)[key], value, rtol=1e-6, err_msg=key)


def test_extreme_ratios_stay_finite():
    batch = make_batch(5)
    batch["old_logp"] = batch["logp"] + np.where(batch["advantages"] > 0, 500.0, -500.0)
    batch["ref_logp"] = batch["logp"] + 500.0
    batch["sampler_logp"] = batch["old_logp"] - 500.0
    for name in ("rm_r1", "everything", "cispo", "k2"):
        (loss, _), grads = loss_and_grads(CONFIGS[name], as_inputs(batch))
        assert np.isfinite(loss) and all(np.isfinite(g).all() for g in grads)


def test_a_segment_id_beyond_max_segments_is_not_silent():
    batch = make_batch(0)
    batch["segment_ids"][1] *= 4
    assert np.isnan(loss_and_grads(CONFIGS["gspo"], as_inputs(batch))[0][0])


def test_policy_loss_refuses_what_it_cannot_do():
    inputs = as_inputs(make_batch(0)) | {"max_segments": 3}
    needed = {"ref_logp": PolicyLossConfig(), "entropy": CONFIGS["entropy"], "sampler_logp": CONFIGS["importance"]}
    for name, config in needed.items():
        with pytest.raises(InputError, match=name):
            policy_loss(config, LossInputs(**{k: v for k, v in inputs.items() if k != name}))
    for bad in (
        {"ratio": "word"},
        {"kl_kind": "k4"},
        {"surrogate": "ppo"},
        {"clip_low": -0.1},
        {"clip_high": math.nan},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            PolicyLossConfig(**bad)
    for bad in ({"importance_cap": 0.0}, {"entropy_coef": math.inf}, {"kl_coef": -1.0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            PolicyLossConfig(**bad)


# ---- KL


def test_kl_estimators_values_and_clamps():
    d = np.array([-30.0, -20.0, -1.0, 0.0, 1e-4, 1.0, 2.0, 30.0])  # ref - policy
    limited = d.clip(-20, 20)
    for kind, expected in {
        "k1": -limited,
        "k2": limited**2 / 2,
        "k3": np.minimum(np.exp(limited) - limited - 1, 10),
    }.items():
        np.testing.assert_allclose(kl_estimate(jnp.zeros(8), jnp.asarray(d), kind), expected, rtol=1e-3, atol=1e-12)
    # Where exp(d) - d - 1 in float32 would give 0 or 6e-8.
    np.testing.assert_allclose(kl_estimate(jnp.zeros(1), jnp.full(1, 1e-4), "k3"), [5.00016667e-9], rtol=2e-3)


def test_expected_on_policy_gradients_of_the_estimators():
    # Exact expectations over a vocabulary of 6. The values of all three estimate KL(policy || ref). Their gradients as
    # a loss term: k1 none at all, k2 that of KL(policy || ref), k3 that of KL(ref || policy).
    theta, ref = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    log_ref = jax.nn.log_softmax(jnp.asarray(ref))

    def kl(log_p, log_q):
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    def expected(theta, kind):
        log_policy = jax.nn.log_softmax(theta)
        sampled = jax.lax.stop_gradient(jnp.exp(log_policy))  # the samples are data: no gradient through their draw
        return jnp.sum(sampled * kl_estimate(log_policy, log_ref, kind))

    theta = jnp.asarray(theta)
    true = {
        "k1": jnp.zeros(6),
        "k2": jax.grad(lambda x: kl(jax.nn.log_softmax(x), log_ref))(theta),
        "k3": jax.grad(lambda x: kl(log_ref, jax.nn.log_softmax(x)))(theta),
    }
    for kind, gradient in true.items():
        np.testing.assert_allclose(jax.grad(expected)(theta, kind), gradient, atol=1e-6, err_msg=kind)
    for kind in ("k1", "k3"):  # unbiased
        np.testing.assert_allclose(expected(theta, kind), kl(jax.nn.log_softmax(theta), log_ref), rtol=1e-5)
    assert float(jnp.abs(true["k3"]).max()) > 0.05


# ---- advantages and weights


@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_of_equal_rewards_has_no_advantage(normalize_std):
    """The mean of equal numbers may round to another number; the standard deviation must not blow that up."""
    for reward in (0.2, 0.1, -1.0, 1 / 3):
        for size in range(2, 17):
            rewards = np.full((1, size), reward, np.float32)
            assert np.abs(group_advantages(rewards, normalize_std=normalize_std)).max() < 1e-9


def test_group_advantages():
    rewards = np.array([[1.0, -1.0, -1.0, 1.0, 1.0], [0.3, 0.3, 0.3, 0.3, 0.3], [2.0, -1.0, 0.0, 0.5, 9.0]])
    expected = np.zeros_like(rewards)
    for p, group in enumerate(rewards):
        mean = sum(group) / 5
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 4)
        expected[p] = [(r - mean) / (std + 1e-6) for r in group]
    np.testing.assert_allclose(group_advantages(rewards), expected, rtol=1e-6, atol=1e-9)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(group_advantages(rewards, normalize_std=False), centred, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(group_advantages(np.array([[1.0], [-1.0]])), [[1.0 / (1 + 1e-6)], [-1.0 / (1 + 1e-6)]])
    assert group_advantages(rewards).dtype == np.float32
    with pytest.raises(InputError, match="prompt 0, sample 1"):
        group_advantages(np.array([[0.0, np.inf]]))
    with pytest.raises(InputError, match="shape"):
        group_advantages(np.zeros(3))


def test_aggregation_weights_are_the_means_they_name():
    rng = np.random.default_rng(1)
    terms = [rng.normal(size=n) for n in (3, 1, 7, 2, 5)]
    lengths, groups = np.array([len(x) for x in terms]), np.array([4, 9, 4, 9, 9])

    def weighted(kind, **options):
        return sum(w * x.sum() for w, x in zip(aggregation_weights(lengths, kind, **options), terms, strict=True))

    everything = np.concatenate(terms)
    micro = [np.concatenate([x for x, g in zip(terms, groups, strict=True) if g == m]).mean() for m in (4, 9)]
    np.testing.assert_allclose(weighted("sequence"), np.mean([x.mean() for x in terms]), rtol=1e-6)
    np.testing.assert_allclose(weighted("token"), everything.mean(), rtol=1e-6)
    np.testing.assert_allclose(weighted("micro_batch", micro_batch_of=groups), np.mean(micro), rtol=1e-6)
    np.testing.assert_allclose(weighted("constant", max_length=10), everything.sum() / 50, rtol=1e-6)


def test_aggregation_weights_of_untrained_sequences():
    lengths = np.array([0, 2, 0, 4])
    np.testing.assert_allclose(aggregation_weights(lengths, "sequence"), [0, 1 / 4, 0, 1 / 8])
    np.testing.assert_allclose(aggregation_weights(lengths, "token"), [0, 1 / 6, 0, 1 / 6])
    split = aggregation_weights(lengths, "micro_batch", micro_batch_of=np.array([0, 1, 2, 1]))
    np.testing.assert_allclose(split, [0, 1 / 6, 0, 1 / 6])  # micro-batches 0 and 2 train nothing
    np.testing.assert_allclose(aggregation_weights(lengths, "constant", max_length=5), [0, 1 / 20, 0, 1 / 20])
    assert not aggregation_weights(np.zeros(3, int), "sequence").any()
    for kind, options in (("mean", {}), ("micro_batch", {}), ("constant", {})):
        with pytest.raises(InputError, match=kind):
            aggregation_weights(lengths, kind, **options)


# ---- log-probabilities


def make_hidden(rows=2, length=11, width=5, vocabulary=300, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
    head = rng.normal(size=(width, vocabulary)).astype(np.float32)
    return hidden, head, rng.integers(0, vocabulary, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("vocabulary", [13, 256, 300])
@pytest.mark.parametrize("chunk_logits", [1, 22 * 256, 10**6])
def test_token_logprobs_agree_with_numpy_for_every_chunk(chunk_logits, vocabulary):
    """Of 128 columns, 256, and all; the last chunk whole, or ending among the columns of the one before."""
    hidden, head, tokens = make_hidden(vocabulary=vocabulary)
    f = jax.jit(functools.partial(token_logprobs, chunk_logits=chunk_logits, entropy="gradient"))
    for temperature in (1.0, 0.7):
        logp, entropy = reference_logprobs(hidden, head, tokens, temperature)
        out = f(hidden, head, tokens, temperature=temperature)
        np.testing.assert_allclose(out.logp, logp, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out.entropy, entropy, rtol=1e-5, atol=1e-6)
        assert out.logp.dtype == out.entropy.dtype == jnp.float32
    assert token_logprobs(hidden, head, tokens, chunk_logits=chunk_logits).entropy is None


@pytest.mark.parametrize("axes", [None, MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=2, tensor=4)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_chunked_gradients_equal_whole(tied, axes):
    """Also with rows over fsdp and the vocabulary over tensor, or (as 4 does not divide 302) whole on each."""
    hidden, head, tokens = make_hidden(rows=4, width=8, vocabulary=302, seed=1)
    weights = np.random.default_rng(2).uniform(size=tokens.shape).astype(np.float32)
    weights[:, 0] = 0

    def chunked(hidden, head):
        out = token_logprobs(hidden, head, tokens, chunk_logits=1, entropy="gradient", head_is_embedding=tied)
        return sft_loss(out.logp, weights) + 0.1 * jnp.sum(weights * out.entropy)

    def whole(hidden, head):
        log_probs = jax.nn.log_softmax(hidden[:, :-1] @ (head.T if tied else head))
        logp = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return jnp.sum(weights[:, 1:] * (0.1 * entropy - logp))

    head = head.T if tied else head
    mesh = make_mesh(axes) if axes else single_device_mesh()
    with jax.set_mesh(mesh):
        placed = jax.device_put(hidden, activation_sharding(mesh, "BTD", hidden.shape))
        placed = placed, jax.device_put(head, weight_sharding(mesh, "VD" if tied else "DV", head.shape))
        value, grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(*placed)
    expected, expected_grads = jax.value_and_grad(whole, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bfloat16_hidden_keeps_float32_logits_and_head_gradient():
    hidden, head, tokens = make_hidden(seed=3)
    low = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    logp, _ = reference_logprobs(np.asarray(low, np.float32), rounded, tokens)
    np.testing.assert_allclose(token_logprobs(low, jnp.asarray(head), tokens).logp, logp, rtol=1e-5, atol=1e-5)

    # A thousand terms of one sign: a sum kept in bfloat16 would stop growing at about 256 of them.
    low, tokens = jnp.ones((1, 1001, 5), jnp.bfloat16), jnp.zeros((1, 1001), jnp.int32)
    grad = jax.grad(lambda head: jnp.sum(token_logprobs(low, head, tokens).logp))(jnp.zeros((5, 13)))
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad[:, 0], 1000 * 12 / 13, rtol=0.01)


def test_memory_does_not_grow_with_positions_times_vocabulary():
    rows, width, length = 2, 4, 1024

    def temporaries(vocabulary):
        hidden = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
        head = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

        def loss(hidden, head, tokens):
            out = token_logprobs(hidden, head, tokens, chunk_logits=1, entropy="gradient")
            return jnp.sum(out.logp) + jnp.sum(out.entropy)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(8192)
    one_chunk = rows * length * 128 * 4
    assert short < 8 * one_chunk  # the whole logits would be 32 chunks
    assert long - short < 0.5 * one_chunk  # and 32 more here; what grows is [D, V]


def test_sft_loss_ignores_untrained_places():
    logp = jnp.array([[-1.0, -2.0, -jnp.inf], [jnp.nan, -0.5, -4.0]])
    weights = jnp.array([[0.0, 0.25, 0.0], [0.0, 0.5, 0.25]])
    value, grad = jax.value_and_grad(sft_loss)(logp, weights)
    np.testing.assert_allclose(value, 0.25 * 2 + 0.5 * 0.5 + 0.25 * 4)
    np.testing.assert_allclose(grad, -weights)
