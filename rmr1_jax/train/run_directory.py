"""The directory of a run. Its config, data and functions are checked, so that no other run is continued by mistake."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import yaml

from rmr1_jax.config import config_differences, dump_config, load_config
from rmr1_jax.data.packing import lengths_of
from rmr1_jax.distributed.exchange import first, wait
from rmr1_jax.distributed.terminal import say, waiting
from rmr1_jax.errors import InputError
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.policy import Policy
from rmr1_jax.prompts.prompt import PROMPT_FILE, Prompt, save_prompt
from rmr1_jax.train.config import RunConfig
from rmr1_jax.train.functions import DEFAULT, differences, record_of
from rmr1_jax.train.loggers import check_loggers

FUNCTIONS = "functions.json"
# Settings that may differ between a run and its continuation: those that change no number,
NO_EFFECT = {"out", "save_every", "save_minutes", "keep", "best", "on_nonfinite", "profile"}
NO_EFFECT |= {"logger", "log_rollouts", "show_rollout_every"}
# those that change only what is measured beside the training,
HELD_OUT = {"eval_data", "eval_every"}
# and those that change the order of sums, and so the last bits.
ROUNDING = {"mesh", "sampling_tensor", "remat", "attention", "reference_memory", "optimizer.memory"}


Functions = Mapping[str, Callable[..., Any] | None]  # by name, such as "reward"; None for the default


def check_run(config: RunConfig, directory: Path, functions: Functions = MappingProxyType({})) -> None:
    """Check, before anything is loaded, that a run can begin or continue in a directory. Nothing is written; changes of
    the config that do not matter are printed. functions: those that the caller of the stage gave.

    Raises InputError if the directory holds a run with another config or other functions, which names every difference;
    RunError if it cannot be made.
    """
    if re.match(r"\w+:/", str(directory)):
        raise InputError(
            f"out={directory} is an address; give a directory, on several hosts one that all of them mount"
        )
    above = next(path for path in directory.absolute().parents if path.exists())
    with writing(directory):
        if not above.is_dir() or (directory.exists() and not directory.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    check_loggers(config.logger)
    if (path := directory / "config.yaml").is_file():
        _compare(path, config)
        _compare_functions(directory / FUNCTIONS, functions)
    wait("config read")  # by all processes, before the first one writes it again


def start_run(config: RunConfig, directory: Path, functions: Functions = MappingProxyType({})) -> None:
    """Make the run directory, and write the resolved config and a record of the functions. Call it when the model and
    the data are open: a start that fails before leaves nothing, and so does not stand in the way of the right one.
    Raises RunError if a file cannot be written."""
    path = directory / "config.yaml"
    if first():
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        if functions:
            write_whole(directory / FUNCTIONS, json.dumps(_records(functions), indent=1) + "\n")
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
    then = "the last checkpoint is valid; free some space and run the same command again"
    with waiting(f"writing {out}/model"), writing(out / "model", size, then):
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

    if fatal := listed(NO_EFFECT | HELD_OUT | ROUNDING, inside=False):
        advice = "give another `out`, or remove the directory"
        raise InputError(f"{path.parent} holds a run with another config ({fatal}); {advice}")
    effects = [(NO_EFFECT - {"out"}, "no number"), (HELD_OUT, "only the metrics eval_...")]
    for known, effect in (*effects, (ROUNDING, "only the last bits of numbers")):
        if noted := listed(known):
            say(f"changed settings, which change {effect}: {noted}")


def _compare_functions(path: Path, functions: Functions) -> None:
    """Raise InputError if a function differs from its record in `path`. Runs of earlier versions have no record."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    new = _records(functions)
    found = [text for name in new if name in old for text in differences(name, old[name], new[name])]
    if found:
        advice = f"give another `out`, or the function that the run was made with ({path} has its source)"
        raise InputError(f"{path.parent} holds a run with another function ({'; '.join(found)}); {advice}")


def _records(functions: Functions) -> dict[str, dict[str, str]]:
    return {name: DEFAULT if given is None else record_of(given) for name, given in functions.items()}
