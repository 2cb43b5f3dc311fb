"""The mesh: sizes, sizes that do not fit, and the two tables. Eight virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as Spec

from rmr1_jax.distributed.mesh import (
    AXES,
    MeshConfig,
    activation_sharding,
    constrain,
    local_mesh,
    make_mesh,
    own_rows,
    place_rows,
    rows_divisor,
    sampling_mesh,
    single_device_mesh,
    weight_sharding,
)
from rmr1_jax.errors import InputError
from rmr1_jax.train.optim import compile_update, init_state


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(tensor=2), (1, 4, 2)),
        (MeshConfig(replica=2, tensor=2), (2, 2, 2)),
        (MeshConfig(replica=8), (8, 1, 1)),
        (MeshConfig(fsdp=4, tensor=2), (1, 4, 2)),
    ],
    ids=str,
)
def test_sizes(config, sizes):
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict(zip(AXES, sizes, strict=True))
    assert [d.id for d in mesh.devices.ravel()] == list(range(8))
    assert rows_divisor(mesh) == sizes[0] * sizes[1]


def test_the_default_mesh_is_one_device():
    assert single_device_mesh().devices.shape == (1, 1, 1)
    assert make_mesh(devices=jax.devices()[:2]).shape["fsdp"] == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor": 3},
        {"replica": 16},
        {"fsdp": 4},
        {"fsdp": 0},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(wrong):
    with pytest.raises(InputError, match=r"does not cover 8 devices exactly; .* one of \[1, 2, 4, 8\]"):
        make_mesh(MeshConfig(**wrong))


@pytest.mark.parametrize("wrong", [{"replica": 0}, {"tensor": -2}, {"replica": -1}, {"fsdp": -2}], ids=str)
def test_sizes_below_one(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=rf"{name}: Input should be greater than .* \(got {value}\)"):
        MeshConfig(**wrong)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the mesh reads of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "tpu"


def chips(platform: str = "tpu") -> list[Chip]:
    """Two slices of two processes of two; numbered, as the runtime may do, in another order."""
    return [Chip(id=8 - i, process_index=i // 2, slice_index=i // 4, platform=platform) for i in range(8)][::-1]


def test_devices_come_slice_by_slice_and_process_by_process():
    devices = make_mesh(MeshConfig(replica=2), chips()).devices
    places = [(d.slice_index, d.process_index, d.id) for d in devices.flat]
    assert places == sorted(places)
    assert [{d.slice_index for d in replica.flat} for replica in devices] == [{0}, {1}]
    assert make_mesh(MeshConfig(replica=4), chips()).devices.shape == (4, 2, 1)


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(tensor=2), MeshConfig(replica=1, fsdp=8)], ids=str)
def test_a_replica_stays_within_a_slice(config):
    with pytest.raises(InputError, match=r"replica=1 on 2 slices: .* replica must be a multiple of 2"):
        make_mesh(config, chips())
    assert make_mesh(MeshConfig(), chips("gpu")).devices.shape == (1, 8, 1)  # the host of a GPU is no slice


def test_sampling_stays_within_a_process():
    mesh = make_mesh(MeshConfig(replica=2, fsdp=1, tensor=4), chips())
    with pytest.raises(InputError, match=r"sampling_tensor=4 .* which has 2 of the 8 devices; give one of \[1, 2\]"):
        sampling_mesh(mesh)
    for tensor in (1, 2):
        sampling = sampling_mesh(mesh, tensor)
        assert sampling.devices.shape == (1, 8 // tensor, tensor)
        assert list(sampling.devices.flat) == list(mesh.devices.flat)
        for process in range(4):
            own = local_mesh(sampling, process)
            assert own.devices.shape == (1, 2 // tensor, tensor)
            assert {d.process_index for d in own.devices.flat} == {process}
    whole = make_mesh(MeshConfig(replica=2, tensor=2))
    assert local_mesh(whole) is whole  # one process
    assert sampling_mesh(whole).devices.shape == (1, 4, 2)


def test_rows_are_placed_where_they_belong():
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))
    assert own_rows(mesh, 4) == [0, 1, 2, 3]
    whole = np.arange(24.0).reshape(2, 4, 3)
    placed = place_rows(mesh, "ABT", {"x": whole}, 4)["x"]
    assert placed.sharding == activation_sharding(mesh, "ABT", (2, 4, 3))
    np.testing.assert_array_equal(placed, whole)


def test_weights_and_activations_have_their_own_tables():
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))
    assert weight_sharding(mesh, "LDF", (3, 4, 6)).spec == Spec(None, ("fsdp",), ("tensor",))
    assert weight_sharding(mesh, "LNHD", (3, 4, 5, 6)).spec == Spec(None, ("tensor",), None, ("fsdp",))
    assert activation_sharding(mesh, "BTD", (4, 5, 6)).spec == Spec(("replica", "fsdp"), None, None)
    assert activation_sharding(mesh, "ABT", (3, 4, 5)).spec == Spec(None, ("replica", "fsdp"), None)


def test_a_dimension_that_does_not_divide_is_whole():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    assert weight_sharding(mesh, "LDKH", (3, 4, 2, 8)).spec == Spec(None, ("fsdp",), None, None)
    x = jax.device_put(np.zeros((3, 5, 2, 8)), weight_sharding(mesh, "LDKH", (3, 5, 2, 8)))
    assert x.is_fully_replicated


def test_constrain_pins_an_activation_inside_jit():
    @jax.jit
    def pinned(x):
        return constrain(x * 2, "BTD")

    x = np.ones((8, 2, 4), np.float32)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2))):
        y = pinned(x)
    assert y.sharding.shard_shape(y.shape) == (2, 2, 4)
    with jax.set_mesh(single_device_mesh()):
        np.testing.assert_array_equal(pinned(x), y)
    np.testing.assert_array_equal(pinned(x), y)  # and without any mesh


def test_a_train_state_keeps_its_layout():
    """Moments lie as their weights do from the start, and a step compiles once: its result fits into itself."""
    mesh = make_mesh(MeshConfig(tensor=2))
    weight = weight_sharding(mesh, "DF", (8, 4))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.ones((8, 4)), weight), "odd": jnp.ones(3)}
        state = init_state(params, optimizer := optax.adamw(0.1))
        layout = jax.tree.map(lambda x: x.sharding, state)
        adam = layout.opt_state[0]
        assert adam.mu["w"] == adam.nu["w"] == weight

        def loss(params, batch):
            return jnp.mean((batch["x"] @ params["w"]) ** 2) + params["odd"].sum(), {}

        step = compile_update(state, loss=loss, optimizer=optimizer, clip=1.0)
        for _ in range(3):
            state, _ = step(state, [({"x": np.ones((2, 4, 8), np.float32)}, 2)])
            assert jax.tree.map(lambda x: x.sharding, state) == layout
        assert step._cache_size() == 1 and int(state.step) == 3
