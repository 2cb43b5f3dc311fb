"""Safetensors files: the place of each tensor's bytes, errors that say what a damaged file is, and writing.

The format is 8 bytes of header length, a JSON header (name, dtype, shape, offsets), then the data. Reading it here,
not through the library, says how many bytes are missing, and reads rows of a tensor by offset. Files are read and not
mapped, as the library does: pages of a mapped file count as the process's memory, and a network mount serves them in
small pieces. No pickle is ever opened. Next: `table.py`, which says what the tensors mean.
"""

import itertools
import json
import math
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.untrusted import own_file, parse_json, read_object, wrong_download

DTYPES = {"F32": jnp.dtype(jnp.float32), "BF16": jnp.dtype(jnp.bfloat16), "F16": jnp.dtype(jnp.float16)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 2**50
MAX_HEADER_BYTES = 16 * 2**20  # the format allows 100 MB; the header of a whole 72B in one file has 0.2
MAX_DIMS = 8


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file; `offset` in bytes from the start of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class Reader:
    """Reads rows of stored tensors. A file is opened once, and stays open until the reader is closed."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files.values():
            file.close()

    def read(self, tensor: StoredTensor, first: int, count: int, row_shape: tuple[int, ...]) -> np.ndarray:
        """Rows `first` to `first + count`, each of `row_shape`: [count, *row_shape] in the stored dtype.

        Raises:
            InputError: the file was cut short after its header was read. RunError: the file system fails.
        """
        row_bytes = math.prod(row_shape) * tensor.dtype.itemsize
        path = tensor.file
        # Pages of their own go back to the system with the array; malloc would keep blocks of this size.
        data = np.frombuffer(mmap.mmap(-1, max(1, count * row_bytes)), np.uint8)[: count * row_bytes]
        try:
            file = self._files[path] = self._files.get(path) or path.open("rb")
            file.seek(tensor.offset + first * row_bytes)
            size = file.readinto(data)
        except OSError as e:
            raise RunError(f"{path} cannot be read: {e.strerror or e}") from e
        if size != data.size:
            left = os.fstat(file.fileno()).st_size
            raise InputError(f"{path}: changed while it was read: {left} bytes are left of it")
        return data.view(tensor.dtype).reshape(count, *row_shape)


def find_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by name, from `model.safetensors` or from the shards that the index names.

    Only headers are read. Raises InputError for a file that is absent, cut short, or not safetensors.
    """
    if (model_dir / SINGLE).exists() or (model_dir / SINGLE).is_symlink():
        return read_header(model_dir / SINGLE)
    index = model_dir / INDEX
    if not index.exists() and not index.is_symlink():
        suffixes = (".safetensors", ".bin", ".pt", ".pth")
        found = sorted(path.name for path in model_dir.glob("*") if path.suffix in suffixes)
        pickled = any(not name.endswith(".safetensors") for name in found)
        advice = "; pickled weights can run code and are not read, convert them to safetensors" if pickled else ""
        raise InputError(f"{model_dir}: expected {SINGLE} or {INDEX}, found {', '.join(found) or 'neither'}{advice}.")
    weight_map = _read_index(index)
    stored: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors = read_header(model_dir / name)
        stored |= {tensor: where for tensor, where in tensors.items() if weight_map.get(tensor, name) == name}
    return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises InputError with the bytes expected and found, and what it is."""
    actual = own_file(path, most=MAX_FILE_BYTES).stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= min(MAX_HEADER_BYTES, actual) else b""
    try:
        header = {name: entry for name, entry in parse_json(raw).items() if name != "__metadata__"}
        entries = [
            (name, e["dtype"], _sizes(e["shape"], MAX_DIMS), *_sizes(e["data_offsets"], 2, 2))
            for name, e in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: {_nature(path)}; expected a safetensors file. Download it again.") from None
    expected = 8 + length + max((end for *_, end in entries), default=0)
    if expected != actual:
        kind = "cut short" if actual < expected else "longer than its header says"
        raise InputError(f"{path}: {kind}: expected {expected} bytes, got {actual}. Download it again.")
    stored = {}
    for name, code, shape, start, end in entries:
        if code not in tuple(DTYPES):
            raise InputError(f"{path}: tensor {name} is stored as {code}; expected one of {', '.join(DTYPES)}.")
        size = math.prod(shape) * DTYPES[code].itemsize
        if start < 0 or end - start != size:
            raise InputError(
                f"{path}: tensor {name} {list(shape)} needs {size} bytes, its header gives {start}..{end}."
            )
        stored[name] = StoredTensor(file=path, dtype=DTYPES[code], shape=shape, offset=8 + length + start)
    # One tensor after the other, without gaps: bytes that two tensors share are not what either was saved as.
    spans = sorted((start, end, name) for name, *_, start, end in entries)
    for (_, before, _), (start, _, name) in itertools.pairwise([(0, 0, ""), *spans]):
        if start != before:
            raise InputError(f"{path}: tensor {name} begins at {start}, but the one before it ends at {before}.")
    return stored


def _sizes(values: Any, most: int, least: int = 0) -> tuple[int, ...]:
    """Checks a list of whole numbers that a file can hold; raises ValueError for anything else."""
    if not isinstance(values, list) or not least <= len(values) <= most:
        raise ValueError
    if not all(type(value) is int and abs(value) <= MAX_FILE_BYTES for value in values):
        raise ValueError
    return tuple(values)


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Streams one safetensors file: `tensors` in the order of `shapes`, all of `dtype`, one in memory at a time."""
    code = {known: code for code, known in DTYPES.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Transformers refuses a file without it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.shape == shape and tensor.dtype == dtype
            file.write(tensor.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, every file a plain name that exists beside the index."""
    try:
        weight_map = read_object(index, most=4 * MAX_HEADER_BYTES)["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, AttributeError):
        own_file(index)
        raise InputError(f"{index}: {_nature(index)}; expected JSON with a weight_map of tensor to file.") from None
    # Anything but a plain name could reach outside the model directory.
    foreign = [name for name in names if not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name)]
    if foreign:
        raise InputError(f"{index}: file names {foreign[:5]}; expected plain .safetensors names in the same directory.")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise InputError(f"{index}: names files that are not there: {', '.join(absent)}. Download them again.")
    return weight_map


def _nature(path: Path) -> str:
    """Describes a file that is not what its name says."""
    if what := wrong_download(path):
        return what
    actual = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return f"this is a pickled PyTorch file of {actual} bytes, which is never read"
    length = int.from_bytes(head[:8], "little")
    if actual < 8 or (path.suffix == ".safetensors" and actual - 8 < length <= MAX_HEADER_BYTES):
        return f"cut short: expected more than {8 + length if actual >= 8 else 8} bytes, got {actual}"
    return f"{actual} bytes without a readable header (damaged)"
