"""A Qwen's shape: `QwenConfig`, read from a Hugging Face `config.json` by our own code.

The library's reader fills every gap with a default and keeps every key it does not know, so a checkpoint of another
architecture would load and compute something else. Here every field is on one of two lists, the fields that shape the
computation and the fields that do not; anything else is refused, and one error names all differences before a single
array exists. Read `qwen.py` next, then `hf.py` for how the weights are read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rmr1_jax.errors import InputError
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.model.config_fields import MOST, FieldReader, short
from rmr1_jax.model.config_rope import ROPE_FIELDS, RopeScaling, parse_rope

SIZES = {  # our names of the sizes that every config.json gives, and its own
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}

# fmt: off
READ_FIELDS = frozenset(SIZES.values()) | {
    "model_type", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window", "sliding_window", "max_window_layers",
    "layer_types", "architectures", "num_labels", "id2label",
}
MOST_LAYERS = 1000  # names and checks are made layer by layer, so a number from an untrusted file is bounded first
REWARD_MODELS = {"qwen2": "Qwen2ForSequenceClassification", "qwen3": "Qwen3ForSequenceClassification"}

# These would change the computation, so only the value that changes nothing is taken. Qwen2 has its q, k, v biases
# whatever its file says; in Qwen3 the field would add a bias on o too, which no released Qwen3 has.
FIXED_FIELDS = {
    "add_cross_attention": False, "cross_attention_hidden_size": None, "fuse_attention_ffn": False,
    "fuse_attention_qkv": False, "hidden_act": "silu", "is_causal": True, "is_encoder_decoder": False,
    "mlp_bias": False, "num_nextn_predict_layers": 0, "partial_rotary_factor": 1.0, "pruned_heads": {},
    "use_mrope": False,
}
ATTENTION_BIAS = {"qwen2": True, "qwen3": False}

# These describe training, bookkeeping, text generation or how a library computes the same, so any value is taken.
IGNORED_FIELDS = frozenset({
    # Transformers 4.40 to 5: the fields of all models.
    "attention_dropout", "attn_implementation", "base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan",
    "base_model_tp_plan", "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "dtype",
    "finetuning_task", "gradient_checkpointing", "hidden_dropout", "ignore_index", "initializer_range", "is_decoder",
    "keys_to_ignore_at_inference", "label2id", "loss_type", "name_or_path", "output_attentions",
    "output_hidden_states", "pretraining_tp", "problem_type", "return_dict", "task_specific_params", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16",
    "use_cache",
    # Tokens, and settings of text generation, which older files keep here.
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "min_p", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
    # Unsloth, PaddleFormers and other trainers.
    "fuse_linear", "fuse_rms_norm", "fuse_swiglu", "max_seq_length", "max_sequence_length", "model_max_length",
    "model_name", "mtp_loss_scaling_factor", "paddleformers_version", "paddlenlp_version", "pp_seg_method",
    "recompute", "recompute_granularity", "seq_length", "sequence_parallel", "tensor_parallel_degree",
    "tensor_parallel_output", "unsloth_fixed", "unsloth_version", "use_flash_attention", "use_fused_head_and_loss_fn",
    "use_fused_rms_norm", "use_fused_rope", "use_recompute", "virtual_pp_degree",
})
QUANTIZED = ("quantization_config", "quantization", "compression_config")  # Transformers, MLX, llm-compressor
# fmt: on


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    """The numbers that shape a Qwen2 or Qwen3. The letters are the alphabet of every shape comment in this project."""

    model_type: Literal["qwen2", "qwen3"]
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K; N is a multiple of it
    head_dim: int  # H
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool  # Qwen2 has biases on q, k and v
    qk_norm: bool  # Qwen3 normalises each head of q and k
    sliding_window: int | None = None  # tokens; rows longer than this are refused, so no layer needs the window
    max_window_layers: int | None = None  # first layer with the window; carried so that an export says so again
    scalar: bool = False  # a reward model: one score of the last token in the place of a head over the vocabulary

    @property
    def max_length(self) -> int:
        """The length in tokens of the longest row that the model can read."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


def read_config(model_dir: str | Path, *, scalar: bool = False) -> QwenConfig:
    """Reads `model_dir/config.json`: of a policy, or with `scalar` of a scalar reward model.

    Raises InputError if it is absent, not JSON, the other of the two, or not a Qwen that we compute.
    """
    path = Path(model_dir) / "config.json"
    if not path.exists() and (place := _model_of_run(Path(model_dir))):
        raise InputError(place)
    try:
        raw = read_object(path)
    except InputError as error:
        raise InputError(f"{error}. Expected the config.json of a Hugging Face model; download it again.") from error
    return parse_config(raw, str(path), scalar=scalar)


def _model_of_run(directory: Path) -> str | None:
    """Says where the model is, if this is the directory of a run or of several."""
    if found := sorted(directory.glob("model/config.json")) or sorted(directory.glob("*/model/config.json")):
        models = " or ".join(str(path.parent) for path in found)
        return f"{directory} is the directory of a run, not of a model; give the model in it: {models}"
    if (directory / "config.yaml").exists() and (directory / "checkpoints").exists():
        export = f"`rmr1 export {directory} --out DIR` writes its newest checkpoint as a model"
        return f"{directory} is the directory of a run that has not finished, not of a model; {export}"
    return None


def parse_config(raw: dict[str, Any], source: str, *, scalar: bool = False) -> QwenConfig:
    """Turns the content of a `config.json` into a QwenConfig.

    Absent optional fields take the defaults of the Transformers classes Qwen2Config and Qwen3Config. `source` names the
    file in errors. Raises one InputError that lists every field that is missing, wrong, or unknown.
    """
    reader = FieldReader(raw)
    model_type = raw.get("model_type")
    if model_type not in ("qwen2", "qwen3"):
        reader.wrong("model_type", 'one of "qwen2", "qwen3"')
    _check_unknown_and_fixed(reader)
    _check_kind(reader, scalar)

    sizes = {
        ours: reader.positive_int(theirs, most=MOST_LAYERS if ours == "num_layers" else MOST)
        for ours, theirs in SIZES.items()
    }
    layers, heads, width = sizes["num_layers"], sizes["num_heads"], sizes["hidden_size"]
    kv_heads = reader.positive_int("num_key_value_heads", default=heads)
    if heads % kv_heads:
        reader.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if model_type != "qwen3" and raw.get("head_dim") is None and width % heads:
        reader.wrong("hidden_size", f"a multiple of num_attention_heads ({heads}), or head_dim given")
    head_dim = reader.positive_int("head_dim", default=128 if model_type == "qwen3" else max(width // heads, 1))
    if head_dim % 2:
        reader.problems.append(f"head_dim: got {head_dim}, expected an even number (rotary angles turn pairs)")
    max_positions = reader.positive_int("max_position_embeddings", default=32768)
    rope_theta, rope_scaling = parse_rope(reader, max_positions)
    window, first_windowed = _parse_window(reader, layers)
    eps = reader.positive_float("rms_norm_eps", default=1e-6)
    tied = reader.boolean("tie_word_embeddings", default=False)
    if reader.problems:
        listing = "\n".join(f"  {problem}" for problem in reader.problems)
        raise InputError(f"{source}: not a Qwen2 or Qwen3 configuration that rmr1_jax computes:\n{listing}")
    return QwenConfig(
        model_type=model_type,
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        sliding_window=window,
        max_window_layers=first_windowed,
        scalar=scalar,
    )


def config_to_hf(config: QwenConfig, dtype: str) -> dict[str, Any]:
    """The content of a `config.json` for `config`; `dtype` is the stored one, "float32" or "bfloat16".

    Written with the older names (`rope_theta`, `rope_scaling`, `torch_dtype`), which Transformers 4 and 5 both read.
    `parse_config` gives `config` back.
    """
    policies = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    out: dict[str, Any] = {
        "architectures": [(REWARD_MODELS if config.scalar else policies)[config.model_type]],
        "model_type": config.model_type,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_sliding_window": config.sliding_window is not None,
    }
    if config.model_type == "qwen3" or config.head_dim * config.num_heads != config.hidden_size:
        out["head_dim"] = config.head_dim
    if config.sliding_window is not None:
        out |= {"sliding_window": config.sliding_window, "max_window_layers": config.max_window_layers}
    if config.scalar:
        out["id2label"] = {"0": "LABEL_0"}  # how Transformers says that there is one label
    rope = config.rope_scaling
    if rope is not None:
        out["rope_scaling"] = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind == "yarn":
            names = sorted(ROPE_FIELDS["yarn"] - {"factor", "mscale", "mscale_all_dim"})
            out["rope_scaling"] |= {name: getattr(rope, name) for name in names}
    return out


def _check_unknown_and_fixed(reader: FieldReader) -> None:
    raw = reader.raw
    fixed = FIXED_FIELDS | {"attention_bias": ATTENTION_BIAS.get(str(raw.get("model_type")), False)}
    for name, value in fixed.items():
        if raw.get(name) is not None and raw[name] != value:
            reader.wrong(name, json.dumps(value))
    for name in QUANTIZED:
        if raw.get(name):
            reader.wrong(
                name,
                "unquantized weights: this checkpoint is quantized, and rmr1_jax computes with whole ones. Take the "
                "repository of the same model without -AWQ, -GPTQ, -Int4, -Int8, -FP8, -bnb-4bit or -4bit in its name",
            )
    for name in sorted(raw.keys() - READ_FIELDS - IGNORED_FIELDS - fixed.keys() - set(QUANTIZED)):
        # Other writers keep notes of their own under names with a leading underscore; none changes a logit.
        if raw[name] is not None and not name.startswith("_"):
            reader.problems.append(f"{name}: unknown field (got {short(raw[name])}); remove it if it changes nothing")


def _check_kind(reader: FieldReader, scalar: bool) -> None:
    """Refuses a reward model's file where a policy's is expected, and the other way round."""
    raw = reader.raw
    named = raw.get("architectures")
    is_scalar = isinstance(named, list) and REWARD_MODELS.get(str(raw.get("model_type"))) in named
    if is_scalar and not scalar:
        reader.wrong("architectures", "a language model; a scalar reward model is read by `rmr1 eval --judge scalar`")
    if scalar and not is_scalar:
        reader.wrong("architectures", f"one of {', '.join(REWARD_MODELS.values())}")
    labels = raw.get("id2label")
    if scalar and (len(labels) if isinstance(labels, dict) else raw.get("num_labels", 1)) != 1:
        reader.wrong("id2label" if isinstance(labels, dict) else "num_labels", "one label")


def _parse_window(reader: FieldReader, layers: int) -> tuple[int | None, int | None]:
    """(window, first windowed layer); both None where no layer has a window."""
    kinds = reader.raw.get("layer_types")
    if not reader.boolean("use_sliding_window", default=False):
        if kinds is not None and kinds != ["full_attention"] * layers:
            reader.wrong("layer_types", f'"full_attention" for each of {layers} layers (use_sliding_window is false)')
        return None, None
    window = reader.positive_int("sliding_window", default=4096)
    first = reader.integer("max_window_layers", default=28)
    full = min(max(first, 0), layers)
    if kinds is not None and kinds != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
        reader.wrong("layer_types", f'"full_attention" for {full} layers, then "sliding_attention"')
    return window, first
