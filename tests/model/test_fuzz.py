"""1,000 damaged model directories: a right load, or an error that says where; no crash, no hang, bounded memory."""

import json
import os
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
from policies import shapes_of

from rmr1_jax.errors import InputError
from rmr1_jax.files.untrusted import own_file, parse_json, read_object
from rmr1_jax.model.config import MOST_LAYERS, config_to_hf, parse_config, read_config
from rmr1_jax.model.hf import load_params, save_params
from rmr1_jax.model.qwen import module_for
from rmr1_jax.model.rope import rope_inverse_frequencies
from rmr1_jax.model.tensor_files import MAX_HEADER_BYTES, Reader, find_tensors, read_header
from rmr1_jax.model.tokenizer import Tokenizer, copy_side_files
from rmr1_jax.quickstart.tokenizer import CHAT_TEMPLATE

SUPPORT = Path(__file__).resolve().parents[1] / "support"

CASES = 1000
GROWTH = 256 * 2**20  # bytes of resident memory, over all cases; loading the sound directory takes a few


def error_of(call, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its address space from Linux's /proc")
def test_damaged_directories_load_right_or_are_refused(tmp_path):
    worker = SUPPORT / "model_fuzz_worker.py"
    command = [sys.executable, str(worker), str(tmp_path), str(CASES), "0"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"TRANSFORMERS_VERBOSITY": "critical"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    last = tmp_path / "last"
    assert done.returncode == 0, f"died at case {last.read_text() if last.exists() else '-'}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["bad"], "\n".join(found["bad"])
    counts = found["counts"]
    assert counts["loaded"] + counts["refused"] == CASES and counts["loaded"] >= 100 and counts["refused"] >= 500
    kinds = ("config", "index", "header", "weights", "tokenizer", "side", "bytes", "link", "pipe", "sparse", "loop")
    assert all(counts.get(f"refused {kind}") for kind in kinds), counts
    assert found["slowest"] < 20 and found["grown"] < GROWTH
    print(f"{counts['loaded']} loaded right, {counts['refused']} refused; slowest {found['slowest']:.1f} s, ", end="")
    print(f"memory grew by {found['grown'] / 2**20:.0f} MiB")


# ---- weights ----

RAW = {"model_type": "qwen2", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
RAW |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}


@pytest.fixture
def export(tmp_path):
    """A directory with a tiny Qwen2."""
    import jax
    import numpy as np

    config = parse_config(RAW, "test")
    shapes = shapes_of(config)
    params = jax.tree.map(lambda shape: np.ones(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    save_params(tmp_path / "model", module_for(config), params, dtype="float32")
    return tmp_path / "model"


def with_header(file: Path, text: bytes, data: bytes = b"", length: int | None = None) -> None:
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def peak_of(call) -> tuple[str, int]:
    tracemalloc.start()
    try:
        return error_of(call), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_that_claims_a_terabyte_allocates_nothing(tmp_path):
    file = tmp_path / "model.safetensors"
    for length in (2**40, MAX_HEADER_BYTES + 1, 2**64 - 1):
        with file.open("wb") as out:
            out.write(length.to_bytes(8, "little"))
            out.truncate(2**41)  # and the file has it: a sparse one
        said, peak = peak_of(lambda: read_header(file))
        assert "without a readable header" in said and peak < 2**20
    claimed = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with_header(file, claimed, b"\0" * 100)
    said, peak = peak_of(lambda: read_header(file))
    assert f"cut short: expected {8 + len(claimed) + 2**40} bytes" in said and peak < 2**20


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**4000], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [10**30, 10**30 + 4]},
        [1, 2],
        None,
    ],
)
def test_a_header_of_another_form_is_refused(tmp_path, entry):
    file = tmp_path / "model.safetensors"
    with_header(file, json.dumps({"x": entry}).encode(), b"\0" * 4)
    assert str(file) in error_of(read_header, file)


def test_tensors_lie_one_after_the_other_and_each_name_stands_once(tmp_path):
    file, place = tmp_path / "model.safetensors", {"dtype": "F32", "shape": [1]}
    header = {"x": {**place, "data_offsets": [0, 4]}, "y": {**place, "data_offsets": [4, 8]}}
    with_header(file, json.dumps(header).encode(), b"\0" * 8)
    assert set(read_header(file)) == {"x", "y"}
    header["y"]["data_offsets"] = [0, 4]
    with_header(file, json.dumps(header).encode(), b"\0" * 4)
    assert "tensor y begins at 0, but the one before it ends at 4" in error_of(read_header, file)
    header["y"]["data_offsets"] = [8, 12]
    with_header(file, json.dumps(header).encode(), b"\0" * 12)
    assert "tensor y begins at 8, but the one before it ends at 4" in error_of(read_header, file)
    one = json.dumps({"x": header["x"]}).encode()
    with_header(file, one[:-1] + b", " + one[1:], b"\0" * 4)
    assert str(file) in error_of(read_header, file)


def test_weights_that_change_while_they_are_read(export):
    stored = find_tensors(export)["model.norm.weight"]
    os.truncate(export / "model.safetensors", 100)
    with Reader() as reader:
        assert "changed while it was read: 100 bytes are left" in error_of(reader.read, stored, 0, 8, ())


# ---- config.json ----


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000, expected a whole number from 1 to 1000"),
        ({"num_hidden_layers": 10**9, "use_sliding_window": True, "max_window_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings"),
        ({"max_window_layers": -(10**30), "use_sliding_window": True}, "max_window_layers"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rms_norm_eps": 1e-320}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e308}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor"),
        ({"layer_types": "full_attention"}, "layer_types"),
    ],
)
def test_numbers_that_would_take_memory_or_overflow_are_refused(changes, field):
    tracemalloc.start()
    assert field in error_of(parse_config, RAW | changes, "config.json")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_the_largest_numbers_that_are_taken_can_be_computed_with():
    extremes = {"rope_theta": 9e17, "max_position_embeddings": 2**31 - 1, "num_hidden_layers": MOST_LAYERS}
    yarn = {"rope_type": "yarn", "factor": 9e17, "beta_fast": 9e17, "beta_slow": 2e-18}
    config = parse_config(RAW | extremes | {"rope_scaling": yarn}, "test")
    assert parse_config(json.loads(json.dumps(config_to_hf(config, "float32"))), "again") == config
    rope_inverse_frequencies(config)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 10**6, "nested too deep"),
        (b'{"x": ' * 10**5, "nested too deep"),
        (b'{"vocab_size": ' + b"9" * 10**5 + b"}", "digits"),
        (b'{"vocab_size": 32, "vocab_size": 64}', "the key 'vocab_size' is repeated"),
        (b'{"x": {"y": 1, "y": 1}}', "the key 'y' is repeated"),
        (b"{}" + b" " * 2**20, "expected at most 1048576"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b"NaN", "expected a JSON object, got float"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, content, says):
    (tmp_path / "config.json").write_bytes(content)
    text = error_of(read_config, tmp_path)
    assert says in text and str(tmp_path / "config.json") in text


def test_a_row_longer_than_the_sliding_window_is_refused():
    import jax

    from rmr1_jax.model.qwen import Qwen, with_params

    config = parse_config(RAW | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "test")
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        shapes_of(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    for length in (16, 17):
        tokens = jax.ShapeDtypeStruct((1, length), "int32")
        trace = partial(
            jax.eval_shape, lambda params, tokens: with_params(Qwen(config), params)(tokens), shapes, tokens
        )
        if length == 16:
            assert trace().shape == (1, 16, 32)
        else:
            assert "rows of 17 tokens are longer than the model's sliding window (16)" in error_of(trace)


# ---- files that are none, or lie elsewhere ----


def spoil(file: Path, kind: str) -> None:
    whole = file.read_bytes()
    file.unlink()
    outside = file.parent.parent / "private"
    outside.write_bytes(whole)
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        targets = {"relative": "../private", "absolute": outside, "endless": "/dev/zero", "loop": file.name}
        file.symlink_to(targets[kind])


@pytest.mark.parametrize("kind", ["relative", "absolute", "endless", "loop", "directory", "pipe"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_no_file_of_a_model_leads_out_of_it(export, name, kind):
    config = read_config(export)
    if name.endswith("index.json"):
        (export / "model.safetensors").rename(export / "model-1.safetensors")
        weight_map = dict.fromkeys(read_header(export / "model-1.safetensors"), "model-1.safetensors")
        (export / name).write_text(json.dumps({"weight_map": weight_map}))
    load_params(export, module_for(config))
    spoil(export / name, kind)
    text = error_of(read_config, export) if name == "config.json" else error_of(load_params, export, module_for(config))
    assert str(export / name) in text
    wording = {"directory": "not a regular file", "pipe": "not a regular file", "loop": "cannot be looked up"}
    assert wording.get(kind, "is a link out of its directory") in text


def test_a_shard_is_no_link_to_elsewhere(export):
    (export / "model.safetensors").rename(export.parent / "elsewhere.safetensors")
    (export / "model-1.safetensors").symlink_to("../elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-1.safetensors: is a link out of its directory" in error_of(find_tensors, export)


@pytest.mark.parametrize("kind", ["relative", "absolute", "endless", "pipe", "loop"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"])
def test_no_file_of_a_tokenizer_leads_out_of_it(world_tokenizer, tmp_path, name, kind):
    path = tmp_path / "model"
    path.mkdir()
    for file in world_tokenizer.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    for more in ("generation_config.json", "merges.txt"):
        (path / more).write_text("{}")
    spoil(path / name, kind)
    assert str(path / name) in error_of(Tokenizer, path)


def test_an_export_does_not_publish_what_a_link_points_at(tmp_path):
    source, target = tmp_path / "model", tmp_path / "export"
    source.mkdir()
    (tmp_path / "id_rsa").write_text("private")
    (source / "vocab.json").symlink_to("../id_rsa")
    assert "is a link out of its directory" in error_of(copy_side_files, source, target)
    assert not (target / "vocab.json").exists()


def test_the_hub_s_own_links_are_followed(tmp_path):
    cache = tmp_path / "models--owner--name"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text('{"x": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert read_object(snapshot / "config.json") == {"x": 1}
    (cache / "refs").write_text("{}")
    (snapshot / "other.json").symlink_to("../../refs")
    assert "is a link out of its directory" in error_of(read_object, snapshot / "other.json")
    (snapshot / "inside.json").symlink_to("config.json")
    assert own_file(snapshot / "inside.json") == snapshot / "inside.json"
    assert "no such file" in error_of(read_object, snapshot / "absent.json")


def test_parse_json_raises_one_kind_of_error():
    for raw in (b"", b"[" * 10**5, b"\xff", b"{", b"1" * 5000, b'{"a":1,"a":1}'):
        with pytest.raises(ValueError):
            parse_json(raw)
    assert parse_json(b'{"a": [NaN, 1]}')["a"][1] == 1


# ---- tokenizers and templates ----


@pytest.fixture
def tokenizer_with(world_tokenizer, tmp_path):
    def make(**changes):
        path = tmp_path / "tokenizer"
        path.mkdir(exist_ok=True)
        for file in world_tokenizer.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        config = json.loads((path / "tokenizer_config.json").read_text()) | changes
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[7]['content'] }}", "refuses turns"),
        ("{{ 1 // 0 }}", "refuses turns"),
        ("{{ messages + 1 }}", "refuses turns"),
        ("{% for m in messages %}{{ m['content'] * none }}{% endfor %}", "refuses turns"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses turns"),  # the sandbox: no way to run code
        ("{% set x = cycler.__init__.__globals__ %}{{ x.os.popen('id').read() }}", "refuses turns"),
        ("{% broken", "refuses turns"),
        ("no messages at all", "drops a user turn"),
    ],
)
def test_a_template_that_fails_in_any_way(tokenizer_with, template, says):
    tokenizer = Tokenizer(tokenizer_with(chat_template=template))
    assert says in error_of(tokenizer.render, [{"role": "user", "content": "What is 2 + 3?"}])


def test_what_a_tokenizer_s_config_may_be(tokenizer_with):
    assert "no chat template" in error_of(Tokenizer, tokenizer_with(chat_template=5))
    path = tokenizer_with(chat_template=CHAT_TEMPLATE, model_max_length=["x"])
    assert Tokenizer(path).render([{"role": "user", "content": "x"}])  # a limit that we do not use
    for ids in ([2**31], [-1], [2.0], [True], "2"):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert "no end of turn is named" in error_of(Tokenizer, path)
