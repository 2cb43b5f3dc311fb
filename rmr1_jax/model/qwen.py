"""Qwen2.5 and Qwen3 as Flax NNX modules: `Qwen`, `Block`, `Attention`, `Mlp`, and `ScalarQwen`, whose head is a score.

A parameter is declared once, by `weight`: a string of dimension letters gives its shape, its place in the einsums and
its sharding. Making a module allocates nothing: its parameters hold shapes until `init_params` or `hf.load_params`
gives arrays. The blocks are one `Block` whose parameters have a leading axis L; `jax.lax.scan` runs over them, so
compile time does not grow with depth.

Training steps and the sampler are compiled functions of `(graphdef, params)`, from `split`: the structure without
arrays, which is hashable and a static argument, and a tree of arrays. `nnx.merge(graphdef, params)` inside the traced
function makes the module again. To change a part, subclass it and name it in the class that holds it
(`Block.Attention`, `Block.Mlp`, `Qwen.Block`); README.md has an example.

Letters: B rows, T positions, M the B x T positions of all rows, L layers, D width, N and K query and key-value heads,
H head size, F MLP width, V vocabulary, O the one score of a scalar reward model. Next: `attention.py`, then `hf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmr1_jax.distributed.mesh import constrain, constrain_weight, single_device_mesh, weight_sharding
from rmr1_jax.errors import InputError
from rmr1_jax.model.attention import Resolved, attend, keep_attention
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.rope import Rope, rope_table, rotate

Params = dict[str, Any]  # a tree of arrays: what `split` gives beside the structure
Attend = Callable[..., jax.Array]  # (q, k, v, transform_scores) -> the attended values, in q's shape

LAYER_INPUT = "layer_input"  # the name under which a remat policy finds a layer's input

# What the backward pass does not keep, it computes again. none: everything is kept. dots: the results of the large
# products and of attention are kept. full: a layer's input alone. offload: the same, in the host's memory.
Remat = Literal["none", "dots", "full", "offload"]


def weight(config: QwenConfig, dims: str, *, summed: str = "", fill: float | None = None) -> nnx.Param:
    """Declares a parameter: a shape, and what `linear`, `init_params` and the sharding tables need to know of it.

    Args:
        dims: a letter for each dimension. summed: the letters that a product with an input sums over; random values
            have the variance 1 / (their size). fill: a constant to start from, in place of random values.
    """
    shape = tuple(_size(config, letter) for letter in dims)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), dims=dims, summed=summed, fill=fill)


def linear(x: Float[Array, "..."], w: nnx.Param, *, dtype: Any = None) -> Float[Array, "..."]:
    """The product of x [..., summed letters] with a parameter, [..., the parameter's other letters].

    The product runs in x's dtype; `dtype` is that of the accumulated result, by default x's.
    """
    rest = "".join(letter for letter in w.dims if letter not in w.summed)
    kept = x.ndim - len(w.summed)
    rows = x.reshape(-1, *x.shape[kept:])
    equation = f"M{w.summed},{w.dims}->M{rest}"
    out = jnp.einsum(equation, rows, w.get_value().astype(x.dtype), preferred_element_type=dtype)
    return out.reshape(*x.shape[:kept], *out.shape[1:])


def rms_norm(x: Float[Array, "... D"], w: nnx.Param, eps: float) -> Float[Array, "... D"]:
    """Normalises the last axis; the mean square is taken in float32, the product in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * w.get_value().astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; the caller's `attend` says which keys a query sees."""

    # A subclass may change every score of a query and a key before the mask and the softmax: an elementwise function of
    # float32 scores, as a staticmethod, with no parameters of its own. It holds for training, prefill and decode.
    transform_scores: Callable[[jax.Array], jax.Array] | None = None

    def __init__(self, config: QwenConfig):
        self.config = config
        self.q = weight(config, "DNH", summed="D")
        self.k = weight(config, "DKH", summed="D")
        self.v = weight(config, "DKH", summed="D")
        self.o = weight(config, "NHD", summed="NH")
        if config.qkv_bias:
            self.q_bias = weight(config, "NH", fill=0.0)
            self.k_bias = weight(config, "KH", fill=0.0)
            self.v_bias = weight(config, "KH", fill=0.0)
        if config.qk_norm:
            self.q_norm = weight(config, "H", fill=1.0)
            self.k_norm = weight(config, "H", fill=1.0)

    def __call__(self, x: Float[Array, "M D"], rope: Rope, attend: Attend) -> Float[Array, "M D"]:
        q, k, v = (linear(x, w) for w in (self.q, self.k, self.v))
        if self.config.qkv_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (y + bias.get_value().astype(y.dtype) for y, bias in zip((q, k, v), biases, strict=True))
        if self.config.qk_norm:
            q, k = (rms_norm(y, w, self.config.rms_norm_eps) for y, w in ((q, self.q_norm), (k, self.k_norm)))
        q, k, v = (y.reshape(*rope[0].shape[:2], *y.shape[1:]) for y in (q, k, v))  # [B, T, N or K, H]
        out = attend(rotate(q, rope), rotate(k, rope), v, type(self).transform_scores)
        return linear(out.reshape(-1, *out.shape[2:]), self.o)


class Mlp(nnx.Module):
    """The gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: QwenConfig):
        self.gate = weight(config, "DF", summed="D")
        self.up = weight(config, "DF", summed="D")
        self.down = weight(config, "FD", summed="F")

    def __call__(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return linear(jax.nn.silu(linear(x, self.gate)) * linear(x, self.up), self.down)


class Block(nnx.Module):
    """One layer: attention and the MLP, each on the normalised input and added to it."""

    Attention = Attention
    Mlp = Mlp

    def __init__(self, config: QwenConfig):
        self.config = config
        self.attn_norm = weight(config, "D", fill=1.0)
        self.attn = self.Attention(config)
        self.mlp_norm = weight(config, "D", fill=1.0)
        self.mlp = self.Mlp(config)

    def __call__(self, x: Float[Array, "B T D"], rope: Rope, attend: Attend) -> Float[Array, "B T D"]:
        # Rows and positions as one letter M: a weight's gradient is then one plain product over M, where over B and T
        # the compiler for CPUs transposes whole activations first.
        B, T, D = x.shape
        x = x.reshape(B * T, D)
        with jax.named_scope("attention"):
            x = x + self.attn(rms_norm(x, self.attn_norm, self.config.rms_norm_eps), rope, attend)
        with jax.named_scope("mlp"):
            x = x + self.mlp(rms_norm(x, self.mlp_norm, self.config.rms_norm_eps))
        return x.reshape(B, T, D)


class Transformer(nnx.Module):
    """Embedding, blocks and the last norm; a subclass adds the head."""

    Block = Block

    def __init__(self, config: QwenConfig):
        self.config = config
        self.embed = weight(config, "VD", summed="D")
        self.layers = self._stacked()
        self.final_norm = weight(config, "D", fill=1.0)

    def _stacked(self) -> Block:
        """A block whose parameters are those of all layers, with the leading axis L."""
        graphdef, state = nnx.split(self.Block(self.config))

        def stack(w: nnx.Param) -> nnx.Param:
            shape = (self.config.num_layers, *w.get_value().shape)
            return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), **w.get_metadata() | {"dims": "L" + w.dims})

        return nnx.merge(graphdef, jax.tree.map(stack, state, is_leaf=lambda x: isinstance(x, nnx.Param)))

    def block_graphdef(self) -> nnx.GraphDef:
        """The structure of one block, for its parameters without the axis L."""
        return nnx.split(self.Block(self.config))[0]

    def embedded(self, tokens: Int[ArrayLike, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        return self.embed.get_value()[tokens].astype(dtype)

    def hidden_states(
        self,
        tokens: Int[ArrayLike, "B T"],
        positions: Int[ArrayLike, "B T"] | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        *,
        dtype: Any = jnp.float32,
        parents: Int[ArrayLike, "B T"] | None = None,
        remat: Remat = "none",
        attention: Resolved = "xla",
        blocks: Sequence[Block] | None = None,
    ) -> Float[Array, "B T D"]:
        """The states that the head reads, in `dtype`, which is that of the matrix products. Tokens see their own
        segment alone, or one more, `parents` (see `attend`); segment 0 is padding. By default positions are 0..T-1 and
        all rows one segment. blocks: the layers one by one, in place of the module's own stack (of the sampler's
        weights, in their layout).

        Raises:
            InputError: the rows are longer than the model's sliding window.
        """
        window = self.config.sliding_window
        if window is not None and tokens.shape[1] > window:
            raise InputError(
                f"rows of {tokens.shape[1]} tokens are longer than the model's sliding window ({window}), "
                "which is not implemented; use rows that fit in the window"
            )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        rope = rope_table(self.config, positions)
        block = self.Block(self.config)
        graphdef, dims = split(block)[0], param_dims(block)

        def attend_rows(q, k, v, transform_scores):
            return attend(q, k, v, positions, segment_ids, attention, transform_scores, parents)

        def layer(x, w: Params):
            x = checkpoint_name(x, LAYER_INPUT)
            # Pinned where they lie, weights are gathered layer by layer in `dtype`, and their gradients, to which the
            # same applies, are scattered as they are summed and not summed whole on every device.
            w = jax.tree.map(lambda w, dims: constrain_weight(w.astype(dtype), dims), w, dims)
            return constrain(nnx.merge(graphdef, w)(x, rope, attend_rows), "BTD"), None

        x = constrain(self.embedded(tokens, dtype), "BTD")
        with jax.named_scope("layers"):
            if blocks is None:
                x, _ = jax.lax.scan(_remat(layer, remat), x, split(self.layers)[1])
            for own in blocks or ():
                x = constrain(own(x, rope, attend_rows), "BTD")
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps)


class Qwen(Transformer):
    """The language model. `Qwen(config)` declares it; `policy.load` gives one with its weights."""

    def __init__(self, config: QwenConfig):
        super().__init__(config)
        if not config.tie_word_embeddings:
            self.head = weight(config, "DV", summed="D")

    def __call__(
        self,
        tokens: Int[ArrayLike, "B T"],
        positions: Int[ArrayLike, "B T"] | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        **options: Any,
    ) -> Float[Array, "B T V"]:
        """Logits for whole rows, float32, from the arguments of `hidden_states`. Training reads the head in chunks."""
        return self.logits(self.hidden_states(tokens, positions, segment_ids, **options))

    @property
    def output_weight(self) -> nnx.Param:
        """The head [D, V], or the embedding [V, D] where the two are tied; its `dims` say which."""
        return self.embed if self.config.tie_word_embeddings else self.head

    @jax.named_scope("head")
    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of hidden states, accumulated and returned in float32."""
        return linear(x, self.output_weight, dtype=jnp.float32)


class ScalarQwen(Transformer):
    """A scalar reward model (`Qwen2ForSequenceClassification`, one label): the same body with one score as its head."""

    def __init__(self, config: QwenConfig):
        super().__init__(config)
        self.score = weight(config, "OD", summed="D")

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, " B"]:
        """The scores of hidden states, float32."""
        return linear(x.astype(jnp.float32), self.score)[:, 0]


def module_for(config: QwenConfig) -> Qwen | ScalarQwen:
    """The module that a checkpoint with this config holds, without arrays."""
    return ScalarQwen(config) if config.scalar else Qwen(config)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module's structure, and its arrays as a plain tree; `nnx.merge` puts them together again."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def with_params(module: nnx.Module, params: Params) -> Any:
    """A module of the same structure that holds other arrays."""
    return nnx.merge(nnx.split(module)[0], params)


def param_dims(module: nnx.Module) -> Params:
    """The tree of the parameters' dimension letters."""
    is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(lambda w: w.dims, nnx.state(module, nnx.Param), is_leaf=is_param))


def abstract_params(module: nnx.Module, mesh: Mesh, dtype: Any, *, sharding: Callable = weight_sharding) -> Params:
    """The tree of the parameters' shapes in `dtype`, with the shardings that training keeps them in, or that another
    function of (mesh, letters, shape) gives."""

    def abstract(w: jax.Array | jax.ShapeDtypeStruct, dims: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(w.shape, dtype, sharding=sharding(mesh, dims, w.shape))

    return jax.tree.map(abstract, split(module)[1], param_dims(module))


def init_params(module: nnx.Module, key: jax.Array, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Params:
    """Random parameters, made in place on the mesh: normal with variance 1 / fan-in, norms one, biases zero."""
    declared = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    # Numbered by a block's own names, as they were before blocks had parts: a seed keeps its weights.
    number = {path: i for i, path in enumerate(sorted(declared, key=lambda path: (path[0], path[-1])))}
    like = abstract_params(module, mesh or single_device_mesh(), dtype)

    def one(key: jax.Array, path: tuple[Any, ...], w: jax.ShapeDtypeStruct) -> jax.Array:
        param = declared[tuple(part.key for part in path)]
        if param.fill is not None:
            return jnp.full(w.shape, param.fill, dtype)
        fan_in = math.prod(_size(module.config, letter) for letter in param.summed)
        key = jax.random.fold_in(key, number[tuple(part.key for part in path)])
        return (jax.random.normal(key, w.shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    def build(key: jax.Array) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, w: one(key, path, w), like)

    return jax.jit(build, out_shardings=jax.tree.map(lambda w: w.sharding, like))(key)


def _remat(layer: Callable, remat: Remat) -> Callable:
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    policy = {
        "dots": policies.save_from_both_policies(policies.checkpoint_dots_with_no_batch_dims, keep_attention),
        "full": None,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _size(config: QwenConfig, letter: str) -> int:
    return {
        "L": config.num_layers,
        "D": config.hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "O": 1,
    }[letter]
