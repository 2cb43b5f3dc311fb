"""Reading a model directory: the same bits in either layout, each file opened once, blocks within their bound."""

from pathlib import Path

import jax
import numpy as np
import pytest
from policies import shapes_of
from safetensors.numpy import load_file

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh, sampling_sharding, single_device_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.model import stored_model
from rmr1_jax.model.config import parse_config
from rmr1_jax.model.hf import load_params, save_params
from rmr1_jax.model.qwen import module_for, with_params
from rmr1_jax.model.stored_model import StoredModel
from rmr1_jax.sampler.weights import sampling_weights, stored_weights

RAW = {
    "model_type": "qwen2",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
MESHES = {"one": None, "8x1": (1, 8, 1), "2x4": (1, 2, 4)}


def make_model(path: Path, *, tied=False, dtype="float32", shard_bytes=10**9):
    """A random model in `path`; returns its module."""
    config = parse_config(RAW | {"tie_word_embeddings": tied}, "test")
    rng = np.random.default_rng(0)
    shapes = shapes_of(config)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    save_params(path, module_for(config), params, dtype=dtype, max_shard_bytes=shard_bytes)
    return module_for(config)


def mesh_of(name: str):
    if (sizes := MESHES[name]) is None:
        return single_device_mesh()
    return make_mesh(MeshConfig(**dict(zip(("replica", "fsdp", "tensor"), sizes, strict=True))))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "stored_as, dtype, tied",
    [
        ("float32", "float32", False),
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("bfloat16", "bfloat16", False),
    ],
)
def test_the_sampler_s_layout_is_read_as_it_is_made(tmp_path, monkeypatch, mesh, stored_as, dtype, tied):
    """Bit by bit and in the same places as the copy of the training weights."""
    module, mesh = make_model(tmp_path, tied=tied, dtype=stored_as), mesh_of(mesh)
    monkeypatch.setattr(stored_model, "BLOCK_BYTES", 7 * 16 * 4)  # blocks that divide nothing
    trained = with_params(module, load_params(tmp_path, module, mesh=mesh))
    made = sampling_weights(trained, dtype=dtype, mesh=mesh)
    read = stored_weights(StoredModel.open(tmp_path, module), dtype=dtype, mesh=mesh)
    assert jax.tree.structure(made) == jax.tree.structure(read)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(read), strict=True):
        assert a.dtype == b.dtype == dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_layer_by_hand(tmp_path):
    """The stored tensors of a layer, by the safetensors library, against the leaves of the unstacked layout."""
    module = make_model(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    read = StoredModel.open(tmp_path, module).read(single_device_mesh(), sharding=sampling_sharding, stacked=False)
    for i, layer in enumerate(read["layers"]):
        prefix = f"model.layers.{i}."
        np.testing.assert_array_equal(layer["attn"]["q"].reshape(16, 16), stored[prefix + "self_attn.q_proj.weight"].T)
        np.testing.assert_array_equal(layer["attn"]["o"].reshape(16, 16), stored[prefix + "self_attn.o_proj.weight"].T)
        np.testing.assert_array_equal(layer["mlp"]["down"], stored[prefix + "mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(layer["mlp_norm"], stored[prefix + "post_attention_layernorm.weight"])
    np.testing.assert_array_equal(read["embed"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(read["head"], stored["lm_head.weight"].T)


@pytest.mark.parametrize("stacked", [True, False])
def test_files_are_opened_once_and_read_in_order_in_bounded_blocks(tmp_path, monkeypatch, stacked):
    module = make_model(tmp_path, shard_bytes=4000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    opened, places, open_file = [], [], Path.open

    def counted(self, *args, **kwargs):
        opened.append(self)
        return open_file(self, *args, **kwargs)

    read = stored_model.Reader.read

    def recorded(self, tensor, first, count, row_shape):
        data = read(self, tensor, first, count, row_shape)
        places.append((tensor.file, tensor.offset + first * data[0].nbytes, data.nbytes))
        return data

    stored = StoredModel.open(tmp_path, module)
    monkeypatch.setattr(Path, "open", counted)
    monkeypatch.setattr(stored_model.Reader, "read", recorded)
    monkeypatch.setattr(stored_model, "BLOCK_BYTES", 1024)
    stored.read(single_device_mesh(), stacked=stacked)
    assert sorted(opened) == files
    assert places == sorted(places)
    assert max(size for *_, size in places) == 1024
    assert sum(size for *_, size in places) == sum(x.nbytes for file in files for x in load_file(file).values())


def test_few_blocks_are_read_ahead(tmp_path, monkeypatch):
    """The blocks in memory: those that wait, and the one that is being written."""
    module, read, most, written = make_model(tmp_path), [], 0, 0
    monkeypatch.setattr(stored_model, "BLOCK_BYTES", 256)
    block_read, array_write = stored_model._Block.read, stored_model._Array.write

    def reading(self, reader):
        read.append(self)
        return block_read(self, reader)

    def writing(self, block, rows):
        nonlocal most, written
        most, written = max(most, len(read) - written), written + 1
        return array_write(self, block, rows)

    monkeypatch.setattr(stored_model._Block, "read", reading)
    monkeypatch.setattr(stored_model._Array, "write", writing)
    load_params(tmp_path, module)
    assert 1 <= most <= stored_model.AHEAD + 1 and written == len(read) > 50


def test_a_progress_bar_appears_only_where_reading_takes_long(tmp_path, monkeypatch, capsys):
    module = make_model(tmp_path / "tiny")
    load_params(tmp_path / "tiny", module)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(stored_model, "PROGRESS_AFTER", 1e-9)
    load_params(tmp_path / "tiny", module)
    assert capsys.readouterr().err == ""  # in a file each drawing is a line: at first after some seconds more
    monkeypatch.setattr(stored_model, "pace", lambda brief: {})
    load_params(tmp_path / "tiny", module)
    shown = capsys.readouterr().err
    total = sum(x.nbytes for x in load_file(tmp_path / "tiny" / "model.safetensors").values())
    assert "reading tiny: 100%" in shown and f"{total / 1000:.1f}k/{total / 1000:.1f}k" in shown
    monkeypatch.setattr(stored_model, "first", lambda: False)
    load_params(tmp_path / "tiny", module)
    assert capsys.readouterr().err == ""


def test_files_that_change_after_the_check(tmp_path):
    module = make_model(tmp_path)
    file, stored = tmp_path / "model.safetensors", StoredModel.open(tmp_path, module)
    size = file.stat().st_size
    with file.open("r+b") as short:
        short.truncate(size - 100)
    with pytest.raises(InputError, match=f"changed while it was read: {size - 100} bytes are left"):
        stored.read(single_device_mesh())
    file.unlink()
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read: No such file"):
        stored.read(single_device_mesh())
