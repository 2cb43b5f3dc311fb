"""The peers' models, loaded in float32 from a Hugging Face directory, and their versions; see `bench_peers.py`."""

import json
import os
from importlib.metadata import version
from pathlib import Path


def load_hf(model_dir: Path) -> tuple:
    """Loads the model in float32; returns it with the name of its device."""
    import torch
    from transformers import Qwen2ForCausalLM

    # By default torch uses one thread for each physical core, and JAX one for each logical core.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Qwen2ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device), device


def hf_version() -> str:
    return f"transformers {version('transformers')}, torch {version('torch')}"


def load_tunix(model_dir: Path, **options) -> tuple:
    """Loads the model in float32; returns it with its configuration. options: further ones of tunix's ModelConfig."""
    import jax.numpy as jnp
    from tunix.models.qwen2.model import ModelConfig
    from tunix.models.qwen2.params import create_model_from_safe_tensors

    hf = json.loads((model_dir / "config.json").read_text())
    config = ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        use_tied_embedding=hf["tie_word_embeddings"],
        **options,
    )
    return create_model_from_safe_tensors(str(model_dir), config, dtype=jnp.float32), config


def tunix_version() -> str:
    return f"google-tunix {version('google-tunix')}, jax {version('jax')}"
