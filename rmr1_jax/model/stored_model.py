"""Weights in: a model directory that was checked, and is read straight into the layout that needs it.

`StoredModel.open` checks the headers of every file and names all that is wrong in one error, before anything is
allocated. `read` then fills arrays in place, on their devices, block by block in the order of the files, so that the
host holds a few blocks and never a tensor. A read-ahead thread keeps the next blocks coming while one is written.
Next: `tensor_files.py` for the files, `table.py` for the names.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from rmr1_jax.distributed.exchange import first
from rmr1_jax.distributed.mesh import weight_sharding
from rmr1_jax.distributed.terminal import pace
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Params, Transformer
from rmr1_jax.model.table import Leaf, leaves_of, nested
from rmr1_jax.model.tensor_files import Reader, StoredTensor, find_tensors

BLOCK_BYTES = 16 * 2**20  # what a process reads of a tensor at a time; some four of these are in memory
AHEAD = 2  # blocks that are read while one is written to the devices
PROGRESS_AFTER = 3.0  # seconds after which a progress bar appears


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model directory whose weights fit `module`. `dtype` is that of the arrays in the layout of training."""

    directory: Path
    module: Transformer
    dtype: np.dtype
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, directory: str | Path, module: Transformer, dtype: Any = jnp.float32) -> StoredModel:
        """Checks a Hugging Face directory. Only headers are read (and a tied head that is stored twice).

        Args:
            module: declares the parameters; see `qwen.module_for`.

        Raises:
            InputError: naming every missing, extra or misshapen tensor at once; or a file is absent, cut short, or not
                safetensors.
        """
        directory = Path(directory)
        tensors = find_tensors(directory)
        _check_tensors(directory, module.config, leaves_of(module), tensors)
        return cls(directory=directory, module=module, dtype=jnp.dtype(dtype), tensors=tensors)

    def read(
        self, mesh: Mesh, dtype: Any = None, *, sharding: Callable = weight_sharding, stacked: bool = True
    ) -> Params:
        """Reads the weights onto `mesh`, cast to `dtype` (default: `self.dtype`). A process reads what its own devices
        keep. A progress bar appears where it takes longer than a few seconds.

        Args:
            sharding: gives each array's sharding from (mesh, letters, shape). stacked: whether a parameter of all
                layers is one array with the axis L, as in training; otherwise "layers" is a list of trees.
        """
        leaves = leaves_of(self.module)
        if not stacked:
            leaves = [part for leaf in leaves for part in leaf.unstacked()]
        return nested(self._read(leaves, mesh, jnp.dtype(dtype or self.dtype), sharding))

    def deferred(self, mesh: Mesh) -> Params:
        """A tree of functions, each of which reads one array as `read` does. For a use that needs one at a time."""

        def read(leaf: Leaf) -> jax.Array:
            return self._read([leaf], mesh, self.dtype, weight_sharding)[leaf.path]

        return nested({leaf.path: functools.partial(read, leaf) for leaf in leaves_of(self.module)})

    def _read(self, leaves: list[Leaf], mesh: Mesh, dtype: np.dtype, sharding: Callable) -> dict[str, jax.Array]:
        arrays = [_Array(leaf, sharding(mesh, leaf.dims, leaf.shape), dtype) for leaf in leaves]
        blocks = [block for array in arrays for block in array.blocks([self.tensors[n] for n in array.leaf.names])]
        blocks.sort(key=lambda block: (block.tensor.file, block.tensor.offset, block.start))
        bar = tqdm(
            total=sum(block.bytes for block in blocks),
            desc=f"reading {self.directory.name}",
            unit="B",
            unit_scale=True,
            disable=not first(),
            dynamic_ncols=True,
            **{"delay": PROGRESS_AFTER, **pace(brief=True)},
        )
        with bar:
            for block, rows in _read_ahead(blocks):
                block.array.write(block, rows)
                bar.update(block.bytes)
        return {array.leaf.path: array.finished() for array in arrays}


class _Array:
    """One array on its devices, which stored tensors are written into block by block.

    A row is an entry of the first stored letter. A block takes the same rows out of every device's part, so writing it
    moves nothing between devices, and a process reads only what its own devices keep. For example q of the 7B model,
    stored as "NH,D": a row [H, D] = [128, 3584] has 0.9 MiB in bfloat16. Over tensor=2 a device keeps 14 of the 28
    heads, so a block of 16 MiB has 9 rows of either part: first heads 0 to 8 and 14 to 22, then 9 to 13 and 23 to 27.
    """

    def __init__(self, leaf: Leaf, sharding: NamedSharding, dtype: np.dtype):
        self.leaf, self.sharding = leaf, sharding
        axes = dict(zip(leaf.dims, sharding.spec, strict=True))
        assert axes.get("L") is None, "layers are run in order, never split"
        self.block_sharding = NamedSharding(sharding.mesh, PartitionSpec(*(axes[letter] for letter in leaf.split)))
        sizes = leaf.sizes(leaf.split)
        self.rows, self.row_shape = self.block_sharding.shard_shape(sizes)[0], sizes[1:]
        held: dict[int, set[int]] = defaultdict(set)  # the parts that each process keeps
        for device, index in self.block_sharding.devices_indices_map(sizes).items():
            held[device.process_index].add((index[0].start or 0) // self.rows)
        self.own, self.most = sorted(held[jax.process_index()]), max(map(len, held.values()))
        self.parts = sizes[0] // self.rows
        self.value = _zeros(shape=leaf.shape, dtype=dtype, sharding=sharding)

    def blocks(self, tensors: Iterable[StoredTensor]) -> Iterator[_Block]:
        for layer, tensor in enumerate(tensors):
            step = max(1, BLOCK_BYTES // (math.prod(self.row_shape) * tensor.dtype.itemsize * self.most))
            for start in range(0, self.rows, step):
                yield _Block(self, tensor, layer, start, min(step, self.rows - start))

    def write(self, block: _Block, rows: dict[int, np.ndarray]) -> None:
        """Casts and writes a block to the devices. rows: see `_Block.read`."""

        def part(index):
            return rows[(index[0].start or 0) // block.count][:, *index[1:]]

        shape = (block.count * self.parts, *self.row_shape)
        placed = jax.make_array_from_callback(shape, self.block_sharding, part)
        corner = {"L": block.layer, self.leaf.split[0]: block.start}
        corner = np.array([corner.get(letter, 0) for letter in self.leaf.dims], np.int32)
        form = {"dims": self.leaf.dims, "split": self.leaf.split, "sharding": self.sharding}
        self.value = _write_block(self.value, placed, corner, **form, block_spec=self.block_sharding.spec)
        # Dispatch runs ahead of the copies; without the wait, blocks would pile up on the host.
        self.value.block_until_ready()

    def finished(self) -> jax.Array:
        """The array with the very sharding that was asked for: a result of `jit` may have an equal one in another form,
        for which the programs that take the array would be compiled again."""
        parts = [shard.data for shard in self.value.addressable_shards]
        return jax.make_array_from_single_device_arrays(self.value.shape, self.sharding, parts)


@dataclass(frozen=True)
class _Block:
    """Rows `start` to `start + count` of each part of one stored tensor."""

    array: _Array
    tensor: StoredTensor
    layer: int
    start: int
    count: int

    @property
    def bytes(self) -> int:
        """The bytes that this process reads."""
        rows = self.count * len(self.array.own)
        return rows * math.prod(self.array.row_shape) * self.tensor.dtype.itemsize

    def read(self, reader: Reader) -> dict[int, np.ndarray]:
        """The rows of the parts that this process keeps, by the number of the part."""
        a = self.array
        return {n: reader.read(self.tensor, n * a.rows + self.start, self.count, a.row_shape) for n in a.own}


def _read_ahead(blocks: Iterable[_Block]) -> Iterator[tuple[_Block, dict[int, np.ndarray]]]:
    """Yields each block with its rows, while a thread reads the next ones."""
    with Reader() as reader, ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting: deque = deque()
        for block in blocks:
            waiting.append((block, pool.submit(block.read, reader)))
            if len(waiting) > AHEAD:
                ready, rows = waiting.popleft()
                yield ready, rows.result()
        for ready, rows in waiting:
            yield ready, rows.result()


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
    with Reader() as reader:
        return all(np.array_equal(reader.read(a, *block), reader.read(b, *block)) for block in rows)
