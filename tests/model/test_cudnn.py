"""cuDNN's attention without a GPU: its arguments against segments, and the whole call up to what is compiled for CUDA.

A stand-in for the kernel follows cuDNN's rules to the letter: each segment by its length and offset, and garbage where
there is none. `scripts/gpu_check` compares the kernel itself with XLA.
"""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.distributed.mesh import MeshConfig, activation_sharding, make_mesh, single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model import cudnn
from rmr1_jax.model.attention import attend, choose, segment_limit
from rmr1_jax.model.config import parse_config
from rmr1_jax.model.cudnn import Cudnn
from rmr1_jax.model.qwen import init_params, module_for, split
from rmr1_jax.train.sft import sft_micro_loss

ROWS = ([100, 60, 33], [256], [1, 130, 125], [7], [], [2] * 64)  # lengths of segments; the rest of a row is padding


def packed(rows=ROWS, T=256) -> tuple[np.ndarray, np.ndarray]:
    """positions and segment_ids, [B, T] int32."""
    positions, segments = np.zeros((2, len(rows), T), np.int32)
    for b, lengths in enumerate(rows):
        ends = np.cumsum(lengths, dtype=int)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True), start=1):
            segments[b, end - length : end], positions[b, end - length : end] = number, np.arange(length)
    return positions, segments


@jax.custom_vjp
def stand_in(q, k, v, lengths, offsets):
    return forward(q, k, v, lengths, offsets)[0]


def attention(q, k, v, lengths, offsets):
    """[B, T, N, H], and where it lies in a segment, [B, T, 1, 1]."""
    at = jnp.arange(q.shape[1])
    begins, sizes = offsets[:, : lengths.shape[1], None], lengths[:, :, None]
    inside = (offsets[:, :-1, None] >= 0) & (at >= begins) & (at < begins + sizes)  # [B, M, T]
    seen = (inside[:, :, :, None] & inside[:, :, None]).any(1) & (at[:, None] >= at)
    scores = jnp.where(seen[:, None], jnp.einsum("btnh,bsnh->bnts", q, k), -1e30)
    real = inside.any(1)[:, :, None, None]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v), real


def forward(q, k, v, lengths, offsets):
    assert q.shape == k.shape == v.shape  # with repeated heads
    assert lengths.shape[1] >= 2 and offsets.shape == (len(q), lengths.shape[1] + 1)
    assert lengths.dtype == offsets.dtype == jnp.int32
    out, real = attention(q, k, v, lengths, offsets)
    return jnp.where(real, out, jnp.nan), (q, k, v, lengths, offsets)


def backward(saved, d_out):
    q, k, v, lengths, offsets = saved
    real = attention(*saved)[1]
    grads = jax.vjp(lambda *x: jnp.where(real, attention(*x, lengths, offsets)[0], 0), q, k, v)[1](d_out)
    return *(jnp.where(real, x, jnp.nan) for x in grads), None, None


stand_in.defvjp(forward, backward)


@pytest.mark.parametrize(
    ("N", "K", "axes"), [(4, 2, None), (2, 2, None), (6, 1, None), (4, 2, MeshConfig(fsdp=2, tensor=2, replica=2))]
)
def test_the_arguments_make_the_same_attention(N, K, axes, monkeypatch):
    """Values and gradients, with garbage wherever the kernel writes nothing, and NaN in the inputs of padding."""
    monkeypatch.setattr(cudnn, "cudnn_packed_attention", stand_in)
    mesh, (positions, segments) = make_mesh(axes) if axes else single_device_mesh(), packed((*ROWS, [3], [9, 9]))
    rng, real = np.random.default_rng(N), segments[:, :, None, None] > 0
    shapes = [(8, 256, heads, 16) for heads in (N, K, K)]
    arrays = [np.where(real, rng.normal(size=shape), 0).astype(np.float32) for shape in shapes]
    cotangent = rng.normal(size=shapes[0]).astype(np.float32)

    def run(implementation, garbage):
        def loss(*x):
            out = attend(*x, positions, segments, implementation)
            return jnp.sum(jnp.where(real, out, 0) * cotangent), out

        given = [np.where(real, x, np.float32(garbage)) for x in arrays]
        placed = [jax.device_put(x, activation_sharding(mesh, "BTNH", x.shape)) for x in given]
        with jax.set_mesh(mesh):
            (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*placed)
        return out, grads

    out, grads = run(Cudnn(64), np.nan)
    expected, wanted = run("xla", 0)
    np.testing.assert_array_equal(np.where(real, 0, out), 0)
    np.testing.assert_allclose(np.where(real, out, 0), np.where(real, expected, 0), atol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_array_equal(np.where(real, 0, a), 0)
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_lengths_and_offsets():
    lengths, offsets, fits = cudnn.segment_spans(packed(([3, 2, 4], [16], [], [1] * 5), T=16)[1], 4)
    assert lengths.tolist() == [[3, 2, 4, -1], [16, -1, -1, -1], [-1] * 4, [1, 1, 1, 1]]
    assert offsets.tolist() == [[0, 3, 5, -1, -1], [0, -1, -1, -1, -1], [-1] * 5, [0, 1, 2, 3, -1]]
    assert fits.tolist() == [True, True, True, False]


def test_segments_after_padding_and_numbers_with_gaps():
    """A segment is a run of one id: where it begins and its number do not matter."""
    lengths, offsets, _ = cudnn.segment_spans(np.int32([[0, 0, 7, 7, 7, 0, 3, 9, 9, 0]]), 4)
    assert lengths.tolist() == [[3, 1, 2, -1]] and offsets.tolist() == [[2, 6, 7, -1, -1]]


def test_too_many_segments_are_never_a_wrong_number(monkeypatch):
    monkeypatch.setattr(cudnn, "cudnn_packed_attention", stand_in)
    x = jnp.ones((2, 256, 1, 8))
    out = attend(x, x, x, *packed(([1] * 5, [1] * 6)), Cudnn(5))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_the_most_segments():
    """Twice as many as fit in the mean, and at least eight."""
    lengths = ((4, 1), (32, 100), (4096, 1800), (4096, 100), (12288, 1151))
    assert [cudnn.most_segments(*each) for each in lengths] == [4, 8, 8, 82, 22]
    assert segment_limit(Cudnn(9)) == 9 and segment_limit("xla") is None


def gpu(kind="NVIDIA H100 80GB HBM3", capability="9.0", version="cuda 13000", platform="gpu"):
    client = SimpleNamespace(platform_version=version)
    return SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability, client=client)


def chosen(implementation, device, dtype=jnp.bfloat16, head_dim=128):
    return choose(implementation, device, dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize(
    ("device", "options", "words"),
    [
        (jax.devices()[0], {}, "runs on NVIDIA GPUs, and this device is a CPU"),
        (gpu(platform="tpu"), {}, "runs on NVIDIA GPUs, and this device is a TPU"),
        (gpu("MI300X", "gfx942", "rocm 7"), {}, "runs on NVIDIA GPUs, and this device is a MI300X"),
        (
            gpu("NVIDIA A100-SXM4-80GB", "8.0"),
            {},
            r"Hopper generation or newer .* A100-SXM4-80GB, compute capability 8",
        ),
        (gpu(), {"dtype": jnp.float32}, "computes in bfloat16, and dtype is float32"),
        (gpu(), {"head_dim": 96}, "heads of 64 or 128 numbers, and this model's have 96"),
    ],
)
def test_where_cudnn_cannot_run_it_is_refused_and_auto_is_another(device, options, words):
    with pytest.raises(InputError, match=f"attention=cudnn: .*{words}.*set attention: auto"):
        chosen("cudnn", device, **options)
    assert chosen("auto", device, **options) == ("pallas" if device.platform == "tpu" else "xla")


def test_where_cudnn_can_run_auto_is_cudnn():
    for device, head_dim in ((gpu(), 64), (gpu("NVIDIA H200"), 128), (gpu("NVIDIA B200", "10.0"), 128)):
        assert chosen("auto", device, head_dim=head_dim) == chosen("cudnn", device, head_dim=head_dim) == Cudnn(64)
        assert chosen("xla", device) == "xla"


def test_scores_cannot_be_transformed():
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(InputError, match=r"attention=cudnn: cuDNN cannot transform scores.*set attention=xla"):
        attend(x, x, x, *packed(([128],), 128), Cudnn(8), jnp.tanh)


@pytest.fixture
def as_on_hopper(monkeypatch):
    """JAX asks no GPU for its version, so that calls of cuDNN can be traced and lowered here."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(private, "is_cuda_compute_capability_equal", lambda capability: False)


def calls(function, *arrays) -> list[tuple[str, str]]:
    """The calls of cuDNN in a function lowered for CUDA: their names and options."""
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r'@__cudnn\$(\w+)\(.*?backend_config = "(.*?)", ', text)


@pytest.mark.parametrize("meshed", [False, True])
def test_the_call_lowers_for_cuda(meshed, as_on_hopper):
    """Forward and backward calls of cuDNN, with a causal mask in packed rows."""
    q, k = jnp.zeros((6, 256, 14, 64), jnp.bfloat16), jnp.zeros((6, 256, 2, 64), jnp.bfloat16)

    def gradient(q, k, v):
        return jax.grad(lambda *x: attend(*x, *packed(), Cudnn(64)).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
            q, k, v
        )

    with jax.set_mesh(single_device_mesh()) if meshed else nullcontext():
        found = calls(gradient, q, k, k)
    assert [name for name, _ in found] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for _, raw in found:
        options = json.loads(raw.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        assert options["mask_type"] == "PADDING_CAUSAL" and options["max_seg_per_batch"] == 64
        assert options["fmha_scale"] == 1.0 and options["dropout_rate"] == 0
        assert options["intermediate_tensor_shape"]["dimensions"] == ["6", "14", "256", "256"]


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("dots", 1), ("full", 2)])
def test_remat_of_a_model_with_cudnn(remat, forward, as_on_hopper):
    """Only `full` computes attention again in the backward pass. A scan's body is lowered once."""
    fields = {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 60, "max_position_embeddings": 256}
    config = parse_config(fields | {"rope_theta": 1e4, "tie_word_embeddings": True}, "test")
    params, (positions, segments) = init_params(module_for(config), jax.random.key(0)), packed()
    batch = {
        "tokens": positions,
        "positions": positions,
        "segment_ids": segments,
        "weights": (segments > 0) / np.float32(9),
    }
    batch = {name: jnp.asarray(values) for name, values in batch.items()}
    options = {"remat": remat, "attention": Cudnn(64), "dtype": jnp.bfloat16}

    def loss(params):
        return sft_micro_loss(split(module_for(config))[0], params, batch, **options)[0]

    with jax.set_mesh(single_device_mesh()):
        names = [name for name, _ in calls(jax.grad(loss), params)]
    assert sorted(names) == ["fmhaSoftmax"] * forward + ["fmhaSoftmaxBackward"]
