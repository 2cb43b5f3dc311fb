"""Qwen2.5 and Qwen3: the parameters and the forward pass.

A weight is declared once, in `param_dims`: its letters give its shape, its place in the einsums and its sharding.
Layers are stacked on a leading axis L and run by `jax.lax.scan`, so compile time does not grow with depth. `Qwen` is
the Flax NNX module that holds the weights; the arithmetic is in pure functions of `(config, params)`, which is what the
training steps and the sampler call. Next: `attention.py`, then `hf.py` for the names that weights have on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from rmr1_jax.distributed.mesh import constrain, constrain_weight, single_device_mesh, weight_sharding
from rmr1_jax.errors import InputError
from rmr1_jax.model.attention import ATTENTION, Implementation, attend
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.rope import rope_table, rotate

Params = dict[str, Any]


LAYER_INPUT = "layer_input"


# What the backward pass does not keep, it computes again. none: everything is kept. dots: what the large products and
# attention gave. full: a layer's input alone. offload: the same, in the host's memory.
Remat = Literal["none", "dots", "full", "offload"]


def param_dims(config: QwenConfig) -> Params:
    """The tree of dimension letters: L layers, D width, N and K query and key-value heads, H head size, F MLP width,
    V vocabulary, O the one score of a scalar reward model."""
    layers = {
        "attn_norm": "LD",
        "q": "LDNH",
        "k": "LDKH",
        "v": "LDKH",
        "o": "LNHD",
        "mlp_norm": "LD",
        "gate": "LDF",
        "up": "LDF",
        "down": "LFD",
    }
    if config.qkv_bias:
        layers |= {"q_bias": "LNH", "k_bias": "LKH", "v_bias": "LKH"}
    if config.qk_norm:
        layers |= {"q_norm": "LH", "k_norm": "LH"}
    dims = {"embed": "VD", "final_norm": "D", "layers": layers}
    if config.scalar:
        return dims | {"score": "OD"}
    return dims if config.tie_word_embeddings else dims | {"head": "DV"}


def param_shapes(config: QwenConfig) -> Params:
    """The tree of shapes, from the letters."""
    sizes = _sizes(config)
    return jax.tree.map(lambda dims: tuple(sizes[d] for d in dims), param_dims(config))


def param_shardings(config: QwenConfig, mesh: Mesh) -> Params:
    """The tree of `NamedSharding`s that training keeps the weights in."""
    dims, shapes = param_dims(config), param_shapes(config)
    return jax.tree.map(lambda d, s: weight_sharding(mesh, d, s), dims, shapes)


def init_params(config: QwenConfig, key: jax.Array, *, dtype=jnp.float32, mesh: Mesh | None = None) -> Params:
    """Random weights, made in place on the mesh: normal with variance 1 / fan-in, norms one, biases zero."""
    mesh = mesh or single_device_mesh()
    dims, shapes = param_dims(config), param_shapes(config)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(dims)]

    def one(key, name, dims, shape):
        if "norm" in name:
            return jnp.ones(shape, dtype)
        if "bias" in name:
            return jnp.zeros(shape, dtype)
        summed = dims[1:-1] if dims in ("LNHD", "LFD") else "D"
        fan_in = math.prod(_sizes(config)[d] for d in summed)
        return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    def build(key):
        flat_dims, tree = jax.tree.flatten(dims)
        flat_shapes = tree.flatten_up_to(shapes)
        leaves = [
            one(jax.random.fold_in(key, i), *x) for i, x in enumerate(zip(names, flat_dims, flat_shapes, strict=True))
        ]
        return tree.unflatten(leaves)

    return jax.jit(build, out_shardings=param_shardings(config, mesh))(key)


class Qwen(nnx.Module):
    """The weights as a Flax NNX module, for tools that want one (`nnx.split`, `nnx.state`, Qwix).

    `params_of(model)` gives the plain tree that every function of this project takes.
    """

    def __init__(self, config: QwenConfig, params: Params):
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.final_norm = nnx.Param(params["final_norm"])
        self.layers = nnx.Dict({name: nnx.Param(x) for name, x in params["layers"].items()})
        if not config.tie_word_embeddings:
            self.head = nnx.Param(params["head"])

    def __call__(self, tokens, positions=None, segment_ids=None, **options) -> jax.Array:
        """See `forward`."""
        return forward(self.config, params_of(self), tokens, positions, segment_ids, **options)


def params_of(model: Qwen) -> Params:
    """The plain tree of arrays that a `Qwen` holds."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def forward(config: QwenConfig, params: Params, tokens, positions=None, segment_ids=None, **options) -> jax.Array:
    """Logits for whole rows. Training never calls this: see `train/losses.py` for the head in chunks.

    Args:
        tokens: [B, T] int32. positions: [B, T] int32, default 0..T-1. segment_ids: [B, T] int32, 0 is padding,
            default all 1. options: see `hidden_states`.

    Returns:
        [B, T, V] float32.
    """
    return logits(config, params, hidden_states(config, params, tokens, positions, segment_ids, **options))


def hidden_states(
    config: QwenConfig,
    params: Params,
    tokens,
    positions=None,
    segment_ids=None,
    *,
    dtype=jnp.float32,
    remat: Remat = "none",
    attention: Implementation = "xla",
) -> jax.Array:
    """The states that the head reads, [B, T, D] in `dtype` (the dtype of the matrix products)."""
    if config.sliding_window is not None and tokens.shape[1] > config.sliding_window:
        raise InputError(
            f"rows of {tokens.shape[1]} tokens are longer than the model's sliding window ({config.sliding_window}), "
            "which is not implemented; use rows that fit in the window"
        )
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    rope = rope_table(config, positions)

    dims = param_dims(config)["layers"]

    def layer(x, w):
        x = checkpoint_name(x, LAYER_INPUT)
        # Pinned where they lie, weights are gathered layer by layer in `dtype`, and their gradients, to which the same
        # applies, are scattered as they are summed and not summed whole on every device.
        w = {name: constrain_weight(weight.astype(dtype), dims[name][1:]) for name, weight in w.items()}
        x, _ = block(config, w, x, rope, lambda q, k, v: (attend(q, k, v, positions, segment_ids, attention), None))
        return constrain(x, "BTD"), None

    x = constrain(embed(params, tokens, dtype), "BTD")
    x, _ = jax.lax.scan(_remat(layer, remat), x, params["layers"])
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def embed(params: Params, tokens: jax.Array, dtype) -> jax.Array:
    return params["embed"][tokens].astype(dtype)


def logits(config: QwenConfig, params: Params, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., V], accumulated and returned in float32."""
    weight, letters = head_weight(config, params)
    return jnp.einsum(f"...D,{letters}->...V", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def head_weight(config: QwenConfig, params: Params) -> tuple[jax.Array, str]:
    """The head and its letters: "DV", or "VD" where it is the embedding."""
    return (params["embed"], "VD") if config.tie_word_embeddings else (params["head"], "DV")


def block(
    config: QwenConfig, w: Params, x: jax.Array, rope: tuple[jax.Array, jax.Array], attention: Callable
) -> tuple[jax.Array, Any]:
    """One layer. `attention(q, k, v) -> (out, extra)` decides what is attended to; `extra` (a cache) is passed through.

    Args:
        w: one layer's weights, without the L axis. x: [B, T, D]. rope: see `rope_table`.
    """
    B, T, _ = x.shape
    # Rows and positions as one letter M: a weight's gradient is then one plain product over M, where over B and T the
    # compiler for CPUs transposes whole activations first.
    x = x.reshape(B * T, -1)
    h = rms_norm(x, w["attn_norm"], config.rms_norm_eps)
    q = jnp.einsum("MD,DNH->MNH", h, w["q"].astype(h.dtype))
    k = jnp.einsum("MD,DKH->MKH", h, w["k"].astype(h.dtype))
    v = jnp.einsum("MD,DKH->MKH", h, w["v"].astype(h.dtype))
    if config.qkv_bias:
        q, k, v = q + w["q_bias"].astype(q.dtype), k + w["k_bias"].astype(k.dtype), v + w["v_bias"].astype(v.dtype)
    if config.qk_norm:
        q, k = rms_norm(q, w["q_norm"], config.rms_norm_eps), rms_norm(k, w["k_norm"], config.rms_norm_eps)
    q, k, v = (y.reshape(B, T, *y.shape[1:]) for y in (q, k, v))
    out, extra = attention(rotate(q, rope), rotate(k, rope), v)
    x = x + jnp.einsum("MNH,NHD->MD", out.reshape(B * T, *out.shape[2:]), w["o"].astype(out.dtype))
    h = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
    gate = jnp.einsum("MD,DF->MF", h, w["gate"].astype(h.dtype))
    up = jnp.einsum("MD,DF->MF", h, w["up"].astype(h.dtype))
    x = x + jnp.einsum("MF,FD->MD", jax.nn.silu(gate) * up, w["down"].astype(h.dtype))
    return x.reshape(B, T, -1), extra


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Over the last axis; the mean square in float32, the product in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight.astype(x.dtype)


def _remat(layer: Callable, remat: Remat) -> Callable:
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    policy = {
        "dots": policies.save_from_both_policies(
            policies.checkpoint_dots_with_no_batch_dims, policies.save_only_these_names(ATTENTION)
        ),
        "full": None,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _sizes(config: QwenConfig) -> dict[str, int]:
    return {
        "L": config.num_layers,
        "D": config.hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "O": 1,
    }
