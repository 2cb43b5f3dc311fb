"""A Qwen's shape: `QwenConfig`, read from a Hugging Face `config.json` by our own code.

The library's reader fills every gap with a default and keeps every key it does not know, so a checkpoint of another
architecture would load and compute something else. Here every field is on one of two lists, the fields that shape the
computation and the fields that do not; anything else is refused, and one error names all differences before a single
array exists. Read `qwen.py` next, then `hf.py` for how the weights are read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rmr1_jax.errors import InputError
from rmr1_jax.files.untrusted import read_object

MOST = 2**31 - 1  # the largest whole number: positions and sizes are int32


class FieldReader:
    """Reads typed fields, noting what is wrong instead of raising, so that one error can name everything."""

    def __init__(self, raw: dict[str, Any], prefix: str = "", problems: list[str] | None = None):
        self.raw, self.prefix = raw, prefix
        self.problems: list[str] = [] if problems is None else problems

    def wrong(self, name: str, expected: str) -> None:
        got = f"got {short(self.raw[name])}" if name in self.raw else "missing"
        self.problems.append(f"{self.prefix}{name}: {got}, expected {expected}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST:
            return value
        self.wrong(name, "a whole number")
        return 1

    def positive_int(self, name: str, default: int | None = None, most: int = MOST) -> int:
        value = self.integer(name, default)
        if 0 < value <= most:
            return value
        self.wrong(name, f"a whole number from 1 to {most}")
        return 1

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None and default is not None:
            return float(default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 1e-18 < value < 1e18:
            return float(value)
        self.wrong(name, "a number above 0 and below 1e18")
        return 1.0

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.wrong(name, "true or false")
        return default


def short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


# fmt: off
ROPE_FIELDS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset({
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    }),
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length. All but `kind` and `factor` are yarn's.

    Units: `original_max_position_embeddings` in tokens; `beta_fast` and `beta_slow` in turns over that length.
    `attention_factor` is already resolved (1 for linear), so nothing downstream needs yarn's `mscale` rules.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def parse_rope(reader: FieldReader, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Rope theta and scaling from any spelling: `type` or `rope_type`, in `rope_scaling` or in `rope_parameters`."""
    raw, problems = reader.raw, reader.problems
    given = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    for name, value in given.items():
        if not isinstance(value, dict):
            reader.wrong(name, "an object")
            return 1e4, None
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        problems.append("rope_scaling and rope_parameters: both given and different; keep one")
    where, fields = next(iter(given.items()), ("rope_parameters", {}))
    rope = FieldReader(fields, where + ".", problems)
    theta = rope.positive_float("rope_theta", default=reader.positive_float("rope_theta", default=1e4))
    if None not in (raw.get("rope_theta"), fields.get("rope_theta")) and raw["rope_theta"] != fields["rope_theta"]:
        problems.append(f"rope_theta: {raw['rope_theta']} here, {fields['rope_theta']} in {where}; keep one")
    if theta <= 1:
        problems.append(f"rope_theta: got {theta}, expected a number above 1 (usually 10000 or 1000000)")
    kinds = [fields[name] for name in ("rope_type", "type") if fields.get(name) is not None] or ["default"]
    if str(kinds[0]) not in ROPE_FIELDS or kinds[-1] != kinds[0]:
        problems.append(f"{where}.rope_type: got {short(kinds)}, expected one of {', '.join(sorted(ROPE_FIELDS))}")
        return theta, None
    for name in sorted(fields.keys() - ROPE_FIELDS[kinds[0]] - {"rope_type", "type", "rope_theta"}):
        problems.append(f"{where}.{name}: unknown field for rope type {kinds[0]} (got {short(fields[name])})")
    return theta, _parse_scaling(rope, kinds[0], max_positions)


def _parse_scaling(rope: FieldReader, kind: str, max_positions: int) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope.positive_float("factor"))
    original = rope.positive_int("original_max_position_embeddings", default=max_positions)
    factor = rope.positive_float("factor", default=max_positions / original if "factor" in rope.raw else None)
    mscales = [rope.positive_float(name, default=0.0) for name in ("mscale", "mscale_all_dim")]
    inferred = _yarn_attention(factor, *mscales) if all(mscales) else _yarn_attention(factor, 1.0, 0.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.positive_float("beta_fast", default=32.0),
        beta_slow=rope.positive_float("beta_slow", default=1.0),
        attention_factor=rope.positive_float("attention_factor", default=inferred),
        truncate=rope.boolean("truncate", default=True),
    )


def _yarn_attention(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """Yarn's temperature on cosine and sine, 0.1 ln(factor) + 1 (equation 22), or DeepSeek's ratio of two such."""
    if factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all_dim * math.log(factor) + 1.0)


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
FIXED_FIELDS = {"hidden_act": "silu", "use_mrope": False, "is_encoder_decoder": False, "add_cross_attention": False}
ATTENTION_BIAS = {"qwen2": True, "qwen3": False}

# These describe training, bookkeeping or text generation and change no logit, so any value is taken.
IGNORED_FIELDS = frozenset({
    "attention_dropout", "attn_implementation",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "initializer_range",
    "keys_to_ignore_at_inference", "label2id", "model_name", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tokenizer_class", "torch_dtype",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
})
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
    try:
        raw = read_object(path)
    except InputError as error:
        raise InputError(f"{error}. Expected the config.json of a Hugging Face model; download it again.") from error
    return parse_config(raw, str(path), scalar=scalar)


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
    for name in sorted(raw.keys() - READ_FIELDS - IGNORED_FIELDS - fixed.keys()):
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
