"""Prepared sets: tokenized rows on disk, which training reads one by one, so that memory does not grow with the set.

A set is a directory, which appears whole or not at all:

    rows/            a TFDS data set in ArrayRecord files, with the features id, source, tokens, prompt_length, better;
                     any reader of TFDS opens it, without TensorFlow
    lengths.npy      [2, N] int32, the tokens of each row and of its prompt, from which batches are planned
    rejects.jsonl    the rows that were left out, and why
    prompt.yaml      the prompt that the rows were rendered with, where there is one of all rows
    prepared.json    the config, the fingerprint of tokenizer and chat template, counts, and size and hash of each file

Next: `prepare.py`, which makes sets; `packing.py`, which packs examples into batches.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmr1_jax.data.examples import Example, Stage, make_example, read_training_rows
from rmr1_jax.distributed.terminal import waiting
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.files.write import refusal, to_disk
from rmr1_jax.model.tokenizer import TEMPLATE_ARGUMENTS, THOUGHT, Tokenizer
from rmr1_jax.pairs.training_sets import read_published
from rmr1_jax.prompts.prompt import Messages, Prompt, check_prompt, own_prompt
from rmr1_jax.prompts.recover import recover_prompt

FORMAT = 1  # the version of the directory's layout
MANIFEST, LENGTHS, REJECTS, ROWS = "prepared.json", "lengths.npy", "rejects.jsonl", "rows"

ROWS_PER_FILE = 2_000  # the writer of an open file holds one or two kilobytes a row
ROWS_PER_WRITE = 512
HISTOGRAM_BINS = 30  # approximately


class PreparedExamples(Sequence[Example]):
    """The examples of a prepared set. Each is read when it is accessed; threads may read at the same time.

    manifest: the content of `prepared.json`. lengths, trained_lengths: [N] int32 (see `packing.trained_lengths_of`).

    Raises:
        InputError: the directory is no prepared set or has another format, or a file is missing or has another size.
        RunError: (from an access) a row cannot be read any more.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        for name, facts in self.manifest["files"].items():
            file = self.directory / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, was written with {facts['bytes']}"
                raise InputError(f"{file} {found}; run `rmr1 data prepare` again, or copy the whole directory again")
        try:
            self._rows = _open_rows(self.directory / ROWS)
            self.lengths, prompts = np.load(self.directory / LENGTHS)  # refuses pickled objects
        except Exception as e:  # TFDS, the record reader and NumPy each raise their own errors for damaged files
            raise InputError(f"{self.directory}: cannot be opened ({e}); run `rmr1 data prepare` again") from e
        self.trained_lengths = self.lengths - np.maximum(prompts, 1)  # a first token does not count
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
            id, source, better = (row[name].decode() for name in ("id", "source", "better"))
        except Exception as e:  # the record reader, the decoder and the disk each raise their own errors
            raise RunError(f"{self.directory}: row {number} cannot be read ({e}); prepare or copy it again") from e
        return Example(id, row["tokens"], trained, source, better or None)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise InputError, which names each difference, unless this tokenizer and its template made the token ids."""
        was, now = dict(self.manifest["fingerprint"]), dict(tokenizer.fingerprint)
        arguments, given = (each.pop(TEMPLATE_ARGUMENTS, "{}") for each in (was, now))
        if arguments != given:
            raise InputError(
                f"{self.directory} was prepared with {TEMPLATE_ARGUMENTS}={arguments}, this is {given}; give it the "
                f"same, or run `rmr1 data prepare` with {TEMPLATE_ARGUMENTS}={given}"
            )
        names = was | (now if self.manifest["stage"] == "sft" else {k: v for k, v in now.items() if k != THOUGHT})
        differences = [
            f"{name} {was.get(name)} there, {now.get(name)} in {tokenizer.directory}"
            for name in names
            if was.get(name) != now.get(name)
        ]
        if differences:
            raise InputError(
                f"{self.directory} was prepared with another tokenizer ({'; '.join(differences)}); run "
                f"`rmr1 data prepare` with model={tokenizer.directory}, or use the model it was prepared for"
            )


def open_examples(path: str | Path, stage: Stage, tokenizer: Tokenizer) -> Sequence[Example]:
    """Open a prepared set, or tokenize all rows of published files into memory. Raises InputError for a bad row, or if
    the set was prepared for the other stage, or with another tokenizer or chat template."""
    if not is_prepared(path):
        with waiting(f"reading {path}"):
            return [make_example(tokenizer, row, stage) for row in read_training_rows([Path(path)], None)]
    examples = PreparedExamples(path)
    if (made_for := examples.manifest["stage"]) != stage:
        raise InputError(f"{path} was prepared for {made_for}, not {stage}: run `rmr1 data prepare` with stage={stage}")
    examples.check_tokenizer(tokenizer)
    return examples


def prompt_of(path: str | Path) -> Prompt | None:
    """Return the prompt that the rows of a prepared set, or of published files, were rendered with; None if that cannot
    be told, as of rows with several prompts."""
    if is_prepared(path):
        return own_prompt(Path(path))
    with waiting(f"looking for the prompt of {path}"):
        return common_prompt(row.messages for k, row in enumerate(read_published(path)) if is_sampled(k))


def is_sampled(number: int) -> bool:
    """Whether the row of this number is one of those whose prompt is recovered: they are held in memory."""
    return number < 64 or number % 61 == 0


def common_prompt(rows: Iterable[Messages]) -> Prompt | None:
    """Return the prompt that all rows were rendered with, or None if there is none that a prompt file can hold."""
    try:
        found = recover_prompt(rows)
        check_prompt(found)
    except InputError:
        return None
    return found


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a directory that `rmr1 data prepare` wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read `prepared.json`. Raises InputError if it is missing, or is not one that `rmr1 data prepare` writes."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if (version := manifest["format"]) == FORMAT:
            _ = manifest["fingerprint"].items(), manifest["counts"]["kept"], manifest["stage"]
            _ = manifest["config"]["model"], [facts["bytes"] for facts in manifest["files"].values()]
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give a directory of `rmr1 data prepare`") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: not what `rmr1 data prepare` writes ({e!r}); prepare it again") from e
    if version != FORMAT:
        raise InputError(f"{path}: format {version!r}, this version reads {FORMAT}; prepare the set again")
    return manifest


def _open_rows(directory: Path) -> Sequence[dict[str, Any]]:
    """Open the TFDS data set in a directory. TFDS imports the classes that its files name: only TFDS's are allowed."""
    import tensorflow_datasets as tfds  # takes half a second to import, and most commands read no prepared set

    def check(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            if key == "pythonClassName" and not str(value).startswith("tensorflow_datasets.core.features."):
                raise InputError(f"features.json names the class {value!r}, which does not belong to TFDS")

    json.loads((directory / "features.json").read_bytes(), object_pairs_hook=check)
    return tfds.builder_from_directory(str(directory)).as_data_source(split="train")


class SetWriter:
    """Writes examples as a TFDS data set, and collects their lengths (8 bytes a row) and counts. It uses the sequential
    writer of TFDS, because the ordinary one would hold a gigabyte in memory and then ask for TensorFlow."""

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
        self.tokens, self.prompts = array("i"), array("i")  # of each example
        self.sources, self.better = Counter(), Counter()

    def add(self, example: Example) -> None:
        prompt = len(example) - int(example.trained.sum())
        row = {"id": example.id, "source": example.source, "better": example.better or ""}
        self._buffer.append(row | {"tokens": example.tokens, "prompt_length": prompt})
        if len(self._buffer) == ROWS_PER_WRITE:  # each write rewrites the data set's description
            self.flush()
        self.tokens.append(len(example))
        self.prompts.append(prompt)
        self.sources[example.source] += 1
        self.better[example.better or "unknown"] += 1

    def flush(self, *, last: bool = False) -> None:
        """Write the rows that are buffered; with `last`, close the files too."""
        try:
            self._writer.add_examples({"train": self._buffer})
            if last:
                self._writer.close_all()
        except RuntimeError as e:  # the record writer raises it for errors of the disk
            raise RunError(refusal(self._directory, str(e), None, "make room, then run the same command again")) from e
        self._buffer = []

    def lengths(self) -> np.ndarray:
        """Return [2, N] int32: the tokens of each example and of its prompt."""
        return np.asarray([self.tokens, self.prompts], np.int32)

    def summary(self) -> dict[str, Any]:
        """Return the entries `sources`, `better` and `lengths` of `prepared.json`."""
        tokens, prompts = self.lengths()
        kinds = {"tokens": tokens, "prompt": prompts, "trained": tokens - prompts}
        return {
            "sources": dict(self.sources.most_common()),
            "better": dict(sorted(self.better.items())),
            "lengths": {name: _histogram(values) for name, values in kinds.items() if values.any()},
        }


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts between round edges, and the sum, mean, percentiles and maximum."""
    most = int(values.max())
    width = max(1, -(-most // HISTOGRAM_BINS))
    step = 10 ** (len(str(width)) - 1)
    width = -(-width // step) * step  # one digit and zeros
    counts, edges = np.histogram(values, np.arange(0, most + width + 1, width))
    p50, p99 = np.percentile(values, [50, 99]).tolist()
    facts = {"sum": int(values.sum()), "mean": float(values.mean()), "p50": p50, "p99": p99, "max": most}
    return {"edges": edges.tolist(), "counts": counts.tolist(), **facts}


def publish(partial: Path, out: Path) -> None:
    """Flush the manifest and all directory entries to the disk, then rename the directory to `out`."""
    for path in (partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        to_disk(path)
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
    to_disk(out.parent)
