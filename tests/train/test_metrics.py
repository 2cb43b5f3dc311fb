"""FLOPs by formula against a count of weights and of pairs, and the share of a known peak."""

import dataclasses

import jax
import numpy as np
import pytest
from policies import shapes_of

from rmr1_jax.distributed.chips import Chip
from rmr1_jax.distributed.mesh import make_mesh
from rmr1_jax.train.metrics import forward_flops, mfu, throughput, train_flops


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_two_for_each_weight_and_token_and_four_for_each_number_of_a_pair(tiny_policy, tied):
    config = dataclasses.replace(tiny_policy.config, num_layers=3, tie_word_embeddings=tied)
    shapes = shapes_of(config)
    layers = {**shapes["layers"]["attn"], **shapes["layers"]["mlp"]}
    matrices = [shape for name, shape in layers.items() if "norm" not in name and "bias" not in name]
    matrices.append(shapes["embed"] if tied else shapes["head"])  # the embedding itself is looked up
    lengths = [7, 1, 30]
    pairs = sum(i + 1 for n in lengths for i in range(n))  # each token and those up to it
    expected = 2 * sum(map(np.prod, matrices)) * sum(lengths)
    expected += 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    assert forward_flops(config, lengths) == expected
    assert train_flops(config, lengths) == 3 * expected
    assert train_flops(config, []) == 0


def test_the_metrics_of_a_step(monkeypatch):
    mesh = make_mesh()
    assert throughput(600, 1.5, mesh) == {"tokens_per_second": 400, "tokens_per_second_per_device": 50}
    assert mfu(1e12, 2.0, mesh) == {}  # a CPU's peak is not known
    monkeypatch.setattr(
        "rmr1_jax.train.metrics.chip_of", lambda device: Chip(2e11) if device is jax.devices()[0] else None
    )
    assert mfu(1e12, 2.0, mesh) == {"mfu": pytest.approx(1 / (2 * 8 * 0.2))}
