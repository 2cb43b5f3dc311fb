"""Weights in and out of Hugging Face directories: one table of names, read in both directions.

A stored matrix is ours with its letters in another order: reshape by the letters, transpose, done. Import checks the
headers of every file first and names all that is wrong in one error; only then does it allocate. It fills each leaf
in place, on its devices, block by block, so the host never holds a second copy of the checkpoint.
Next: `tensor_files.py` for the files, `qwen.py` for the leaves, `config.py` for the `config.json` beside them.
"""

import functools
import itertools
import math
import operator
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmr1_jax.distributed.exchange import first
from rmr1_jax.distributed.mesh import single_device_mesh, weight_sharding
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig, config_to_hf
from rmr1_jax.model.qwen import Params, Transformer, param_dims, split
from rmr1_jax.model.tensor_files import INDEX, SINGLE, StoredTensor, find_tensors, write_json, write_tensors

BLOCK_BYTES = 4 * 2**20  # what the host holds of a tensor at a time


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
    def stacked(self) -> bool:
        return self.dims[0] == "L"

    @property
    def names(self) -> list[str]:
        """The stored names, one a layer."""
        return [self.weight.name.format(l=i) for i in range(self.shape[0])] if self.stacked else [self.weight.name]

    @property
    def split(self) -> str:
        """The stored letters without the commas, "NHD"."""
        return self.weight.letters.replace(",", "")

    def sizes(self, letters: str) -> tuple[int, ...]:
        return tuple(self.shape[self.dims.index(letter)] for letter in letters)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes(group)) for group in self.weight.letters.split(","))


def load_params(
    model_dir: str | Path, module: Transformer, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> Params:
    """Reads the weights of a Hugging Face directory onto `mesh` (default: one device), cast to `dtype`.

    Args:
        module: declares the parameters; see `qwen.module_for`.

    Returns:
        The tree of `qwen.param_dims(module)`, sharded by `mesh.weight_sharding`. The host's memory beyond the result
        stays within a few blocks of 4 MiB.

    Raises:
        InputError: before anything is allocated, naming every missing, extra or misshapen tensor at once; or a file is
            absent, cut short, or not safetensors.
    """
    mesh = mesh or single_device_mesh()
    stored = find_tensors(Path(model_dir))
    leaves = _leaves(module)
    _check_tensors(Path(model_dir), module.config, leaves, stored)
    params: Params = {}
    for leaf in leaves:
        *parents, last = leaf.weight.path.split(".")
        tree = functools.reduce(lambda tree, name: tree.setdefault(name, {}), parents, params)
        tree[last] = _load_leaf(leaf, [stored[name] for name in leaf.names], mesh, jnp.dtype(dtype))
    return params


def save_params(
    model_dir: str | Path, module: Transformer, params: Params, *, dtype: Any, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes `params` as a Hugging Face directory: safetensors in `dtype` (float32 or bfloat16) and `config.json`.

    One file, or shards of at most `max_shard_bytes` (a larger tensor has its own) and their index. All is written under
    temporary names first; `config.json` goes last, so a directory that has one is complete. Weights of an earlier
    export there are replaced. With several processes all must call it; the first one writes.
    """
    out, dtype = Path(model_dir), jnp.dtype(dtype)
    shards = _shards(_leaves(module), dtype.itemsize, max_shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = [SINGLE] if len(shards) == 1 else files
    if not first():
        for _, leaf, layer in itertools.chain(*shards):
            jax.block_until_ready(_stored_form(params, leaf, layer, dtype))  # takes part in the gathering
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as name:
        temporary = Path(name)
        for file, shard in zip(files, shards, strict=True):
            shapes = {name: leaf.stored_shape for name, leaf, _ in shard}
            tensors = (np.ascontiguousarray(_stored_form(params, leaf, layer, dtype)) for _, leaf, layer in shard)
            write_tensors(temporary / file, shapes, dtype, tensors)
        if len(files) > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, _, _ in shard}
            total = sum(math.prod(leaf.stored_shape) for _, leaf, _ in itertools.chain(*shards)) * dtype.itemsize
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            files.append(INDEX)
        write_json(temporary / "config.json", config_to_hf(module.config, dtype.name))
        _publish(temporary, out, files)


def _leaves(module: Transformer) -> list[Leaf]:
    """The rows of the table that `module` has.

    Raises:
        InputError: a parameter has no row in the table, and so no place in a checkpoint.
    """
    dims, shapes = _flat(param_dims(module)), _flat(split(module)[1])
    known = {weight.path: weight for weight in TABLE}
    if unknown := dims.keys() - known.keys():
        raise InputError(
            f"{type(module).__name__} has parameters that no Hugging Face checkpoint of this architecture has: "
            f"{', '.join(sorted(unknown))}; add their names to TABLE in rmr1_jax/model/hf.py"
        )
    return [Leaf(weight, dims[path], shapes[path].shape) for path, weight in known.items() if path in dims]


def _flat(tree: Params) -> dict[str, Any]:
    """The leaves of a tree by their dotted path."""
    return {
        jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _shards(leaves: list[Leaf], itemsize: int, max_bytes: int) -> list[list[tuple[str, Leaf, int | None]]]:
    """(stored name, leaf, layer) of every tensor, cut into files of at most `max_bytes`."""
    shards: list[list[tuple[str, Leaf, int | None]]] = [[]]
    room = max_bytes
    for leaf in leaves:
        size = math.prod(leaf.stored_shape) * itemsize
        for i, name in enumerate(leaf.names):
            if shards[-1] and size > room:
                shards.append([])
                room = max_bytes
            shards[-1].append((name, leaf, i if leaf.stacked else None))
            room -= size
    return shards


def _load_leaf(leaf: Leaf, tensors: list[StoredTensor], mesh: Mesh, dtype: np.dtype) -> jax.Array:
    """Allocates one leaf on the mesh and writes the stored tensors into it, block by block."""
    sharding = weight_sharding(mesh, leaf.dims, leaf.shape)
    array = _zeros(shape=leaf.shape, dtype=dtype, sharding=sharding)
    for corner, block in _blocks(leaf, tensors, sharding):
        form = {"dims": leaf.dims, "split": leaf.split, "sharding": sharding, "block_spec": block.sharding.spec}
        array = _write_block(array, block, corner, **form)
        # Dispatch runs ahead of the copies; without the wait, blocks would pile up on the host.
        array.block_until_ready()
    return array


def _blocks(leaf: Leaf, tensors: list[StoredTensor], sharding: NamedSharding) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """The stored tensors in blocks, each with its corner in every device's own part of the leaf.

    A row is an entry of the first stored letter. A block takes the same rows out of every device's part, so writing it
    moves nothing between devices, and a process reads only what its own devices keep. For example q of the 7B model,
    stored as "NH,D": a row [H, D] = [128, 3584] has 0.9 MiB in bfloat16. Over tensor=2 a device keeps 14 of the 28
    heads, so a block of 4 MiB has 2 rows of either part: first heads 0, 1 and 14, 15, then 2, 3 and 16, 17.
    """
    axes = dict(zip(leaf.dims, sharding.spec, strict=True))
    assert axes.get("L") is None, "layers are run in order, never split"
    block_sharding = NamedSharding(sharding.mesh, PartitionSpec(*(axes[letter] for letter in leaf.split)))
    rows, *row_shape = leaf.sizes(leaf.split)
    rows_kept = block_sharding.shard_shape(leaf.sizes(leaf.split))[0]
    parts = rows // rows_kept
    row_bytes = math.prod(row_shape) * tensors[0].dtype.itemsize
    step = max(1, BLOCK_BYTES // (row_bytes * parts))
    for layer, tensor in enumerate(tensors):
        for start in range(0, rows_kept, step):
            count = min(step, rows_kept - start)
            read = functools.cache(functools.partial(tensor.read, count=count, row_shape=tuple(row_shape)))

            def part(index, read=read, start=start, count=count):
                number = (index[0].start or 0) // count
                return read(number * rows_kept + start)[:, *index[1:]]

            block = jax.make_array_from_callback((count * parts, *row_shape), block_sharding, part)
            corner = {"L": layer, leaf.split[0]: start}
            yield np.array([corner.get(letter, 0) for letter in leaf.dims], np.int32), block


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _zeros(*, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("dims", "split", "sharding", "block_spec"))
def _write_block(
    array, block, corner, *, dims: str, split: str, sharding: NamedSharding, block_spec: PartitionSpec
) -> jax.Array:
    """`array` (letters `dims`) with `block` (letters `split`) at `corner` of each device's own part, in place."""
    ours = dims.removeprefix("L")

    def write(array, block, corner):
        block = block.transpose([split.index(letter) for letter in ours]).astype(array.dtype)
        return jax.lax.dynamic_update_slice(array, block[None] if ours != dims else block, tuple(corner))

    specs = (sharding.spec, block_spec, PartitionSpec())
    return jax.shard_map(write, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)(array, block, corner)


def _check_tensors(model_dir: Path, config: QwenConfig, leaves: list[Leaf], stored: dict[str, StoredTensor]) -> None:
    """Raises one InputError with everything missing, extra or misshapen; layers with the same complaint are joined."""
    expected = {name: leaf.stored_shape for leaf in leaves for name in leaf.names}
    extra = stored.keys() - expected.keys()
    complaints = [(name, "missing") for name in expected if name not in stored]
    complaints += [
        (name, f"shape {list(stored[name].shape)}, expected {list(shape)}")
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if config.tie_word_embeddings and "lm_head.weight" in extra and not complaints:
        # A tied model's file may hold the embedding twice; only as long as both are the same is one enough.
        extra -= {"lm_head.weight"}
        if not _equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
            complaints.append(
                ("lm_head.weight", "differs from the embedding, but config.json says tie_word_embeddings")
            )
    complaints += [(name, "not a weight of this model") for name in sorted(extra)]
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, complaint in complaints:
        layer = re.search(r"\.(\d+)\.", name)
        key = name.replace(layer[0], ".{l}.", 1) if layer else name
        grouped.setdefault((key, complaint), []).extend([layer[1]] if layer else [])
    if grouped:
        lines = [
            f"  {name}: {complaint}" + (f" (l = {', '.join(layers)})" if layers else "")
            for (name, complaint), layers in grouped.items()
        ]
        raise InputError(f"{model_dir}: the weights do not fit config.json:\n" + "\n".join(lines))


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape:
        return False
    step = max(1, BLOCK_BYTES // (a.shape[1] * a.dtype.itemsize))
    rows = ((i, min(step, a.shape[0] - i), a.shape[1:]) for i in range(0, a.shape[0], step))
    return all(np.array_equal(a.read(*block), b.read(*block)) for block in rows)


def _stored_form(params: Params, leaf: Leaf, layer: int | None, dtype: np.dtype) -> jax.Array:
    """One tensor as it is stored."""
    array = functools.reduce(operator.getitem, leaf.weight.path.split("."), params)
    assert array.shape == leaf.shape, f"{leaf.weight.path} has shape {array.shape}, not {leaf.shape}"
    whole = (
        None if getattr(array, "is_fully_addressable", True) else NamedSharding(array.sharding.mesh, PartitionSpec())
    )
    form = {"dims": leaf.dims, "split": leaf.split, "shape": leaf.stored_shape, "dtype": dtype, "whole": whole}
    return _unstack(array, layer, **form)


@functools.partial(jax.jit, static_argnames=("dims", "split", "shape", "dtype", "whole"))
def _unstack(
    array, layer, *, dims: str, split: str, shape: tuple[int, ...], dtype: np.dtype, whole: NamedSharding | None
) -> jax.Array:
    """One layer of a leaf in the stored letters and shape; on every device where processes share the leaf."""
    ours = dims.removeprefix("L")
    if ours != dims:
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    array = array.transpose([ours.index(letter) for letter in split]).reshape(shape).astype(dtype)
    return jax.lax.with_sharding_constraint(array, whole) if whole else array


def _publish(temporary: Path, out: Path, files: list[str]) -> None:
    """Moves an export into place; in between there is no `config.json`, so that no reader sees a mixture."""
    (out / "config.json").unlink(missing_ok=True)
    for file in files:
        os.replace(temporary / file, out / file)
    for path in out.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name) and path.name not in files:
            path.unlink()
    os.replace(temporary / "config.json", out / "config.json")
