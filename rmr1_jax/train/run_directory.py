"""The directory of a run. Its config and data are checked, so that no other run is continued by mistake."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from rmr1_jax.config import config_differences, dump_config, load_config
from rmr1_jax.data.packing import lengths_of
from rmr1_jax.distributed.exchange import first, wait
from rmr1_jax.errors import InputError
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.policy import Policy
from rmr1_jax.prompts.prompt import PROMPT_FILE, Prompt, save_prompt
from rmr1_jax.train.config import RunConfig
from rmr1_jax.train.metrics import say

# Settings that may differ between a run and its continuation: those that change no number,
NO_EFFECT = {"out", "save_every", "save_minutes", "keep", "best", "on_nonfinite", "profile"}
# and those that change the order of sums, and so the last bits.
ROUNDING = {"mesh", "sampling_tensor", "remat", "attention", "reference_memory", "optimizer.memory"}


def check_run(config: RunConfig, directory: Path) -> None:
    """Check, before anything is loaded, that a run can begin or continue in a directory. Nothing is written; changes of
    the config that do not matter are printed.

    Raises InputError if the directory holds a run with another config, which names every difference; RunError if it
    cannot be made.
    """
    if re.match(r"\w+:/", str(directory)):
        raise InputError(
            f"out={directory} is an address; give a directory, on several hosts one that all of them mount"
        )
    above = next(path for path in directory.absolute().parents if path.exists())
    with writing(directory):
        if not above.is_dir() or (directory.exists() and not directory.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    if (path := directory / "config.yaml").is_file():
        _compare(path, config)
    wait("config read")  # by all processes, before the first one writes it again


def start_run(config: RunConfig, directory: Path) -> None:
    """Make the run directory and write the resolved config. Call it when the model and the data are open: a start that
    fails before leaves nothing, and so does not stand in the way of the right one. Raises RunError if it cannot be
    written."""
    path = directory / "config.yaml"
    if first():
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, dump_config(config))
    wait("config written")
    if not path.is_file():
        raise InputError(f"{path} exists on process 0 but not here; `out` must be a directory that all hosts see")


def data_digest(examples: Sequence[Any]) -> str:
    """A hash of the number of examples and their lengths, to notice that the data of a run has changed."""
    return hashlib.sha256(np.asarray(lengths_of(examples), np.int32).tobytes()).hexdigest()[:16]


def same_data(restored: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The cursor of a checkpoint, checked to be one into the present data. Raises InputError if that has changed."""
    if restored.get("data", now["data"]) != now["data"]:
        change = "the data has changed since the checkpoint was written (another number of examples, or other lengths)"
        raise InputError(
            f"{change}, so its cursor would point to other rows. Give the data as it was, or another `out`"
        )
    return now | restored


def save_model(policy: Policy, out: Path, prompt: Prompt | None) -> Policy:
    """Save the trained policy as `out/model`, and return it. Raises RunError if it cannot be written; nothing half
    written remains there. prompt: that of the training data, which is written beside the weights; None leaves the
    prompt of the model that training started from, if it has one."""
    size = sum(x.nbytes for x in jax.tree.leaves(policy.params))
    with writing(out / "model", size, "the last checkpoint is valid; free some space and run the same command again"):
        policy.save(out / "model")
        if prompt and first():
            save_prompt(prompt, out / "model" / PROMPT_FILE)
    return policy


def _compare(path: Path, config: RunConfig) -> None:
    """Raise InputError if the config in `path` differs in a setting that matters; print other differences."""
    # Loaded as a config: a setting that an earlier version did not have yet counts as its default.
    old, new = (yaml.safe_load(dump_config(each)) for each in (load_config(type(config), path), config))
    differences = config_differences(old, new)
    changed = {k: f"{k} was {a!r}, is {b!r}" for k, (a, b) in differences.items()}

    def listed(known: set[str], inside: bool = True) -> str:
        """The changes of the settings that are, or whose section is, in `known`; or all others."""
        return "; ".join(v for k, v in changed.items() if any(f"{k}.".startswith(f"{x}.") for x in known) == inside)

    if fatal := listed(NO_EFFECT | ROUNDING, inside=False):
        advice = "give another `out`, or remove the directory"
        raise InputError(f"{path.parent} holds a run with another config ({fatal}); {advice}")
    for known, effect in ((NO_EFFECT - {"out"}, "no number"), (ROUNDING, "only the last bits of numbers")):
        if noted := listed(known):
            say(f"changed settings, which change {effect}: {noted}")
