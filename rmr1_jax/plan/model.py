"""The shape of a model from its name, so that a run can be planned before the weights are downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig, parse_config, read_config

# From the config.json files of Qwen2.5; the models distilled from DeepSeek-R1 have the same shapes.
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
KEYS += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
SIZES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
}


def model_shape(name: str) -> QwenConfig:
    """Return a model's shape: from config.json if `name` is a directory, else from the family and size in the name.
    Raises InputError if the family or size is not known, or if the config.json is of a model that is not implemented.
    """
    path = Path(name)
    if path.exists():
        return read_config(path.parent if path.is_file() else path)
    lower = name.lower()
    size = re.search(r"(?<![\d.])(0\.5|1\.5|7|14|32)b(?![a-z0-9])", lower)
    distilled = "distill" in lower and "qwen" in lower
    if not size or not (distilled or "qwen2.5" in lower):
        raise InputError(
            f"model={name!r}: its shape is not known; give a directory with a config.json, or the name of a Qwen2.5 or "
            f"DeepSeek-R1-Distill-Qwen model, such as Qwen/Qwen2.5-7B-Instruct (sizes: {', '.join(SIZES)})"
        )
    fields = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6}
    fields |= dict(zip(KEYS, SIZES[size[0]], strict=True))
    if distilled:
        fields |= {"tie_word_embeddings": False, "max_position_embeddings": 131072}  # they have a separate head
        if size[0] in ("1.5b", "7b"):
            fields["rope_theta"] = 1e4  # these started from Qwen2.5-Math
    return parse_config(fields, name)
