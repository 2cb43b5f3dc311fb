"""One draw: against exact distributions, and against the tokens that Transformers keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rmr1_jax.sampler.draw import _first_above, _top_k_top_p, draw, truncate
from rmr1_jax.sampler.programs import make_controls
from rmr1_jax.sampler.sample import SamplingConfig


@pytest.fixture(scope="module")
def theirs():
    """A random model of Transformers with 150 tokens and uneven probabilities."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=150, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        model.lm_head.weight *= 25
    return model.eval()


def exact(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution to draw from, token by token as the settings are defined."""
    probs = np.exp(logits / temperature)
    order = sorted(range(len(logits)), key=lambda i: -probs[i])
    order = order[:top_k] if top_k else order
    total, reached, kept = sum(probs[i] for i in order), 0.0, []
    for i in order:
        if reached >= top_p:
            break
        kept.append(i)
        reached += probs[i] / total
    kept = [i for i in kept if probs[i] >= min_p * max(probs)]
    probs[[i for i in range(len(logits)) if i not in kept]] = 0
    return probs / probs.sum()


draw_rows, cut_rows = jax.jit(draw), jax.jit(truncate)


def draw_many(
    logits: np.ndarray, n: int, temperature: float, top_k: int, top_p: float, min_p: float = 0.0, seed: int = 7
):
    rows = np.tile(np.asarray(logits, np.float32), (n, 1))
    keys = jax.random.split(jax.random.key(seed), n)
    return draw_rows(rows, keys, np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(min_p))


# Fewer than a chunk of the cumulative sum, whole chunks, and chunks with a rest.
LOGITS = {size: np.random.default_rng(1).normal(0, 1.2, size) for size in (20, 256, 300)}


@pytest.mark.parametrize(
    ("size", "temperature", "top_k", "top_p", "min_p"),
    [
        (20, 1.0, 0, 1.0, 0.0),
        (20, 0.5, 0, 1.0, 0.0),
        (20, 2.0, 0, 1.0, 0.0),
        (20, 1.0, 6, 1.0, 0.0),
        (20, 1.0, 1, 1.0, 0.0),
        (20, 1.0, 99, 1.0, 0.0),
        (20, 1.0, 0, 0.7, 0.0),
        (20, 1.0, 0, 0.01, 0.0),
        (20, 0.7, 8, 0.8, 0.0),
        (20, 2.0, 4, 0.75, 0.0),
        (256, 1.0, 0, 1.0, 0.0),
        (256, 0.7, 100, 0.9, 0.0),
        (300, 1.0, 0, 1.0, 0.0),
        (300, 0.7, 0, 0.9, 0.0),
        (20, 1.0, 0, 1.0, 0.3),
        (20, 0.7, 8, 0.9, 0.2),
        (20, 1.0, 0, 1.0, 0.999),
        (300, 2.0, 0, 1.0, 0.1),
        (300, 0.7, 50, 0.95, 0.05),
    ],
)
def test_20000_draws_follow_the_exact_distribution(size, temperature, top_k, top_p, min_p):
    n, logits = 20_000, LOGITS[size]
    drawn = draw_many(logits, n, temperature, top_k, top_p, min_p)
    probs = exact(logits, temperature, top_k, top_p, min_p)
    counts = np.bincount(drawn.token, minlength=size)
    assert len(counts) == size and counts[probs == 0].sum() == 0
    kept = probs > 0
    if kept.sum() > 1:
        rare = probs[kept] * n < 5  # one bin together, or the statistic does not follow chi-square
        counts, expected = (
            np.append(x[kept][~rare], x[kept][rare].sum() if rare.any() else []) for x in (counts, n * probs)
        )
        assert len(counts) > 1 and scipy.stats.chisquare(counts, expected).pvalue > 1e-3
    np.testing.assert_allclose(drawn.sampled_logp, np.log(probs[drawn.token]), atol=1e-5)
    np.testing.assert_allclose(drawn.logp, scipy.special.log_softmax(logits)[drawn.token], atol=1e-5)


def test_top_k_comes_before_top_p():
    """The case that tells the two orders apart: over all tokens the first two reach less than top_p."""
    drawn = draw_many(np.log([0.3, 0.2, 0.15, 0.15, 0.1, 0.1]), 2000, 1.0, 3, 0.7)
    assert set(np.unique(drawn.token)) == {0, 1}  # of the three, 0.46 and 0.31; of all, the first four would be kept


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.1},
        {"top_p": 0.8, "top_k": 20},
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05},
        {"temperature": 1.7, "top_p": 0.9, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 40, "min_p": 0.02},
    ],
    ids=str,
)
def test_kept_tokens_and_their_probabilities_are_those_of_transformers(theirs, settings):
    """Transformers applies the settings in its own order, and returns the logits before and after them."""
    torch.manual_seed(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None} | settings
    seen = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "eos_token_id": None}
    made = theirs.generate(
        torch.tensor([[1, 2, 3]]), do_sample=True, max_new_tokens=30, pad_token_id=0, **options, **seen
    )
    logits, scores = (np.concatenate([x.numpy() for x in part]) for part in (made.logits, made.scores))
    assert 30 <= np.isfinite(scores).sum() < 30 * 100 and len(set(np.isfinite(scores).sum(-1))) > 1
    keys, controls = jax.random.split(jax.random.key(0), 2000), make_controls(SamplingConfig(**settings), ())
    expected = scipy.special.log_softmax(scores.astype(np.float64), axis=-1)
    for row, logp in zip(logits, expected, strict=True):
        rows = np.tile(row, (2000, 1))
        drawn = draw_rows(rows, keys, controls.temperature, controls.top_k, controls.top_p, controls.min_p)
        np.testing.assert_allclose(drawn.sampled_logp, logp[drawn.token], atol=2e-5)  # -inf for a token they cut
    kept = cut_rows(logits / controls.temperature, controls.top_k, controls.top_p, controls.min_p)
    np.testing.assert_array_equal(np.isfinite(kept), np.isfinite(scores))


def test_without_min_p_a_truncated_draw_is_bitwise_as_before():
    """`min_p=0` takes part in the arithmetic and changes no bit of it."""
    logits = np.float32(LOGITS[300])[None]
    kept = cut_rows(logits, np.int32(30), np.float32(0.9), np.float32(0))
    np.testing.assert_array_equal(kept, jax.jit(_top_k_top_p)(logits, np.int32(30), np.float32(0.9)))


def test_temperature_zero_is_greedy_whatever_else_is_set():
    drawn = draw_many(LOGITS[300], 50, 0.0, 3, 0.5, 0.3)
    assert set(np.unique(drawn.token)) == {LOGITS[300].argmax()}
    np.testing.assert_allclose(drawn.logp, scipy.special.log_softmax(LOGITS[300]).max(), atol=1e-5)
    np.testing.assert_array_equal(drawn.sampled_logp, 0)


def test_rows_are_drawn_by_their_own_keys():
    """A row's token depends on its logits and its key, not on its place among others."""
    rows = np.stack([np.roll(LOGITS[300], i) for i in range(40)]).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 40)
    settings = np.float32(1), np.int32(0), np.float32(0.9), np.float32(0.01)
    drawn, other = draw_rows(rows, keys, *settings), draw_rows(rows[::-1], keys[::-1], *settings)
    for a, b in zip(drawn, other, strict=True):
        np.testing.assert_array_equal(a, b[::-1])
    assert len(np.unique(drawn.token)) > 20


@pytest.mark.parametrize("size", [20, 300])
def test_tokens_of_probability_zero_are_never_drawn(size):
    """First and last ones, whole chunks, and all but one."""
    for allowed in ([size // 2], [3, size - 5], range(4, 9), range(size - 9, size - 1), [0, size - 1]):
        logits = np.full(size, -1e9)
        logits[list(allowed)] = np.linspace(0, 1, len(allowed))
        drawn = draw_many(logits, 500, 1.0, 0, 1.0)
        assert set(np.unique(drawn.token)) == set(allowed)
        assert np.isfinite(drawn.sampled_logp).all()


first_above = jax.jit(_first_above)


def test_uniforms_at_both_ends_draw_the_first_and_the_last_token_that_can_be():
    weights = np.float32([[0, 0, 0.1, 0.7, 0.3, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1e-30], [1, 1, 1, 1, 1, 1]])
    nearly_one = np.nextafter(np.float32(1), np.float32(0))
    # 1 itself stands for a product that is rounded up to the total.
    for uniform, expected in ((0, [2, 0, 5, 0]), (nearly_one, [4, 0, 5, 5]), (1, [4, 0, 5, 5]), (0.5, [3, 0, 5, 3])):
        place, total = first_above(weights, np.full(4, uniform, np.float32))
        assert place.tolist() == expected
        np.testing.assert_allclose(total, [1.1, 1, 1e-30, 6], rtol=1e-6)


@pytest.mark.parametrize("size", [20, 128, 1188])  # the last as many as the chunks of Qwen's vocabulary
def test_rounding_draws_nothing_of_weight_zero(size):
    """A running sum that is rounded differently from place to place may rise where the weight is zero, and the uniform
    number may fall just there."""
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=(20, size)) * (rng.random((20, size)) < 0.1)
    weights[:, size // 3] += 1e-3
    weights = np.repeat(weights.astype(np.float32), 150, axis=0)
    running = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(weights))
    rows = np.arange(len(weights))
    place = rng.integers(0, size, len(rows))
    uniform = running[rows, place] / running[:, -1]
    uniform = np.nextafter(uniform, np.float32([0, 1, 2]).repeat(len(rows) // 3) * uniform)  # below, at, above
    uniform = np.clip(uniform, 0, np.nextafter(np.float32(1), np.float32(0)))
    drawn = weights[rows, first_above(weights, uniform)[0]]
    assert drawn.min() > 0 and len(set(drawn)) > size // 2
