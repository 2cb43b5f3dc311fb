"""Tests how a model is laid out over the devices of a process: the rule at real sizes, overrides, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from planning import MODEL

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model.qwen import Qwen, ScalarQwen
from rmr1_jax.plan.model import model_shape
from rmr1_jax.policy import load
from rmr1_jax.sampler import layout as layout_module
from rmr1_jax.sampler.layout import check_weights_fit, default_slots, layout, local_layout, weight_bytes

GIB = 2**30


def axes(mesh) -> tuple[int, int]:
    assert mesh.shape["replica"] == 1 and mesh.axis_names == ("replica", "fsdp", "tensor")
    return mesh.shape["fsdp"], mesh.shape["tensor"]


@pytest.mark.parametrize(
    ("size", "count", "gib", "expected"),
    [
        ("0.5b", 8, 15.75, (8, 1)),
        ("1.5b", 8, 15.75, (8, 1)),
        ("7b", 8, 15.75, (4, 2)),  # 14.2 GiB of weights
        ("7b", 4, 31.25, (4, 1)),
        ("14b", 8, 15.75, (2, 4)),  # 27.5 GiB
        ("14b", 4, 31.25, (2, 2)),
        ("32b", 8, 15.75, (1, 8)),  # 61.0 GiB
        ("32b", 8, 31.25, (2, 4)),
        ("32b", 4, 95.73, (2, 2)),
        ("7b", 1, 15.75, (1, 1)),  # one device leaves no choice
    ],
)
def test_the_layout_of_published_models(size, count, gib, expected):
    model = Qwen(model_shape(f"qwen2.5-{size}"))
    assert axes(layout(model, jnp.bfloat16, jax.devices()[:count], int(gib * GIB))) == expected


def test_the_tensor_axis_grows_as_memory_shrinks():
    """From the bytes that the weights take: at most half of the memory, or as few as possible."""
    model = Qwen(MODEL)  # four heads, two key-value heads
    needs = {t: weight_bytes(model, make_mesh(MeshConfig(tensor=t)), jnp.float32) for t in (1, 2, 4, 8)}
    assert needs[1] > needs[2] > needs[8] > needs[4]  # eight devices do not divide the heads, and so all hold them

    def tensor(memory):
        return layout(model, jnp.float32, jax.devices(), memory).shape["tensor"]

    assert tensor(None) == tensor(10 * needs[1]) == tensor(2 * needs[1]) == 1
    assert tensor(2 * needs[1] - 1) == tensor(2 * needs[2]) == 2
    assert tensor(2 * needs[2] - 1) == 4
    assert tensor(2 * needs[4] - 1) == tensor(needs[4]) == 4  # too little for half, so the fewest bytes on a device
    assert layout(model, jnp.bfloat16, jax.devices(), needs[1]).shape["tensor"] == 1


def test_sizes_that_divide_the_key_value_heads_come_first():
    """On six devices, three key-value heads are split over 3 rather than 2, where each device would hold all three."""
    six = jax.devices()[:6]
    for heads, expected in ((3, 3), (2, 2)):
        model = Qwen(dataclasses.replace(MODEL, num_heads=12, num_kv_heads=heads, vocab_size=162))
        needs = {t: weight_bytes(model, make_mesh(MeshConfig(tensor=t), six), jnp.float32) for t in (1, 2, 3, 6)}
        enough = 2 * max(needs[2], needs[3])  # for either
        assert enough < 2 * needs[1] and layout(model, jnp.float32, six, enough).shape["tensor"] == expected


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_a_given_tensor_axis_overrides_the_rule(tensor):
    assert axes(layout(Qwen(MODEL), jnp.float32, jax.devices(), 10**12, tensor)) == (8 // tensor, tensor)


@pytest.mark.parametrize("tensor", [0, -1, 3, 16])
def test_a_tensor_axis_that_does_not_divide_the_devices_is_refused(tensor):
    with pytest.raises(InputError, match=rf"tensor={tensor} does not divide the 8 devices .* one of 1, 2, 4, 8"):
        layout(Qwen(MODEL), jnp.float32, jax.devices(), None, tensor)


def test_weights_that_cannot_fit_are_refused_with_numbers():
    model, dtype, memory = Qwen(model_shape("qwen2.5-32b")), jnp.float32, int(15.75 * GIB)
    message = r"64 layers of width 5120\) in float32 need 15\.[23] GiB on each of 8 devices with tensor=8"
    mesh = layout(model, dtype, jax.devices(), memory)
    check_weights_fit(model, dtype, mesh, memory)  # 15.3 GiB: no room for a cache, which the sampler then says
    with pytest.raises(InputError, match=message + r".*has 15\.0 GiB free; load it in bfloat16, or use a host"):
        check_weights_fit(model, dtype, mesh, 15 * GIB)
    with pytest.raises(InputError, match=r"in bfloat16 need 30\.5 GiB .* tensor=2, .*; give a larger tensor"):
        check_weights_fit(model, jnp.bfloat16, layout(model, jnp.bfloat16, jax.devices(), memory, 2), memory)
    check_weights_fit(model, dtype, mesh, None)


def test_the_devices_of_this_process_and_their_memory_are_used(monkeypatch):
    model = Qwen(MODEL)
    assert axes(local_layout(model, jnp.float32)) == (8, 1)  # a CPU reports no memory
    assert axes(local_layout(model, jnp.float32, tensor=4)) == (2, 4)
    given = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    assert local_layout(model, jnp.float32, given) is given
    with pytest.raises(InputError, match="tensor=2 and a mesh were both given"):
        local_layout(model, jnp.float32, given, 2)
    need = weight_bytes(model, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), jnp.float32)
    monkeypatch.setattr(layout_module, "free_memory", lambda devices: int(1.1 * need))
    assert axes(local_layout(model, jnp.float32)) == (4, 2)
    monkeypatch.setattr(layout_module, "free_memory", lambda devices: need // 20)
    with pytest.raises(InputError, match="the weights of this model"):
        local_layout(model, jnp.float32)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[4:6])
    monkeypatch.setattr(layout_module, "free_memory", lambda devices: None)
    assert list(local_layout(model, jnp.float32).devices.flat) == jax.devices()[4:6]


def test_a_scalar_model_has_the_layout_of_its_body():
    config = model_shape("qwen2.5-7b")
    scalar = ScalarQwen(config)
    one = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    head = 2 * config.hidden_size * (config.vocab_size - 1)
    assert weight_bytes(Qwen(config), one, jnp.bfloat16) - weight_bytes(scalar, one, jnp.bfloat16) == head
    assert axes(layout(scalar, jnp.bfloat16, jax.devices(), int(15.75 * GIB))) == (4, 2)


def test_slots_are_for_each_copy_of_the_weights():
    assert default_slots(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])) == 64
    assert default_slots(make_mesh(MeshConfig(tensor=2))) == 256


def test_a_policy_is_loaded_over_all_devices(tiny_policy, tmp_path):
    tiny_policy.save(tmp_path)
    assert axes(load(tmp_path, "float32").mesh) == (8, 1)
    policy = load(tmp_path, "float32", tensor=4)
    assert axes(policy.mesh) == (2, 4) and policy.params["embed"].sharding.mesh == policy.mesh
    with pytest.raises(InputError, match="tensor=3 does not divide"):
        load(tmp_path, "float32", tensor=3)
