"""Prepared sets hold the same examples as memory does, and are refused if a file is damaged or they do not fit."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_models import NO_THOUGHT, TAGS, chat_model, deepseek_distill, with_template
from prepared import assert_same, config_of, rows, write_rows
from training import metrics_but_timings, small_sft

from rmr1_jax.data.packing import lengths_of, trained_lengths_of
from rmr1_jax.data.prepare import _make_chunk, prepare, summary_line
from rmr1_jax.data.show import show
from rmr1_jax.data.store import PreparedExamples, open_examples
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.pairs.training_sets import read_published
from rmr1_jax.train.grpo import read_prompts
from rmr1_jax.train.sft import sft


@pytest.fixture(scope="module")
def original(source, world_tokenizer) -> Path:
    out = source.parent / "prepared"
    prepare(config_of(model=str(world_tokenizer), data=str(source), out=str(out)))
    return out


@pytest.fixture
def prepared(original, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(original, tmp_path / "set")


def error_of(call, *args, kind=InputError) -> str:
    with pytest.raises(kind) as caught:
        call(*args)
    return str(caught.value)


# ---- the content of a set ----


def test_a_set_holds_the_same_examples_as_memory(original, source, tokenizer):
    examples = open_examples(original, "sft", tokenizer)
    in_memory = open_examples(source, "sft", tokenizer)
    assert_same(examples, in_memory)
    np.testing.assert_array_equal(examples.lengths, lengths_of(in_memory))
    np.testing.assert_array_equal(examples.trained_lengths, trained_lengths_of(in_memory))
    assert examples[-1].id == "r149" and examples[3].source == "s1" and examples[3].better == "B"
    with pytest.raises(IndexError):
        examples[150]


def test_any_reader_of_tfds_opens_it(original, tokenizer):
    import tensorflow_datasets as tfds

    data = tfds.builder_from_directory(str(original / "rows")).as_data_source(split="train")
    assert "tensorflow" not in sys.modules
    row = data[7]
    assert row["id"] == b"r7" and tokenizer.decode(row["tokens"][row["prompt_length"] :].tolist()).endswith("</answer>")


def test_the_manifest(original, world_tokenizer, source, tokenizer):
    examples = PreparedExamples(original)
    manifest = examples.manifest
    assert manifest["counts"] == {"read": 150, "kept": 150, "rejected": 0, "too_long": 0, "left_out": 0}
    assert manifest["sources"] == {"s0": 75, "s1": 75} and manifest["better"] == {"A": 75, "B": 75}
    assert manifest["fingerprint"] == tokenizer.fingerprint and manifest["config"]["model"] == str(world_tokenizer)
    lengths = manifest["lengths"]["tokens"]
    assert sum(lengths["counts"]) == 150 and lengths["sum"] == examples.lengths.sum()
    assert lengths["edges"][-1] > lengths["max"] == examples.lengths.max()
    assert manifest["lengths"]["trained"]["sum"] == sum(x.trained.sum() for x in examples)
    files = {str(f.relative_to(original)) for f in original.rglob("*") if f.is_file()} - {"prepared.json"}
    assert set(manifest["files"]) == files
    assert "150 read, 150 kept" in summary_line(manifest)
    assert not (original / "rejects.jsonl").read_bytes()


# ---- a damaged or unsuitable set ----


def test_a_missing_or_truncated_file_is_named(prepared):
    record = next((prepared / "rows").glob("*.array_record-00000"))
    for name in (record, prepared / "lengths.npy", prepared / "rows" / "dataset_info.json"):
        whole = name.read_bytes()
        name.write_bytes(whole[:-1])
        message = error_of(PreparedExamples, prepared)
        assert f"{name} has {len(whole) - 1} bytes, was written with {len(whole)}" in message
        name.unlink()
        assert f"{name} is missing" in error_of(PreparedExamples, prepared)
        name.write_bytes(whole)
    assert len(PreparedExamples(prepared)) == 150


def test_a_row_with_a_flipped_bit_is_an_error(prepared):
    record = next((prepared / "rows").glob("*.array_record-00000"))
    whole = record.read_bytes()
    in_use = [at for at, byte in enumerate(whole) if byte]  # the rest is padding
    for at in in_use[len(in_use) // 16 :: len(in_use) // 8]:
        record.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert f"{prepared}: row " in error_of(lambda: list(PreparedExamples(prepared)), kind=RunError)


def test_an_invalid_manifest_is_refused(prepared, tmp_path):
    path = prepared / "prepared.json"
    manifest = json.loads(path.read_bytes())
    for text, message in (
        ("{", "not what `rmr1 data prepare` writes"),
        ("[1]", "not what `rmr1 data prepare` writes"),
        (json.dumps({k: v for k, v in manifest.items() if k != "files"}), "not what `rmr1 data prepare` writes"),
        (json.dumps(manifest | {"files": {"lengths.npy": 3}}), "not what `rmr1 data prepare` writes"),
        (json.dumps(manifest | {"config": None}), "not what `rmr1 data prepare` writes"),
        (json.dumps(manifest | {"format": 99}), "format 99, this version reads 1"),
        (json.dumps(manifest | {"counts": manifest["counts"] | {"kept": 3}}), "holds 150 rows, 150 lengths and says 3"),
    ):
        path.write_text(text)
        assert message in error_of(PreparedExamples, prepared)
    assert "cannot be read" in error_of(PreparedExamples, tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (
            "rows/features.json",
            "tensorflow_datasets.core.features.text_feature.Text",
            "antigravity.features.text_feature.Text",
        ),
        ("rows/features.json", '"tokens"', '"tokems"'),
        ("rows/features.json", "{", "["),
        ("rows/dataset_info.json", '"150"', '"151"'),
        ("rows/dataset_info.json", "{", "["),
        ("rows/dataset_info.json", "array_record", "array_recard"),
        ("lengths.npy", "NUMPY", "NOMPY"),
        ("lengths.npy", "'<i4'", "'|O8'"),
    ],
)
def test_a_changed_description_is_refused_and_runs_nothing(prepared, file, old, new):
    """For an untrusted directory with the right sizes: the error is ours, and only classes of TFDS are imported."""
    path = prepared / file
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    manifest = json.loads((prepared / "prepared.json").read_bytes())
    manifest["files"][file]["bytes"] = path.stat().st_size
    (prepared / "prepared.json").write_text(json.dumps(manifest))
    with pytest.raises((InputError, RunError)) as caught:
        list(PreparedExamples(prepared))
    assert str(prepared) in str(caught.value)
    assert "antigravity" not in sys.modules


def test_the_module_that_a_set_names_need_not_exist(prepared):
    """TFDS records the module that wrote a set. Sets of earlier layouts of the package open all the same."""
    path = prepared / "rows" / "dataset_info.json"
    text = path.read_text()
    assert '"moduleName": "rmr1_jax.data.store"' in text
    path.write_text(text.replace("rmr1_jax.data.store", "rmr1_jax.data.gone_"))
    assert len(list(PreparedExamples(prepared))) == 150


def test_another_tokenizer_template_or_end_of_turn_is_refused(prepared, world_tokenizer, tokenizer, tmp_path):
    changes = {
        "chat template": ("tokenizer_config.json", lambda text: text.replace("assistant", "Assistant")),
        "tokenizer": ("tokenizer.json", lambda text: text.replace('"version":', '"version" :', 1)),
        "end of turn": ("tokenizer_config.json", lambda text: text.replace("+ '<|im_end|>", "+ '<|endoftext|>")),
    }
    assert open_examples(prepared, "sft", tokenizer)
    for name, (file, change) in changes.items():
        directory = tmp_path / name
        shutil.copytree(world_tokenizer, directory)
        path = directory / file
        old = path.read_text() if path.is_file() else ""
        path.write_text(change(old))
        assert path.read_text() != old
        other = Tokenizer(directory)
        message = error_of(open_examples, prepared, "sft", other)
        was, now = tokenizer.fingerprint[name], other.fingerprint[name]
        assert was != now and f"{name} {was} there, {now} in {directory}" in message
        assert f"run `rmr1 data prepare` with model={directory}" in message


def test_another_stop_id_beside_the_end_of_turn_leaves_a_set_valid(prepared, world_tokenizer, tmp_path):
    directory = shutil.copytree(world_tokenizer, tmp_path / "model")
    (directory / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert open_examples(prepared, "sft", Tokenizer(directory))


def test_sets_made_before_thoughts_and_tags_were_continued_are_refused(world_tokenizer, source, tmp_path):
    """Old sets of the few models whose rows have other tokens now are refused, those of prompts alone stay valid."""
    thinking = deepseek_distill(world_tokenizer, tmp_path / "thinking")
    tagged = chat_model(world_tokenizer, tmp_path / "tagged", special=TAGS)
    sides = write_rows(tmp_path / "sides.jsonl", rows(4, sides=True))
    for directory, stage, data, refused in (
        (thinking, "sft", source, "thought None there, begun by the chat template in"),
        (thinking, "grpo", sides, None),
        (tagged, "sft", source, "special tags None there, <think>, </think>, "),
        (tagged, "grpo", sides, "special tags None there, <think>, </think>, "),
    ):
        out, tokenizer = tmp_path / f"{directory.name} {stage}", Tokenizer(directory)
        prepare(config_of(model=str(directory), data=str(data), out=str(out), stage=stage))
        assert open_examples(out, stage, tokenizer)
        manifest = json.loads((out / "prepared.json").read_text())
        for name in ("thought", "special tags"):
            manifest["fingerprint"].pop(name, None)
        (out / "prepared.json").write_text(json.dumps(manifest))
        if refused is None:
            assert open_examples(out, stage, tokenizer)
        else:
            assert refused in error_of(open_examples, out, stage, tokenizer)


def test_other_arguments_of_the_chat_template_are_refused(prepared, source, world_tokenizer, tokenizer, tmp_path):
    off = {"enable_thinking": False}
    model = with_template(world_tokenizer, tmp_path / "model")
    made = {}
    for name, arguments in (("plain", {}), ("off", off)):
        out = str(tmp_path / name)
        config = config_of(model=str(model), data=str(source), out=out, limit=3, chat_template_kwargs=arguments)
        manifest = prepare(config)
        made[name] = open_examples(out, "sft", Tokenizer(model, arguments))
        assert ("chat_template_kwargs" in manifest["fingerprint"]) == bool(arguments)
        prompt = made[name][0].tokens[~made[name][0].trained]
        assert tokenizer.decode(prompt).endswith(NO_THOUGHT) == bool(arguments)
        # A worker process makes the same rows.
        chosen = [row for row in read_published(source) if row.id in {example.id for example in made[name]}]
        assert_same(made[name], _make_chunk(config, str(model), chosen))
        # It is shown with its own arguments.
        assert ("<think>" in next(show(out))) == bool(arguments)
    message = error_of(open_examples, tmp_path / "off", "sft", Tokenizer(model))
    assert 'was prepared with chat_template_kwargs={"enable_thinking": false}, this is {}; give it the same' in message
    message = error_of(open_examples, tmp_path / "plain", "sft", Tokenizer(model, off))
    assert 'chat_template_kwargs={}, this is {"enable_thinking": false}' in message
    assert "`rmr1 data prepare` with chat_template_kwargs=" in message


def test_a_set_for_the_other_stage_is_refused(prepared, tokenizer):
    assert "was prepared for sft, not grpo" in error_of(open_examples, prepared, "grpo", tokenizer)


# ---- training on a set ----


@pytest.mark.slow
def test_training_on_a_set_equals_training_on_its_rows(tmp_path, tiny_policy):
    """Two steps of SFT give the same numbers whether rows are read from a set or tokenized in memory."""
    data = write_rows(tmp_path / "rows.jsonl", rows(24, words=3))
    prepare(config_of(model=str(tiny_policy.tokenizer.directory), data=str(data), out=str(tmp_path / "set")))
    metrics = []
    for name, path in (("memory", data), ("set", tmp_path / "set")):
        config = small_sft(data=str(path), out=str(tmp_path / name), max_steps=2, save_every=100)
        sft(config, policy=tiny_policy)
        metrics.append(metrics_but_timings(tmp_path / name))
    assert len(metrics[0]) == 2 and metrics[0] == metrics[1]


def test_the_prompts_of_a_set_equal_those_of_its_rows(tmp_path, tiny_policy):
    data = write_rows(tmp_path / "rows.jsonl", rows(12, sides=True))
    model = str(tiny_policy.tokenizer.directory)
    prepare(config_of(model=model, data=str(data), out=str(tmp_path / "set"), stage="grpo"))
    ours, theirs = (read_prompts(path, tiny_policy) for path in (tmp_path / "set", data))
    assert len(ours) == len(theirs) == 12
    np.testing.assert_array_equal(lengths_of(ours), lengths_of(theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.id, a.better) == (b.id, b.better)
        np.testing.assert_array_equal(a.tokens, b.tokens)
