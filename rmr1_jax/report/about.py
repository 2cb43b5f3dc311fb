"""Reads what a training run says about itself: model, size, steps, duration, date and version.

Every fact comes from a file of the run, and is left out where an older or unfinished run does not have that file:
`config.yaml` names the model, `model/` has its shape, `metrics.jsonl` the seconds of every step, and the manifest of
the newest checkpoint the time and the version of the package.

Read next: `training.py`, which shows the facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from rmr1_jax.errors import InputError
from rmr1_jax.files.untrusted import read_object
from rmr1_jax.report.reading import stage_order


def run_facts(path: Path) -> dict[str, Any]:
    """Returns what the files of one part of a run say: "model", "shape", "parameters", "written", "version", "devices".
    A fact that no file has is absent."""
    facts: dict[str, Any] = {}
    if name := _config(path / "config.yaml").get("model"):
        facts["model"] = str(name)
    shape = _object(path / "model/config.json")
    if all(isinstance(shape.get(key), int | str) for key in ("model_type", "num_hidden_layers", "hidden_size")):
        facts["shape"] = f"{shape['model_type']}, {shape['num_hidden_layers']} layers of width {shape['hidden_size']}"
    if parameters := _parameters(path / "model", tied=shape.get("tie_word_embeddings") is True):
        facts["parameters"] = parameters
    steps = [file for file in (path / "checkpoints").glob("*/manifest.json") if file.parent.name.isdigit()]
    about = _object(max(steps, key=lambda file: int(file.parent.name))).get("about") if steps else None
    if isinstance(about, dict):
        facts |= {name: about[name] for name in ("written", "version") if isinstance(about.get(name), str)}
        if isinstance(about.get("mesh"), dict) and all(isinstance(size, int) for size in about["mesh"].values()):
            facts["devices"] = prod(about["mesh"].values())
    return facts


def shown_facts(parts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the facts of a run's parts as texts by title. A part also has "stage", and "steps" and "seconds" if it
    has metrics."""

    parts = sorted(parts, key=lambda part: stage_order(part["stage"].lower()))

    def each(texts: Mapping[str, str]) -> str:
        """One text if all parts have the same, otherwise that of each part with its name."""
        if len(set(texts.values())) < 2:
            return next(iter(texts.values()), "")
        return ", ".join(f"{stage} {text}" for stage, text in texts.items())

    def values(name: str) -> dict[str, Any]:
        return {part["stage"]: part[name] for part in parts if name in part}

    dates = [day(text) for text in values("written").values()]
    found = {
        "Model": each(values("model")) or each(values("shape")),
        "Parameters": each({stage: in_words(number) for stage, number in values("parameters").items()}),
        "Steps": _sums({stage: f"{steps:,}" for stage, steps in values("steps").items()}),
        "Duration": _sums({stage: duration(seconds) for stage, seconds in values("seconds").items()}),
        "Devices": each({stage: f"{number:,}" for stage, number in values("devices").items()}),
        "Finished": max(filter(None, dates), default=""),
        "Version": each({stage: f"rmr1_jax {version}" for stage, version in values("version").items()}),
    }
    return {name: text for name, text in found.items() if text}


def _sums(texts: Mapping[str, str]) -> str:
    """Returns the text of each part with its name; that of a single part without it."""
    return ", ".join(f"{stage} {text}" if len(texts) > 1 else text for stage, text in texts.items())


def duration(seconds: float) -> str:
    """Formats seconds as a person would: "57 s", "1 min 31 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def in_words(number: int) -> str:
    """Formats a large number, such as 494M or 1.5B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def day(text: str) -> str:
    """Returns a time in ISO 8601 as date and minutes in UTC, or "" if it is none."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return ""


def _config(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except InputError:
        return {}


def _parameters(model: Path, *, tied: bool) -> int:
    """Returns the number of weights in the files of a model, from their headers; 0 if there are none. tied: the head
    is the embedding, and counts once where a file has both."""
    total = 0
    for file in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(file, "numpy") as tensors:
                names = [name for name in tensors.keys() if not (tied and name == "lm_head.weight")]  # noqa: SIM118
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError):
            return 0
    return total
