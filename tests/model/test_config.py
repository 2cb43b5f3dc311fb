"""config.json: what is read, what is refused, and that Transformers reads ours the same way."""

import json

import numpy as np
import pytest
from transformers import AutoConfig, GenerationConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from rmr1_jax.errors import InputError
from rmr1_jax.model.config import config_to_hf, parse_config, read_config
from rmr1_jax.model.rope import rope_inverse_frequencies

BASE = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# As published, with the fields that say nothing about the computation.
PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPES = {
    "default": None,
    "linear": {"type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn long": YARN | {"original_max_position_embeddings": 32768, "attention_factor": 0.9},
    "yarn deepseek": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False, "beta_fast": 16, "beta_slow": 2},
}


def parse(**changes):
    return parse_config({k: v for k, v in (BASE | changes).items() if v is not ...}, "here/config.json")


def problems(**changes) -> str:
    with pytest.raises(InputError) as caught:
        parse(**changes)
    return str(caught.value)


def test_a_published_config():
    config = parse_config(PUBLISHED, "config.json")
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (28, 28, 4, 128)
    assert config.rope_theta == 1e4 and isinstance(config.rope_theta, float)
    assert config.qkv_bias and not config.qk_norm and config.sliding_window is None and config.rope_scaling is None


def test_qwen3_has_its_own_head_size_and_norms():
    config = parse(model_type="qwen3")
    assert config.head_dim == 128 and config.qk_norm and not config.qkv_bias
    assert parse(model_type="qwen3", head_dim=32).head_dim == 32
    assert parse(model_type="qwen2").head_dim == 16


def test_every_difference_is_in_one_error():
    text = problems(
        model_type="llama", hidden_act="gelu", vocab_size=..., num_hidden_layers="3", num_key_value_heads=3, moe=8
    )
    lines = text.splitlines()
    assert lines[0].startswith("here/config.json:") and len(lines) == 7
    for part in (
        'model_type: got "llama", expected one of "qwen2", "qwen3"',
        'hidden_act: got "gelu", expected "silu"',
        "vocab_size: missing, expected a whole number",
        'num_hidden_layers: got "3", expected a whole number',
        "num_key_value_heads: got 3, expected a divisor of num_attention_heads (4)",
        "moe: unknown field (got 8)",
    ):
        assert part in text


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"is_causal": False}, "is_causal"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"fuse_attention_qkv": True}, "fuse_attention_qkv"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"use_mrope": True}, "use_mrope"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": ["qwen2"]}, "model_type"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"head_dim": 15}, "head_dim"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "rope_scaling.mrope_section"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
    ],
)
def test_what_would_compute_something_else_is_refused(changes, field):
    lines = problems(**changes).splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"  {field}: ")


WRITERS = {  # fields of other writers that change no logit
    "notes": {
        "_attn_implementation_autoset": True,
        "_model_name_or_path": "Qwen2.5 AWQ",
        "_name_or_path": "/models/qwen",
        "_commit_hash": None,
    },
    "unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.3.18", "model_name": "unsloth/qwen", "pad_token_id": 7},
    "paddleformers": {
        "paddleformers_version": "1.0.0",
        "num_nextn_predict_layers": 0,
        "mtp_loss_scaling_factor": 1.0,
        "fuse_attention_qkv": False,
        "tensor_parallel_output": True,
        "sequence_parallel": False,
    },
    "transformers 4": {
        "torchscript": False,
        "pruned_heads": {},
        "is_decoder": False,
        "cross_attention_hidden_size": None,
        "tie_encoder_decoder": False,
        "task_specific_params": None,
        "tf_legacy_loss": False,
        "max_length": 20,
        "num_beams": 1,
        "top_k": 50,
        "partial_rotary_factor": 1.0,
    },
    "absent": {"quantization_config": None, "quantization": {}, "clip_qkv": None},
}


@pytest.mark.parametrize("fields", WRITERS.values(), ids=WRITERS)
def test_notes_of_other_writers_are_ignored(fields):
    assert parse(**fields) == parse()


def test_every_setting_of_text_generation_that_transformers_ignores_is_ignored():
    names = GenerationConfig._get_default_generation_params()
    assert len(names) > 30 and parse(**dict.fromkeys(names, 1)) == parse()


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization": {"group_size": 64, "bits": 4}},  # MLX writes both
        {"compression_config": {"format": "int-quantized"}},
    ],
)
def test_a_quantized_checkpoint_is_named_as_one(fields):
    ((name, value),) = fields.items()
    text = problems(**fields)
    assert f"\n  {name}: got {json.dumps(value)}, expected unquantized weights: this checkpoint is quantized" in text
    assert "without -AWQ, -GPTQ, -Int4" in text and "remove it" not in text and len(text.splitlines()) == 2


def test_the_spellings_of_rope_mean_the_same():
    old = parse(rope_scaling={"type": "linear", "factor": 2})
    assert old.rope_scaling.kind == "linear" and old.rope_scaling.factor == 2.0
    assert parse(rope_scaling={"rope_type": "linear", "factor": 2}) == old
    assert parse(rope_scaling={"rope_type": "linear", "type": "linear", "factor": 2}) == old
    new = {"rope_type": "linear", "factor": 2, "rope_theta": 1e6}
    assert parse(rope_theta=..., rope_parameters=new) == old
    assert parse(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope_scaling is None
    assert parse(rope_scaling={}, rope_theta=...).rope_theta == 1e4


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths():
    yarn = parse(rope_scaling={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128})
    assert yarn.rope_scaling.factor == 4.0
    assert parse(rope_scaling={"rope_type": "yarn", "factor": 2.0}).rope_scaling.original_max_position_embeddings == 512


def test_sliding_window_only_where_it_is_used():
    assert parse(sliding_window=64, use_sliding_window=False).sliding_window is None
    config = parse(sliding_window=64, use_sliding_window=True, max_window_layers=1)
    assert (config.sliding_window, config.max_window_layers) == (64, 1)
    layers = AutoConfig.for_model(**config_to_hf(config, "float32")).layer_types
    assert layers == ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_are_those_of_transformers(rope, theta, head_dim):
    theirs = Qwen2Config(**BASE | {"rope_theta": theta, "rope_scaling": rope and dict(rope), "head_dim": head_dim})
    ours = parse(rope_theta=theta, rope_scaling=rope, head_dim=head_dim)
    table = Qwen2RotaryEmbedding(theirs)
    frequencies, scale = rope_inverse_frequencies(ours)
    assert frequencies.dtype == np.float32 and frequencies.shape == (head_dim // 2,)
    np.testing.assert_allclose(frequencies, table.inv_freq.numpy(), rtol=2.4e-7, atol=0)  # two units in the last place
    assert scale == pytest.approx(table.attention_scaling, abs=1e-12)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("model_type, theirs", [("qwen2", Qwen2Config), ("qwen3", Qwen3Config)])
def test_round_trips(tmp_path, model_type, theirs, head_dim, rope):
    """Ours -> dict -> ours; ours -> dict -> Transformers -> its file -> ours."""
    config = parse(model_type=model_type, head_dim=head_dim, rope_scaling=rope)
    written = config_to_hf(config, "bfloat16")
    assert parse_config(json.loads(json.dumps(written)), "written") == config
    loaded = theirs(**written)
    assert str(loaded.dtype) == "torch.bfloat16"
    loaded.save_pretrained(tmp_path)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("content", [None, b"[]", b"{", b"\xff\xfe", b"<!DOCTYPE html>"])
def test_a_file_that_is_no_config(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(tmp_path)
