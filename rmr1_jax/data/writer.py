"""Writing the files of a prepared set: the rows, their statistics, and the directory that appears whole.

Next: `prepare.py`, which calls this.
"""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmr1_jax.data.examples import Example
from rmr1_jax.data.store import MANIFEST
from rmr1_jax.errors import RunError
from rmr1_jax.files.write import hash_written, refusal, to_disk

ROWS_PER_FILE = 2_000  # the writer of an open file holds one or two kilobytes a row
ROWS_PER_WRITE = 512
HISTOGRAM_BINS = 30  # approximately


class RowsWriter:
    """Writes examples as a TFDS data set.

    TFDS's ordinary writer would hold a gigabyte in memory and then ask for TensorFlow; its sequential writer writes
    each row as it comes.
    """

    def __init__(self, directory: Path):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.dataset_info import DatasetIdentity

        text = tfds.features.Text()
        tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        features = {"id": text, "source": text, "tokens": tokens, "prompt_length": np.int32, "better": text}
        # TFDS requires the name of a module and never imports it. A constant, so that moving code changes no file.
        identity = DatasetIdentity(
            name="rmr1_rows",
            version=tfds.core.Version("1.0.0"),
            data_dir=str(directory),
            module_name="rmr1_jax.data.store",
        )
        info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
        self._writer = tfds.core.SequentialWriter(info, ROWS_PER_FILE, file_format="array_record")
        self._writer.initialize_splits(["train"])
        self._directory, self._buffer = directory, []

    def add(self, example: Example) -> None:
        row = {"id": example.id, "source": example.source, "better": example.better or ""}
        row |= {"tokens": example.tokens, "prompt_length": len(example) - int(example.trained.sum())}
        self._buffer.append(row)
        if len(self._buffer) == ROWS_PER_WRITE:  # each write rewrites the data set's description
            self._flush()

    def close(self) -> None:
        self._flush()
        with self._write_errors():
            self._writer.close_all()

    def _flush(self) -> None:
        with self._write_errors():
            self._writer.add_examples({"train": self._buffer})
        self._buffer = []

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:  # the record writer raises it for errors of the disk
            raise RunError(refusal(self._directory, str(e), None, "make room, then run the same command again")) from e


@dataclass
class SetStatistics:
    """Lengths (4 bytes each) and counts of the examples of a set, collected while they are written."""

    tokens: array = field(default_factory=lambda: array("i"))
    prompts: array = field(default_factory=lambda: array("i"))
    sources: Counter = field(default_factory=Counter)
    better: Counter = field(default_factory=Counter)

    def add(self, example: Example) -> None:
        self.tokens.append(len(example))
        self.prompts.append(len(example) - int(example.trained.sum()))
        self.sources[example.source] += 1
        self.better[example.better or "unknown"] += 1

    def lengths(self) -> np.ndarray:
        """[2, N] int32: the tokens of each example and of its prompt."""
        return np.asarray([self.tokens, self.prompts], np.int32)

    def summary(self) -> dict[str, Any]:
        """The entries `sources`, `better` and `lengths` of `prepared.json`."""
        tokens, prompts = self.lengths()
        kinds = {"tokens": tokens, "prompt": prompts, "trained": tokens - prompts}
        return {
            "sources": dict(self.sources.most_common()),
            "better": dict(sorted(self.better.items())),
            "lengths": {name: _histogram(values) for name, values in kinds.items() if values.any()},
        }


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts between round edges, and the sum, mean, percentiles and maximum."""
    width = max(1, -(-int(values.max()) // HISTOGRAM_BINS))
    step = 10 ** (len(str(width)) - 1)
    width = -(-width // step) * step  # one digit and zeros
    edges = np.arange(0, int(values.max()) + width + 1, width)
    counts, _ = np.histogram(values, edges)
    p50, p99 = np.percentile(values, [50, 99])
    facts = {"sum": int(values.sum()), "mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}
    return {"edges": edges.tolist(), "counts": counts.tolist(), **facts, "max": int(values.max())}


def flush_and_hash(directory: Path) -> dict[str, dict[str, Any]]:
    """Flush every file in the directory to the disk. Returns {path in the directory: {"bytes", "sha256"}}."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hash_written(path) for path in files}


def publish(partial: Path, out: Path) -> None:
    """Flush the manifest and all directory entries to the disk, then rename the directory to `out`."""
    for path in (partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        to_disk(path)
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
    to_disk(out.parent)
