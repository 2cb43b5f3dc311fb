"""Prepared sets: tokenised, masked rows on disk, read one by one where they are needed.

    rmr1 data prepare CONFIG.yaml                           # writes one (data/prepare.py)
    examples = open_examples(DIR, "sft", tokenizer)         # a sequence; memory does not grow with the set

A set is a directory: `rows/` is a TFDS data set in ArrayRecord files (any reader of TFDS opens it, without TensorFlow)
with the features id, source, tokens, prompt_length, better; `prepared.json` says what it was made of and under which
tokenizer and template, with the size and hash of every file; `lengths.npy` holds what planning needs, so that it reads
no row; `rejects.jsonl` the rows that were left out, and why. The directory appears whole or not at all.

Next: `data/pipeline.py`, which packs the examples; `data/prepare.py`, which writes the set.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rmr1_jax.data.examples import Example, make_example
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.write import hash_written, refusal, to_disk
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.pairs.training_sets import read_published

FORMAT = 1  # of the directory; another number is another layout


MANIFEST, LENGTHS, REJECTS, ROWS = "prepared.json", "lengths.npy", "rejects.jsonl", "rows"


ROWS_PER_FILE = 2_000  # a file's writer holds a kilobyte or two a row


WRITE_AT_ONCE = 512


class PreparedExamples(Sequence[Example]):
    """The examples of a prepared set, each read when it is asked for, by any thread.

    lengths, trained_lengths: [N] int32, see `pipeline.lengths_of`. manifest: what `prepared.json` holds.

    Raises:
        InputError: no prepared set, one of another format, or one with a file that is absent or not of its size.
        RunError: (from an access) a row that cannot be read any more.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        for name, facts in self.manifest["files"].items():
            file = self.directory / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["bytes"]:
                found = "is not there" if size is None else f"has {size} bytes, was written with {facts['bytes']}"
                raise InputError(f"{file} {found}; run `rmr1 data prepare` again, or copy the whole directory again")
        try:
            self._rows = _open_rows(self.directory / ROWS)
            self.lengths, prompts = np.load(self.directory / LENGTHS)  # no pickle
        except Exception as e:  # TFDS, the record reader and NumPy each have errors of their own for what is damaged
            raise InputError(f"{self.directory}: cannot be opened ({e}); run `rmr1 data prepare` again") from e
        # A first token is never trained: nothing stands before it. No prompt is empty but in theory.
        self.trained_lengths = self.lengths - np.maximum(prompts, 1)
        if not len(self._rows) == len(self.lengths) == self.manifest["counts"]["kept"]:
            raise InputError(
                f"{self.directory} holds {len(self._rows)} rows, {len(self.lengths)} lengths and says "
                f"{self.manifest['counts']['kept']}: parts of different sets; run `rmr1 data prepare` again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        number = range(len(self))[index]
        try:
            row = self._rows[number]
            trained = np.arange(len(row["tokens"])) >= row["prompt_length"]
            text = {name: row[name].decode() for name in ("id", "source", "better")}
        except Exception as e:  # the record reader, the decoder and the disk each have errors of their own
            raise RunError(f"{self.directory}: row {number} cannot be read ({e}); prepare or copy it again") from e
        return Example(text["id"], row["tokens"], trained, text["source"], text["better"] or None)


def _open_rows(directory: Path) -> Sequence[dict[str, Any]]:
    """The TFDS data set in a directory. TFDS imports the classes that the files name: only its own are let through."""
    import tensorflow_datasets as tfds  # here: it takes half a second, and most commands read no prepared set

    def check(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            if key == "pythonClassName" and not str(value).startswith("tensorflow_datasets.core.features."):
                raise InputError(f"features.json names the class {value!r}, which is none of TFDS's")

    json.loads((directory / "features.json").read_bytes(), object_pairs_hook=check)
    return tfds.builder_from_directory(str(directory)).as_data_source(split="train")


def is_prepared(path: str | Path) -> bool:
    """Whether this is a directory that `rmr1 data prepare` wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """What `prepared.json` holds. InputError where it is not there or not what `rmr1 data prepare` writes."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise InputError(
                f"{path}: format {manifest['format']!r}, this version reads {FORMAT}; prepare the set again"
            )
        _ = manifest["fingerprint"].items(), manifest["counts"]["kept"], manifest["stage"], manifest["config"]["model"]
        _ = [facts["bytes"] for facts in manifest["files"].values()]
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give a directory of `rmr1 data prepare`") from e
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"{path}: not what `rmr1 data prepare` writes ({type(e).__name__}: {e}); prepare it again"
        ) from e
    return manifest


def open_examples(path: str | Path, stage: str, tokenizer: Tokenizer) -> Sequence[Example]:
    """The examples to train on: those of a prepared set, read when asked for; or published rows, tokenised now.

    Args:
        stage: "sft" (prompt and trace) or "grpo" (the prompt, and which side is better).

    Raises:
        InputError: the set is for the other stage, or was prepared with another tokenizer or template; or a bad row.
    """
    if not is_prepared(path):
        return [make_example(tokenizer, row, stage) for row in read_published(path)]
    examples = PreparedExamples(path)
    if (made_for := examples.manifest["stage"]) != stage:
        raise InputError(f"{path} was prepared for {made_for}, not {stage}: run `rmr1 data prepare` with stage={stage}")
    refuse_other_tokenizer(examples, tokenizer)
    return examples


def refuse_other_tokenizer(examples: PreparedExamples, tokenizer: Tokenizer) -> None:
    """Raises InputError where the set was prepared with another tokenizer or template: its ids would be other text."""
    differences = [
        f"{name} {was} there, {tokenizer.fingerprint.get(name)} in {tokenizer.directory}"
        for name, was in examples.manifest["fingerprint"].items()
        if was != tokenizer.fingerprint.get(name)
    ]
    if differences:
        raise InputError(
            f"{examples.directory} was prepared with another tokenizer ({'; '.join(differences)}); run "
            f"`rmr1 data prepare` with model={tokenizer.directory}, or use the model it was prepared for"
        )


class RowsWriter:
    """Appends examples to the TFDS data set in a directory. The ordinary TFDS writer would hold a gigabyte in memory
    and then ask for TensorFlow; the sequential one writes each row as it comes."""

    def __init__(self, directory: Path):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.dataset_info import DatasetIdentity

        text = tfds.features.Text()
        tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        features = {"id": text, "source": text, "tokens": tokens, "prompt_length": np.int32, "better": text}
        identity = DatasetIdentity(
            name="rmr1_rows", version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=__name__
        )
        info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
        self._writer = tfds.core.SequentialWriter(info, ROWS_PER_FILE, file_format="array_record")
        self._writer.initialize_splits(["train"])
        self._directory, self._waiting = directory, []

    def add(self, example: Example) -> None:
        row = {"id": example.id, "source": example.source, "better": example.better or ""}
        row |= {"tokens": example.tokens, "prompt_length": len(example) - int(example.trained.sum())}
        self._waiting.append(row)
        if len(self._waiting) == WRITE_AT_ONCE:  # the writer renews its description at every call
            self._flush()

    def close(self) -> None:
        self._flush()
        with self._refusals():
            self._writer.close_all()

    def _flush(self) -> None:
        with self._refusals():
            self._writer.add_examples({"train": self._waiting})
        self._waiting = []

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:  # what the record writer makes of the disk's refusals
            raise RunError(refusal(self._directory, str(e), None, "make room, then run the same command again")) from e


def facts_of_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file in the directory, by its path there; all of them are on the disk on return."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hash_written(path) for path in files}


def publish(partial: Path, out: Path) -> None:
    """Give the directory its name; all of it is on the disk before."""
    for path in (partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        to_disk(path)
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
    to_disk(out.parent)


BINS = 30  # of a histogram, about


@dataclass
class Tally:
    """What is counted while the rows pass: lengths (4 bytes each), and sums."""

    tokens: array = field(default_factory=lambda: array("i"))
    prompts: array = field(default_factory=lambda: array("i"))
    sources: Counter = field(default_factory=Counter)
    better: Counter = field(default_factory=Counter)
    drops: Counter = field(default_factory=Counter)

    def add(self, example: Example) -> None:
        self.tokens.append(len(example))
        self.prompts.append(len(example) - int(example.trained.sum()))
        self.sources[example.source] += 1
        self.better[example.better or "unknown"] += 1

    def summary(self) -> dict[str, Any]:
        tokens, prompts = np.asarray(self.tokens), np.asarray(self.prompts)
        kinds = {"tokens": tokens, "prompt": prompts, "trained": tokens - prompts}
        return {
            "sources": dict(self.sources.most_common()),
            "better": dict(sorted(self.better.items())),
            "lengths": {name: _histogram(values) for name, values in kinds.items() if values.any()},
        }


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts between round edges, and what one asks first: sum, mean, percentiles, the longest."""
    width = max(1, -(-int(values.max()) // BINS))
    step = 10 ** (len(str(width)) - 1)
    width = -(-width // step) * step  # one digit and zeros
    edges = np.arange(0, int(values.max()) + width + 1, width)
    counts, _ = np.histogram(values, edges)
    p50, p99 = np.percentile(values, [50, 99])
    facts = {"sum": int(values.sum()), "mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}
    return {"edges": edges.tolist(), "counts": counts.tolist(), **facts, "max": int(values.max())}
