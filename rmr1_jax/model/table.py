"""The table of weights: their names and letters in Hugging Face checkpoints, and the paths of our parameters.

A stored matrix is ours with its letters in another order: reshape by the letters, transpose, done. Both reading
(`stored_model.py`) and writing (`hf.py`) go by it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax

from rmr1_jax.errors import InputError
from rmr1_jax.model.qwen import Params, Transformer, param_dims, split


class Weight(NamedTuple):
    """One row of the table: the stored name, our path, and the stored letters (a comma ends a stored dimension)."""

    name: str
    path: str
    letters: str


TABLE = (
    Weight("model.embed_tokens.weight", "embed", "V,D"),
    Weight("lm_head.weight", "head", "V,D"),
    Weight("score.weight", "score", "O,D"),
    Weight("model.norm.weight", "final_norm", "D"),
    Weight("model.layers.{l}.input_layernorm.weight", "layers.attn_norm", "D"),
    Weight("model.layers.{l}.self_attn.q_proj.weight", "layers.attn.q", "NH,D"),
    Weight("model.layers.{l}.self_attn.k_proj.weight", "layers.attn.k", "KH,D"),
    Weight("model.layers.{l}.self_attn.v_proj.weight", "layers.attn.v", "KH,D"),
    Weight("model.layers.{l}.self_attn.q_proj.bias", "layers.attn.q_bias", "NH"),
    Weight("model.layers.{l}.self_attn.k_proj.bias", "layers.attn.k_bias", "KH"),
    Weight("model.layers.{l}.self_attn.v_proj.bias", "layers.attn.v_bias", "KH"),
    Weight("model.layers.{l}.self_attn.q_norm.weight", "layers.attn.q_norm", "H"),
    Weight("model.layers.{l}.self_attn.k_norm.weight", "layers.attn.k_norm", "H"),
    Weight("model.layers.{l}.self_attn.o_proj.weight", "layers.attn.o", "D,NH"),
    Weight("model.layers.{l}.post_attention_layernorm.weight", "layers.mlp_norm", "D"),
    Weight("model.layers.{l}.mlp.gate_proj.weight", "layers.mlp.gate", "F,D"),
    Weight("model.layers.{l}.mlp.up_proj.weight", "layers.mlp.up", "F,D"),
    Weight("model.layers.{l}.mlp.down_proj.weight", "layers.mlp.down", "D,F"),
)


class Leaf(NamedTuple):
    """A weight of one configuration: its row of the table with letters and sizes filled in."""

    weight: Weight
    dims: str  # our letters, "LDNH"
    shape: tuple[int, ...]  # our shape

    @property
    def path(self) -> str:
        return self.weight.path

    @property
    def names(self) -> list[str]:
        """The stored names, one a layer where the leaf has the axis L."""
        layers = range(self.shape[0]) if self.dims[0] == "L" else [0]
        return [self.weight.name.format(l=i) for i in layers]

    def unstacked(self) -> list["Leaf"]:
        """The leaves of the single layers, with paths such as "layers.3.attn.q"; or this leaf, if it has no axis L."""
        if self.dims[0] != "L":
            return [self]
        _, rest = self.path.split(".", 1)
        weights = [Weight(name, f"layers.{i}.{rest}", self.weight.letters) for i, name in enumerate(self.names)]
        return [Leaf(weight, self.dims[1:], self.shape[1:]) for weight in weights]

    @property
    def split(self) -> str:
        """The stored letters without the commas, "NHD"."""
        return self.weight.letters.replace(",", "")

    def sizes(self, letters: str) -> tuple[int, ...]:
        return tuple(self.shape[self.dims.index(letter)] for letter in letters)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes(group)) for group in self.weight.letters.split(","))


def leaves_of(module: Transformer) -> list[Leaf]:
    """The rows of the table that `module` has.

    Raises:
        InputError: a parameter has no row in the table, and so no place in a checkpoint.
    """
    dims, shapes = _flat(param_dims(module)), _flat(split(module)[1])
    known = {weight.path: weight for weight in TABLE}
    if unknown := dims.keys() - known.keys():
        raise InputError(
            f"{type(module).__name__} has parameters that no Hugging Face checkpoint of this architecture has: "
            f"{', '.join(sorted(unknown))}; add their names to TABLE in rmr1_jax/model/table.py"
        )
    return [Leaf(weight, dims[path], shapes[path].shape) for path, weight in known.items() if path in dims]


def nested(flat: dict[str, Any]) -> Params:
    """A tree from its leaves by their dotted path. Layers with a number become a list."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        functools.reduce(lambda tree, name: tree.setdefault(name, {}), parents, tree)[last] = value
    layers = tree.get("layers", {})
    return tree | {"layers": [layers[str(i)] for i in range(len(layers))]} if "0" in layers else tree


def _flat(tree: Params) -> dict[str, Any]:
    """The leaves of a tree by their dotted path."""
    return {
        jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }
