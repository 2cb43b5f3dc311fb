"""The logits of a Qwen2 model directory in float64, in NumPy: an arbiter between two implementations in float32.

Written apart from the package, from the architecture's description. One layer's weights are in memory at a time.
"""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)
import numpy as np
from safetensors import safe_open


def float64_logits(directory: Path, ids: list[int]) -> np.ndarray:
    """[T, V] float64, for one text of T tokens."""
    config = json.loads((directory / "config.json").read_text())
    files = [safe_open(file, "np") for file in sorted(directory.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size, T = config["hidden_size"] // heads, len(ids)

    def weight(name: str) -> np.ndarray:
        return where[name].get_tensor(name).astype(np.float64)

    def norm(x, scale):
        return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])

    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    angles = np.arange(T)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * angles)[:, None]  # dimensions i and i + size/2 are one complex number

    def rotated(x):
        z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = weight("model.embed_tokens.weight")[ids]
    for number in range(config["num_hidden_layers"]):

        def linear(x, name, number=number):
            name = f"model.layers.{number}.{name}"
            bias = weight(name + ".bias") if name + ".bias" in where else 0
            return x @ weight(name + ".weight").T + bias

        h = norm(x, weight(f"model.layers.{number}.input_layernorm.weight"))
        q, k, v = (linear(h, f"self_attn.{n}_proj").reshape(T, -1, size) for n in "qkv")
        q, k = rotated(q), rotated(k)
        out = np.empty_like(q)
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = np.where(np.tri(T, dtype=bool), q[:, head] @ k[:, group].T / np.sqrt(size), -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = scores / scores.sum(-1, keepdims=True) @ v[:, group]
        x = x + linear(out.reshape(T, -1), "self_attn.o_proj")
        h = norm(x, weight(f"model.layers.{number}.post_attention_layernorm.weight"))
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    x = norm(x, weight("model.norm.weight"))
    name = "lm_head.weight" if "lm_head.weight" in where else "model.embed_tokens.weight"
    head, V = where[name].get_slice(name), config["vocab_size"]
    blocks = [x @ head[start : min(start + 8192, V)].astype(np.float64).T for start in range(0, V, 8192)]
    return np.concatenate(blocks, -1)
