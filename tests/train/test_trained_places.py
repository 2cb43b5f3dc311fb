"""The head reads trained tokens only; the entropy without its gradient; the sampler's log-probabilities as the old."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import EIGHT_DEVICES

from rmr1_jax.distributed.mesh import activation_sharding, make_mesh, single_device_mesh, weight_sharding
from rmr1_jax.errors import InputError
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.logprobs import token_logprobs, trained_logprobs, trained_places
from rmr1_jax.train.losses import LossInputs, PolicyLossConfig, policy_loss


def case(B=8, T=32, D=8, V=96):
    """hidden, head, tokens and weights; a row without any, one whose last token alone is trained, and random ones."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.uniform(size=(B, T)) < 0.3, rng.uniform(size=(B, T)), 0).astype(np.float32)
    weights[:, 0] = weights[0] = weights[1, :-1] = 0
    weights[1, -1] = 0.5
    hidden, head = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    return hidden, head, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), weights


def test_the_places_of_trained_tokens():
    trained = np.array([[0, 0, 1, 0, 1], [0] * 5, [0, 1, 1, 1, 0]], bool)
    assert trained_places(trained, 3).tolist() == [[2, 4, 5], [5, 5, 5], [1, 2, 3]]
    assert trained_places(trained[:2], 2).tolist() == [[2, 4], [5, 5]]
    assert trained_places(trained[1:2], 0).tolist() == [[5]]
    assert trained_places(trained, 5) is None  # all positions are read
    sizes = {trained_places(np.zeros((2, 3, 100), bool), most).shape for most in range(1, 99)}
    assert sizes == {(2, 3, 7 * n) for n in range(1, 15)}  # few sizes, few programs
    assert trained_places(np.zeros((1, 100), bool), 99) is None


@pytest.mark.parametrize("axes", [None, *EIGHT_DEVICES], ids=str)
def test_reading_trained_tokens_changes_nothing(axes):
    hidden, head, tokens, weights = case()
    places = jnp.asarray(trained_places(weights > 0, int((weights > 0).sum(1).max())))
    assert places.shape[1] < 24

    def loss(kind, read, hidden, head):
        arguments = (hidden, head, tokens, places) if read is trained_logprobs else (hidden, head, tokens)
        out = read(*arguments, entropy=kind, chunk_logits=1)
        assert (out.entropy is None) == (kind == "none")
        return jnp.sum(weights * (out.logp if out.entropy is None else out.logp + out.entropy)), out

    mesh = make_mesh(axes) if axes else single_device_mesh()
    with jax.set_mesh(mesh):
        placed = jax.device_put(jnp.asarray(hidden), activation_sharding(mesh, "BTD", hidden.shape))
        placed = placed, jax.device_put(jnp.asarray(head), weight_sharding(mesh, "DV", head.shape))

        def run(*which):
            return jax.jit(jax.value_and_grad(functools.partial(loss, *which), argnums=(0, 1), has_aux=True))(*placed)

        for kind in ("none", "gradient") if axes is None else ("gradient",):
            ((value, out), grads), ((expected, _), wanted) = (run(kind, f) for f in (trained_logprobs, token_logprobs))
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            for a, b in zip(grads, wanted, strict=True):
                assert np.abs(b).max() > 0.1
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    for x in out:
        assert not np.asarray(x)[weights == 0].any() and np.asarray(x)[weights > 0].all()


def test_the_entropy_s_gradient_is_optional():
    hidden, head, tokens, weights = (jnp.asarray(x) for x in case())
    weights = weights.at[:, 0].set(0)

    def loss(hidden, kind, coef):
        out = token_logprobs(hidden, head, tokens, entropy=kind)
        return jnp.sum(weights * (out.logp + coef * out.entropy)), out.entropy

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    with_it, entropy = gradient(hidden, "gradient", 1.0)
    without, same = gradient(hidden, "value", 1.0)
    of_logp, _ = gradient(hidden, "gradient", 0.0)
    np.testing.assert_array_equal(without, of_logp)
    np.testing.assert_array_equal(entropy, same)
    assert np.abs(with_it - without).max() > 0.1


def inputs(**changes):
    rng = np.random.default_rng(1)
    values = {k: jnp.asarray(rng.normal(-2, 0.5, (2, 6)), jnp.float32) for k in ("logp", "old_logp", "sampler_logp")}
    values |= {"advantages": jnp.asarray(rng.normal(size=(2, 6)), jnp.float32), "weights": jnp.full((2, 6), 0.1)}
    return LossInputs(segment_ids=jnp.ones((2, 6), jnp.int32), max_segments=1, **values | changes)


def test_the_cap_bounds_the_ratio_to_the_sampler():
    """With the sampler's log-probabilities as the old ones, a token's gradient is that of min(ratio, cap) x advantage x
    logp, where the clip does not hold it."""
    free = PolicyLossConfig(kl_coef=0.0, clip_low=0.9, clip_high=99.0)
    capped = dataclasses.replace(free, importance_cap=1.1)
    given = inputs(old_is_sampler=True, old_logp=inputs().sampler_logp)
    ratio = np.exp(np.asarray(given.logp - given.sampler_logp))
    assert (ratio > 1.1).any() and (ratio < 1).any()
    for config, bound in ((free, np.inf), (capped, 1.1)):

        def loss(logp, config=config):
            return policy_loss(config, dataclasses.replace(given, logp=logp))

        grad, metrics = jax.grad(loss, has_aux=True)(given.logp)
        np.testing.assert_allclose(grad, -0.1 * np.minimum(ratio, bound) * given.advantages, rtol=1e-5)
        assert float(metrics["importance_max"]) == pytest.approx(min(ratio.max(), bound))
    assert float(metrics["importance_capped"]) == (ratio > 1.1).sum()


def test_the_sampler_s_log_probabilities_need_a_cap():
    with pytest.raises(InputError, match=r"old_logp=sampler needs loss.importance_cap.*set it"):
        GrpoConfig(out="", old_logp="sampler")
    GrpoConfig(out="", old_logp="sampler", loss=PolicyLossConfig(importance_cap=2.0))
