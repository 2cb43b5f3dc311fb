"""Scalar reward models of Transformers with random weights, and their directories."""

import torch
from policies import tiny_policy
from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen3Config

from rmr1_jax.model.tokenizer import copy_side_files

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "num_labels": 1,
    "pad_token_id": 639,
}


def their_model(kind="qwen2", **changes):
    """A random Transformers reward model whose every weight matters."""
    torch.manual_seed(0)
    shape = SHAPE | ({"head_dim": 8} if kind == "qwen3" else {}) | changes
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind](**shape)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
            weight.copy_(torch.randn_like(weight) * scale + ("norm" in name))
    return model.eval()


def written(path, model):
    model.save_pretrained(path)
    copy_side_files(tiny_policy().tokenizer.directory, path)
    return path
