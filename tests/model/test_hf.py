"""Weights in and out: the table covers the model, files that are wrong are told apart, memory stays within bounds."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
from policies import shapes_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model import hf, stored_model
from rmr1_jax.model.config import parse_config, read_config
from rmr1_jax.model.hf import load_params, save_params
from rmr1_jax.model.qwen import module_for, param_dims
from rmr1_jax.model.table import TABLE
from rmr1_jax.model.tokenizer import copy_side_files

RAW = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
}
MAX_RATIO = 1.3


def make_config(model_type="qwen2", **changes):
    return parse_config({"model_type": model_type} | RAW | changes, "test")


def make_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = shapes_of(config)
    return jax.tree.map(lambda shape: rng.standard_normal(shape).astype(np.float32), shapes, is_leaf=is_shape)


def is_shape(x):
    return isinstance(x, tuple)


@pytest.fixture
def export(tmp_path):
    """(directory, config, params) of an untied Qwen2 in one file."""
    config = make_config()
    params = make_params(config)
    save_params(tmp_path, module_for(config), params, dtype="float32")
    return tmp_path, config, params


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def error_of(model_dir, config) -> str:
    with pytest.raises(InputError) as caught:
        load_params(model_dir, module_for(config))
    return str(caught.value)


def test_the_table_has_every_weight_with_its_letters():
    for config in (make_config("qwen2"), make_config("qwen3"), make_config(tie_word_embeddings=True)):
        leaves = jax.tree_util.tree_leaves_with_path(param_dims(module_for(config)))
        flat = {jax.tree_util.keystr(path, simple=True, separator="."): dims for path, dims in leaves}
        flat = {path: dims.removeprefix("L") for path, dims in flat.items()}
        rows = {row.path: row for row in TABLE}
        assert len(rows) == len(TABLE) and flat.keys() <= rows.keys()
        for path, dims in flat.items():
            assert sorted(rows[path].letters.replace(",", "")) == sorted(dims)


def test_stored_forms_are_the_library_s(export):
    """Names, shapes and layout, read by the safetensors library and compared by hand."""
    path, _, params = export
    stored = load_file(path / "model.safetensors")
    assert len(stored) == 3 + 3 * 12
    layer = jax.tree.map(lambda x: x[1], params["layers"])
    prefix = "model.layers.1."
    np.testing.assert_array_equal(stored[prefix + "self_attn.q_proj.weight"], layer["attn"]["q"].reshape(16, 24).T)
    np.testing.assert_array_equal(stored[prefix + "self_attn.k_proj.bias"], layer["attn"]["k_bias"].reshape(12))
    np.testing.assert_array_equal(stored[prefix + "self_attn.o_proj.weight"], layer["attn"]["o"].reshape(24, 16).T)
    np.testing.assert_array_equal(stored[prefix + "mlp.down_proj.weight"], layer["mlp"]["down"].T)
    np.testing.assert_array_equal(stored["lm_head.weight"], params["head"].T)
    with safe_open(path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shard_bytes", [10**9, 4000, 1])
@pytest.mark.parametrize("model_type, tied", [("qwen2", False), ("qwen3", True)])
def test_round_trip_in_shards_and_blocks(tmp_path, monkeypatch, model_type, tied, shard_bytes):
    config = make_config(model_type, tie_word_embeddings=tied)
    params = make_params(config)
    save_params(tmp_path, module_for(config), params, dtype="float32", max_shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 10**9) and (len(files) > 1) == index.exists()
    if shard_bytes == 4000:
        assert all(sum(x.nbytes for x in load_file(file).values()) <= 4000 for file in files)
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert read_config(tmp_path) == config
    assert_equal(load_params(tmp_path, module_for(config)), params)
    monkeypatch.setattr(stored_model, "BLOCK_BYTES", 7 * 16 * 4)  # blocks that divide nothing
    assert_equal(load_params(tmp_path, module_for(config)), params)
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))
    sharded = load_params(tmp_path, module_for(config), mesh=mesh)
    assert_equal(sharded, params)
    assert "fsdp" in str(sharded["embed"].sharding.spec) and "tensor" in str(
        sharded["layers"]["attn"]["q"].sharding.spec
    )
    save_params(tmp_path / "again", module_for(config), sharded, dtype="float32")
    assert_equal(load_params(tmp_path / "again", module_for(config)), params)


def test_dtypes(export, tmp_path):
    path, config, params = export
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert_equal(load_params(path, module_for(config), dtype="bfloat16"), rounded)
    save_params(tmp_path / "half", module_for(config), params, dtype="bfloat16")
    assert {x.dtype.name for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_params(tmp_path / "half", module_for(config), dtype="float32")
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(np.float32), rounded))


def test_a_second_export_replaces_the_first(export):
    path, config, params = export
    save_params(path, module_for(config), params, dtype="float32", max_shard_bytes=4000)
    assert not (path / "model.safetensors").exists()
    (path / "notes.safetensors").write_text("not ours")
    other = make_params(config, seed=1)
    save_params(path, module_for(config), other, dtype="float32")
    assert sorted(x.name for x in path.iterdir()) == ["config.json", "model.safetensors", "notes.safetensors"]
    assert_equal(load_params(path, module_for(config)), other)


def test_a_failed_export_leaves_the_earlier_one(export, monkeypatch):
    path, config, _ = export
    before = sorted((x.name, x.read_bytes()) for x in path.iterdir())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        save_params(path, module_for(config), make_params(config, seed=1), dtype="float32")
    assert sorted((x.name, x.read_bytes()) for x in path.iterdir()) == before


def test_every_tensor_that_does_not_fit_is_in_one_error(export):
    path, config, _ = export
    stored = load_file(path / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight"], stored["model.layers.2.mlp.up_proj.weight"]
    stored["model.norm.weight"] = np.zeros(7, np.float32)
    stored["model.layers.0.self_attn.o_proj.bias"] = np.zeros(16, np.float32)
    stored["visual.patch.weight"] = np.zeros(3, np.float32)
    save_file(stored, path / "model.safetensors")
    lines = error_of(path, config).splitlines()
    assert lines[1:] == [
        "  model.layers.{l}.mlp.up_proj.weight: missing (l = 0, 2)",
        "  model.norm.weight: shape [7], expected [16]",
        "  model.layers.{l}.self_attn.o_proj.bias: not a weight of this model (l = 0)",
        "  visual.patch.weight: not a weight of this model",
    ]


def test_another_architecture_is_named_before_anything_is_allocated(export, monkeypatch):
    path, _, _ = export
    monkeypatch.setattr(stored_model, "_zeros", lambda **_: pytest.fail("allocated"))
    text = error_of(path, make_config("qwen3", num_hidden_layers=4))
    assert "q_norm.weight: missing (l = 0, 1, 2, 3)" in text
    assert "q_proj.bias: not a weight of this model (l = 0, 1, 2)" in text


def test_a_tied_checkpoint_may_store_its_head_if_it_is_the_embedding(tmp_path):
    config = make_config(tie_word_embeddings=True)
    params = make_params(config)
    save_params(tmp_path, module_for(config), params, dtype="float32")
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    head = stored["model.embed_tokens.weight"].copy()
    save_file(stored | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert_equal(load_params(tmp_path, module_for(config)), params)
    head[-1, -1] += 1
    save_file(stored | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert "lm_head.weight: differs from the embedding" in error_of(tmp_path, config)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3554214621\n"


@pytest.mark.parametrize("which", ["single", "shard", "index"])
@pytest.mark.parametrize(
    "content, says",
    [
        (LFS, f"Git LFS pointer of {len(LFS)} bytes, not the 3554214621 bytes"),
        (b"\n<!DOCTYPE html><html>rate limited</html>", "HTML page of 41 bytes"),
        (b"PK\x03\x04" + b"0" * 20, "pickled PyTorch file of 24 bytes"),
        (b"\x93" * 400, "400 bytes without a readable header"),
    ],
    ids=["lfs", "html", "pickle", "noise"],
)
def test_something_else_under_the_name_of_a_weights_file(tmp_path, which, content, says):
    config = make_config()
    limit = 10**9 if which == "single" else 8000
    save_params(tmp_path, module_for(config), make_params(config), dtype="float32", max_shard_bytes=limit)
    file = sorted(tmp_path.glob("*.index.json" if which == "index" else "*.safetensors"))[-1]
    file.write_bytes(content)
    text = error_of(tmp_path, config)
    assert str(file) in text and says in text


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_says_how_much_is_missing(export, keep):
    path, config, _ = export
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    text = error_of(path, config)
    expected = {-1: len(whole), 100: 8 + int.from_bytes(whole[:8], "little"), 0: 8, 4: 8}[keep]
    assert str(file) in text and "cut short" in text
    assert f"{expected} bytes, got {len(whole[:keep])}" in text
    file.write_bytes(whole + b"x")
    assert "longer than its header says" in error_of(path, config)


def with_header(path, edit):
    """Rewrites the header of a safetensors file."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"dtype": "F8_E4M3"}, "stored as F8_E4M3; expected one of F32, BF16, F16"),
        ({"shape": [17]}, "needs 68 bytes"),
        ({"data_offsets": [-64, 0]}, "-64..0"),
        ({"data_offsets": None}, "without a readable header"),
        ({"shape": "x"}, "without a readable header"),
    ],
)
def test_a_header_that_contradicts_itself(export, change, says):
    path, config, _ = export
    with_header(path / "model.safetensors", lambda header: header["model.norm.weight"].update(change))
    assert says in error_of(path, config)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", 3])
def test_the_index_cannot_name_a_file_elsewhere(export, name):
    path, config, _ = export
    (path / "model.safetensors").rename(path.parent / "secret.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "expected plain .safetensors names in the same directory" in error_of(path, config)


def test_a_missing_shard_and_a_missing_tensor_of_the_index(tmp_path):
    config = make_config()
    save_params(tmp_path, module_for(config), make_params(config), dtype="float32", max_shard_bytes=8000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].unlink()
    text = error_of(tmp_path, config)
    assert shards[1].name in text and shards[0].name not in text
    shards[1].write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    listing["weight_map"]["model.norm.weight"] = shards[-1].name  # which does not hold it
    index.write_text(json.dumps(listing))
    assert "model.norm.weight: missing" in error_of(tmp_path, config)


def test_no_weights_or_only_pickled_ones(tmp_path):
    config = make_config()
    assert "found neither" in error_of(tmp_path, config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    text = error_of(tmp_path, config)
    assert "pytorch_model.bin" in text and "convert them to safetensors" in text


def test_side_files(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    for name in [*names, "modeling_custom.py", "model.safetensors"]:
        (source / name).write_text(name)
    assert sorted(copy_side_files(source, target)) == sorted(names)
    assert {x.name: x.read_text() for x in target.iterdir()} == {name: name for name in names}
    assert sorted(copy_side_files(source, source)) == sorted(names)
    assert (source / "modeling_custom.py").exists()


LOADER = """
    import sys, jax, jax.numpy as jnp
    from rmr1_jax.model.config import read_config
    from rmr1_jax.model.hf import load_params
    from rmr1_jax.model.qwen import module_for

    def memory(key):  # VmRSS: resident now; VmHWM: the kernel's own high-water mark of it, which no sampling misses
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

    load_params(sys.argv[2], module_for(read_config(sys.argv[2])), dtype="bfloat16")  # compiler and runtime are warm
    before = memory("VmRSS")
    params = load_params(sys.argv[1], module_for(read_config(sys.argv[1])), dtype="bfloat16")
    jax.block_until_ready(params)
    assert "torch" not in sys.modules
    print(memory("VmHWM") - before, memory("VmRSS") - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory from Linux's /proc")
def test_peak_memory_of_loading(tmp_path):
    """About 300 MB of bfloat16 in a fresh process; the peak is the kernel's VmHWM less the VmRSS before the load."""
    small = make_config()
    save_params(tmp_path / "small", module_for(small), make_params(small), dtype="bfloat16")
    # Three leaves of a quarter of the checkpoint each, so that a second copy of a single leaf is already too much.
    sizes = {"vocab_size": 8_000, "num_hidden_layers": 11}
    sizes |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 64}
    config = make_config(**sizes)
    params = jax.tree.map(lambda shape: np.ones(shape, ml_dtypes.bfloat16), shapes_of(config), is_leaf=is_shape)
    save_params(tmp_path / "large", module_for(config), params, dtype="bfloat16", max_shard_bytes=10**8)
    stored = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert 2.5e8 < stored < 3.5e8
    del params
    script = textwrap.dedent(LOADER)
    command = [sys.executable, "-c", script, tmp_path / "large", tmp_path / "small"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    peak, after, loaded = map(int, run.stdout.split())
    print(f"peak {peak / stored:.3f}, after {after / stored:.3f} of the {stored / 1e6:.0f} MB stored")
    assert loaded == pytest.approx(stored, rel=0.001)
    assert peak >= 0.95 * loaded  # else the measure itself is broken
    assert peak <= MAX_RATIO * stored
