"""Tests of scalar reward models: scores against Transformers', the chat template, independence of the batch."""

import json

import jax
import numpy as np
import pytest
import torch
from policies import tiny_policy
from scalar_models import their_model, written
from transformers import AutoModelForSequenceClassification

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.judge.file import Output, judge_file
from rmr1_jax.judge.rows import judgement_row
from rmr1_jax.judge.scalar import ScalarJudge, load_scalar, padded_length
from rmr1_jax.model.config import config_to_hf, parse_config, read_config
from rmr1_jax.model.hf import save_params
from rmr1_jax.model.qwen import split, with_params
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.policy import load


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return written(tmp_path_factory.mktemp("scalar"), their_model())


@pytest.fixture(scope="module")
def model(directory):
    return load_scalar(directory, "float32")


def scores(model, rows, **options):
    found = dict(model.score(rows, **options))
    return np.array([found[number] for number in range(len(rows))])


def random_rows(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 639, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("kind", "changes", "lengths"),
    [
        ("qwen2", {}, (5, 64, 65, 96, 3)),  # of two padded lengths
        ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}, (50, 7)),
        ("qwen3", {}, (50, 7)),
    ],
    ids=["qwen2", "qwen2 tied", "qwen3"],
)
def test_scores_equal_those_of_transformers(tmp_path, kind, changes, lengths):
    """Transformers gets the same rows padded on the right in one batch."""
    theirs, rows = their_model(kind, **changes), random_rows(*lengths)
    padded = np.full((len(rows), max(lengths)), 639)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    with torch.no_grad():
        tokens = torch.from_numpy(padded)
        wanted = theirs(tokens, attention_mask=(tokens != 639).long()).logits[:, 0].numpy()
    assert wanted.std() > 0.3
    ours = load_scalar(written(tmp_path, theirs), "float32")
    np.testing.assert_allclose(scores(ours, rows), wanted, rtol=0, atol=1e-4)


def test_a_conversation_is_rendered_as_transformers_does(model):
    """The whole template is rendered with the assistant's turn closed; an imitated control token is text."""
    pair = PreferencePair.from_answers("1", "Which bird?", "The wren.", "A <|im_end|> owl.")
    hf = model.tokenizer.hf
    messages = [m._asdict() for m in pair.conversation_a]
    wanted = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert model.render(pair.conversation_a) == hf.encode(wanted, add_special_tokens=False)
    assert "The wren." in wanted and not wanted.endswith("assistant\n")
    ids = model.render(pair.conversation_b)
    end = hf.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == model.render(pair.conversation_a).count(end)


def test_a_score_depends_on_nothing_but_its_row(model):
    rows = random_rows(70, 80, 90, 75, 20, 66)
    alone = [scores(model, [row], batch_tokens=192)[0] for row in rows]
    np.testing.assert_array_equal(scores(model, rows, batch_tokens=192), alone)


def test_at_most_a_third_of_a_row_is_padding():
    padded = {n: padded_length(n, 400) for n in range(1, 401)}
    assert all(n <= length <= max(64, 1.5 * n) for n, length in padded.items())
    assert sorted(set(padded.values())) == [64, 96, 128, 192, 256, 384, 400]


def test_the_larger_score_wins(model, tmp_path, monkeypatch):
    score = type(model).score
    pairs = [PreferencePair.from_answers(str(k), f"q {k}", "x" * k, "y " * (k + 1), better="A") for k in range(1, 5)]
    pairs += [PreferencePair.from_answers("same", "q", "z", "z"), PreferencePair.from_answers("none", "q", "", "")]
    pairs += [PreferencePair.from_answers("long", "q", "word " * 500, "z")]
    judge = ScalarJudge(model)
    found = judge.compare_many(pairs)
    for pair, judgement in zip(pairs[:4], found, strict=False):
        a, b = scores(model, [model.render(pair.conversation_a), model.render(pair.conversation_b)])
        assert judgement.scores == (pytest.approx(a, abs=1e-6), pytest.approx(b, abs=1e-6))
        assert judgement.winner == ("A" if a > b else "B") and judgement.status == "ok"
    assert [j.status for j in found[4:]] == ["tie", "tie", "too_long"]
    assert "tokens, the limit is 400" in found[6].note

    scored = []
    counted = type(model)(model.model, model.tokenizer, model.mesh)
    monkeypatch.setattr(type(model), "score", lambda self, rows, **o: scored.extend(rows) or score(self, rows, **o))
    again = ScalarJudge(counted).compare_many(pairs + pairs)
    assert len(scored) == 9 and again[:7] == again[7:] == found  # four pairs and the answer of the equal ones

    out = tmp_path / "judgements.jsonl"
    judge_file(judge, pairs, Output(path=out, row_of=judgement_row))
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["1"]["scores"] == list(found[0].scores) and rows["1"]["texts"] == []
    assert "scores" not in rows["long"]


def test_what_a_scalar_judge_refuses(model):
    pair = PreferencePair.from_answers("7", "q", "a", "b")
    for options in ({"votes": 3}, {"both_orders": True}):
        with pytest.raises(InputError, match="give it neither votes nor both orders"):
            ScalarJudge(model).compare_many([pair], **options)
    broken = with_params(model.model, jax.tree.map(lambda x: x * np.nan, split(model.model)[1]))
    with pytest.raises(RunError, match=r"pair '7': its score is nan"):
        ScalarJudge(type(model)(broken, model.tokenizer, model.mesh)).compare_many([pair])


def test_policies_and_reward_models_are_distinguished(directory, tmp_path, world_tokenizer):
    with pytest.raises(InputError, match=r"architectures.*rmr1 eval --judge scalar"):
        load(directory)
    tiny_policy().save(tmp_path)
    with pytest.raises(InputError, match=r"architectures.*Qwen2ForSequenceClassification"):
        load_scalar(tmp_path)


def test_one_label_and_the_score_s_weight_are_checked(directory, tmp_path):
    raw = json.loads((directory / "config.json").read_text())
    with pytest.raises(InputError, match=r"id2label.*expected one label"):
        parse_config(raw | {"id2label": {"0": "x", "1": "y"}}, "test", scalar=True)
    with pytest.raises(InputError, match=r"num_labels.*expected one label"):
        parse_config({k: v for k, v in raw.items() if k != "id2label"} | {"num_labels": 2}, "test", scalar=True)
    two = written(tmp_path, their_model(num_labels=2))
    config = json.loads((two / "config.json").read_text()) | {"id2label": {"0": "x"}, "label2id": {"x": 0}}
    (two / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"score.weight: shape \[2, 32\], expected \[1, 32\]"):
        load_scalar(two)


def test_a_reward_model_is_written_as_it_was_read(model, tmp_path):
    save_params(tmp_path, model.model, split(model.model)[1], dtype="float32")
    assert read_config(tmp_path, scalar=True) == model.config
    assert parse_config(config_to_hf(model.config, "float32"), "test", scalar=True) == model.config
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.score.weight.detach().numpy(), model.model.score.get_value())


def test_scores_are_the_same_on_a_mesh(directory, model):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    rows = random_rows(60, 7, 33)
    on_mesh = scores(load_scalar(directory, "float32", mesh), rows)
    np.testing.assert_allclose(on_mesh, scores(model, rows), rtol=0, atol=1e-5)
