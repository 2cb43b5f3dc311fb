"""A group's prompt once a row: logits, log-probabilities, losses and gradients as with prompts of their own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.model.config import parse_config
from rmr1_jax.model.qwen import init_params, module_for, split, with_params
from rmr1_jax.sampler.sample import Sample, SamplingConfig
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.grpo import batch_logprobs, grpo_micro_loss
from rmr1_jax.train.losses import PolicyLossConfig, policy_loss
from rmr1_jax.train.micro_batches import mini_batch
from rmr1_jax.train.rollout import Group, RlPrompt

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
MODEL = parse_config({"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2} | SHAPE, "test")
GRAPHDEF = split(module_for(MODEL))[0]
SIZES = {"out": "", "dtype": "float32", "row_length": 48, "micro_rows": 16, "max_prompt_length": 32}
# Every ratio, surrogate and estimator of the KL divergence, each with an entropy term and an importance cap.
LOSSES = [
    PolicyLossConfig(ratio=r, surrogate=s, kl_kind=k, kl_coef=0.3, entropy_coef=0.1, importance_cap=1.2)
    for r, s, k in itertools.product(("token", "sequence"), ("clip", "cispo"), ("k1", "k2", "k3"))
]
# The length of each group's prompt and of its responses: prompts and responses of one token, groups of one response
# and without any advantage, and groups that are longer than a row.
GROUPS = [
    (9, [4, 1, 6, 2]),
    (1, [3, 1]),
    (14, [16, 12, 7, 9, 15]),
    (5, [1]),
    (2, [8, 8, 8]),
    (30, [16, 2, 11]),
    (1, [1]),
]


@pytest.fixture(scope="module")
def params():
    params = init_params(module_for(MODEL), jax.random.key(0))
    for part in (params["layers"], params["layers"]["attn"]):
        part |= {k: v + 0.1 for k, v in part.items() if k.endswith(("bias", "norm"))}
    return params


def made_groups(seed: int = 0, lengths=GROUPS) -> list[Group]:
    """Random tokens. Every token of a response has a log-probability of its own, by which tests find it in a row."""
    rng, number, groups = np.random.default_rng(seed), itertools.count(), []
    for prompt, responses in lengths:
        samples = []
        for n in responses:
            logp = np.asarray([-3.0 - next(number) / 256 for _ in range(n)], np.float32)
            samples.append(Sample(rng.integers(0, 61, n).tolist(), logp, logp, "stop"))
        rewards = rng.normal(size=len(responses)).astype(np.float32)
        tokens = rng.integers(0, 61, prompt).astype(np.int32)
        groups.append(Group(RlPrompt("", tokens, "A"), samples, [""] * len(samples), rewards, rewards))
    return groups


def rows_of(groups, **options):
    """The only micro-batch [B, T] of the groups, and the segments' lengths. Old and reference log-probabilities are
    functions of the sampler's, so that a token has the same ones wherever it lies."""
    sampling = SamplingConfig(max_new_tokens=16)
    ((batch, count),), lengths, _ = mini_batch(
        groups, GrpoConfig(sampling=sampling, **SIZES | options), skip_unmixed=False
    )
    assert count == 1
    batch = {k: v[0] for k, v in batch.items()}
    noise = np.sin(1000 * batch["sampler_logp"])
    return batch | {"old_logp": batch["sampler_logp"] + noise / 4, "ref_logp": batch["sampler_logp"] - noise}, lengths


def by_token(batch, values) -> np.ndarray:
    """`values` [B, T, ...] at the trained tokens, in the order of the groups."""
    trained = batch["weights"] > 0
    return np.asarray(values)[trained][np.argsort(-batch["sampler_logp"][trained])]


LAYOUTS = ({"share_prompts": False}, {}, {"max_segments": 2}, {"row_length": 128, "micro_rows": 8})


def test_logits_and_logprobs(params):
    """In rows that hold whole groups, in rows with few segments, and in rows with several groups."""

    @jax.jit
    def run(params, batch):
        where = (batch["tokens"], batch["positions"], batch["segment_ids"])
        logits = with_params(module_for(MODEL), params)(*where, parents=batch.get("parents"))
        micro = {k: v[None] for k, v in batch.items()}
        return logits, batch_logprobs(GRAPHDEF, params, micro, jnp.int32(1), dtype=jnp.float32)[0]

    results, used = [], []
    for options in LAYOUTS:
        batch, lengths = rows_of(made_groups(), **options)
        assert sum(lengths) == (batch["segment_ids"] > 0).sum()
        logits, logp = run(params, {k: v for k, v in batch.items() if v.dtype == np.int32})
        results.append((by_token(batch, np.roll(logits, 1, axis=1)), by_token(batch, logp)))
        used.append(sum(lengths))
    assert len(results[0][1]) == sum(n for _, responses in GROUPS for n in responses)
    assert used[0] > used[2] > used[1] > used[3]  # a prompt is repeated in each row that its group is split over
    for logits, logp in results[1:]:
        np.testing.assert_allclose(logits, results[0][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(logp, results[0][1], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def loss_and_gradient():
    """(params, batch, number of a loss, a layout's config) -> its value and gradient: one program for all losses."""

    @functools.cache
    def program(shared: bool):
        config = GrpoConfig(sampling=SamplingConfig(max_new_tokens=16), share_prompts=shared, **SIZES)

        def chosen(params, batch, number):
            def loss(_, inputs):
                values = jnp.stack([policy_loss(each, inputs)[0] for each in LOSSES])
                return values @ (jnp.arange(len(LOSSES)) == number), {}

            return grpo_micro_loss(GRAPHDEF, config, loss, params, batch, dtype=jnp.float32)[0]

        return jax.jit(jax.value_and_grad(chosen))

    return program


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_every_loss_and_its_gradient(params, loss_and_gradient, aggregation):
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        lengths = (
            GROUPS
            if seed == 1
            else [(int(rng.integers(1, 32)), rng.integers(1, 17, rng.integers(1, 6)).tolist()) for _ in range(4)]
        )
        groups = made_groups(seed, lengths)
        (separate, many), (shared, few) = (
            rows_of(groups, aggregation=aggregation, share_prompts=share) for share in (False, True)
        )
        assert sum(few) < sum(many)
        for number, config in enumerate(LOSSES):
            value, gradient = loss_and_gradient(True)(params, shared, number)
            expected, wanted = loss_and_gradient(False)(params, separate, number)
            assert abs(float(expected)) > 1e-3, config
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5, err_msg=str(config))
            assert all(float(jnp.abs(x).max()) > 1e-4 for x in jax.tree.leaves(wanted)), config
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), gradient, wanted)
