"""Hugging Face directories: weights in, by `stored_model.py`, and weights out, tensor by tensor.

Next: `table.py` for the names, `stored_model.py` for reading, `tensor_files.py` for the files.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rmr1_jax.distributed.exchange import first
from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.model.config import config_to_hf
from rmr1_jax.model.qwen import Params, Transformer
from rmr1_jax.model.stored_model import StoredModel
from rmr1_jax.model.table import Leaf, leaves_of
from rmr1_jax.model.tensor_files import INDEX, SINGLE, write_json, write_tensors


def load_params(
    model_dir: str | Path, module: Transformer, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> Params:
    """Checks a Hugging Face directory (`StoredModel.open`) and reads it onto `mesh` (default: one device), cast to
    `dtype`: the tree of `qwen.param_dims(module)`, sharded by `mesh.weight_sharding`."""
    return StoredModel.open(model_dir, module, dtype).read(mesh or single_device_mesh())


def save_params(
    model_dir: str | Path, module: Transformer, params: Params, *, dtype: Any, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes `params` as a Hugging Face directory: safetensors in `dtype` (float32 or bfloat16) and `config.json`.

    A leaf of `params` may be a function that returns the array; it is called when the leaf is written, and the array is
    forgotten before the next one. One file is written, or shards of at most `max_shard_bytes` (a larger tensor has its
    own) and their index. All is written under temporary names first; `config.json` goes last, so a directory that has
    one is complete. Weights of an earlier export there are replaced. With several processes all must call it; the first
    one writes.
    """
    out, dtype = Path(model_dir), jnp.dtype(dtype)
    leaves = leaves_of(module)
    shards = _shards(leaves, dtype.itemsize, max_shard_bytes)
    tensors = _stored_forms(params, leaves, dtype)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = [SINGLE] if len(shards) == 1 else files
    if not first():
        for tensor in tensors:
            jax.block_until_ready(tensor)  # takes part in the gathering
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as name:
        temporary = Path(name)
        for file, shard in zip(files, shards, strict=True):
            write_tensors(
                temporary / file, shard, dtype, map(np.ascontiguousarray, itertools.islice(tensors, len(shard)))
            )
        if len(files) > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            total = sum(math.prod(shape) for shard in shards for shape in shard.values()) * dtype.itemsize
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            files.append(INDEX)
        write_json(temporary / "config.json", config_to_hf(module.config, dtype.name))
        _publish(temporary, out, files)


def _shards(leaves: list[Leaf], itemsize: int, max_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """The stored names and shapes of all tensors, cut into files of at most `max_bytes`."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_bytes
    for leaf in leaves:
        size = math.prod(leaf.stored_shape) * itemsize
        for name in leaf.names:
            if shards[-1] and size > room:
                shards.append({})
                room = max_bytes
            shards[-1][name] = leaf.stored_shape
            room -= size
    return shards


def _stored_forms(params: Params, leaves: list[Leaf], dtype: np.dtype) -> Iterator[jax.Array]:
    """All tensors as they are stored, in the order of `_shards`; one leaf at a time is in use."""
    for leaf in leaves:
        array = functools.reduce(operator.getitem, leaf.path.split("."), params)
        array = array() if callable(array) else array
        assert array.shape == leaf.shape, f"{leaf.path} has shape {array.shape}, not {leaf.shape}"
        shared = not getattr(array, "is_fully_addressable", True)
        whole = NamedSharding(array.sharding.mesh, PartitionSpec()) if shared else None
        form = {"dims": leaf.dims, "split": leaf.split, "shape": leaf.stored_shape, "dtype": dtype, "whole": whole}
        for layer in range(len(leaf.names)):
            yield _unstack(array, layer, **form)


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
