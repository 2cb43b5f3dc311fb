"""Health of a run: updates that are not finite are never saved, and signs of a collapsed policy are reported.

`optim.update` leaves the weights as they were if the loss or the gradient is not finite. Here the run is stopped or the
update skipped, and what helps to find the cause is written to a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rmr1_jax.distributed.exchange import first
from rmr1_jax.distributed.terminal import say
from rmr1_jax.errors import RunError
from rmr1_jax.files.write import write_whole
from rmr1_jax.train.config import RunConfig
from rmr1_jax.train.optim import TrainState

PATIENCE = 5  # successive steps that look like a collapse before it is reported

SIGNS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "every reward is -1": ("reward", lambda x: x <= -1),
    "every verdict is A": ("verdict_a", lambda x: x >= 1),
    "every verdict is B": ("verdict_a", lambda x: x <= 0),
    "every response is cut off at the length limit": ("truncated", lambda x: x >= 1),
}


def check_finite(
    metrics: Mapping[str, float],
    step: int,
    what: str,
    *,
    state: TrainState,
    describe: Callable[[], Any],
    config: RunConfig,
) -> bool:
    """Whether an update was applied. One that was not leaves `nonfinite_step_N.json` in the run directory, with its
    metrics, the norms of the weights and moments, and a description of its batch. Then `on_nonfinite: stop` raises a
    RunError that names the step, the batch and the file.

    metrics: `loss` and `grad_norm` at least. what: names the batch. state: after the update (the one before it, if that
    was not finite). describe: called for the ids and lengths in the batch, only if needed.
    """
    wrong = {k: metrics[k] for k in ("grad_norm", "loss") if not math.isfinite(metrics[k])}
    if not wrong:
        return True
    path = Path(config.out) / f"nonfinite_step_{step}.json"
    numbers = {k: _for_json(v) for k, v in metrics.items()}
    facts = {"step": step, "of": what, "metrics": numbers, "norms": _norms(state), "batch": describe()}
    if first():
        write_whole(path, json.dumps(facts, indent=1) + "\n")
    message = f"step {step}: {', '.join(f'{k} is {v}' for k, v in wrong.items())} on {what}."
    if config.on_nonfinite == "stop":
        advice = "Lower the learning rate, look at these rows, or set on_nonfinite=skip"
        raise RunError(f"{message} Nothing of this step was saved, the last checkpoint is valid; see {path}. {advice}")
    say(f"{message} The update is skipped; see {path}")
    return False


class CollapseWatch:
    """Prints one warning when a sign of collapse has lasted for `PATIENCE` steps in a row; and at the first step one if
    half of the texts are cut off, whose rewards say nothing about their verdicts, and one if no group has rewards that
    differ, from which nothing is learned."""

    def __init__(self):
        self._first = True
        self._steps = dict.fromkeys(SIGNS, 0)

    def look(self, metrics: Mapping[str, Any], step: int) -> None:
        """Look at the metrics of a step. A metric that is missing is no sign."""
        if self._first and (cut := metrics.get("truncated", 0)) >= 0.5:
            say(
                f"warning: at step {step}, {cut:.0%} of the texts are cut off at sampling.max_new_tokens, most before "
                "their verdict; raise it, or render the rows with the prompt that the model was trained with"
            )
        if self._first and metrics.get("mixed_groups") == 0:
            say(
                f"warning: at step {step}, the rewards within each group are equal (mixed_groups 0, mean reward "
                f"{metrics['reward']:.3f}): all advantages are 0, and nothing is learned from them. Look at some "
                "texts; a policy that never writes a right verdict needs SFT first, or reward=cold_start"
            )
        self._first = False
        for name, (key, is_so) in SIGNS.items():
            value = metrics.get(key)
            self._steps[name] = self._steps[name] + 1 if value is not None and is_so(value) else 0
            if self._steps[name] == PATIENCE:
                say(f"warning: at step {step}, for {PATIENCE} steps in a row, {name}: the policy may have collapsed")


def _norms(state: TrainState) -> dict[str, Any]:
    """The norm of every weight and moment by its dotted name. What is not finite here was so before the update."""
    norms = jax.tree.map(lambda x: jnp.linalg.norm(jnp.asarray(x, jnp.float32).ravel()), state._asdict())
    leaves = jax.tree.leaves_with_path(jax.device_get(norms))
    return {jax.tree_util.keystr(path, simple=True, separator="."): _for_json(norm) for path, norm in leaves}


def _for_json(value: Any) -> float | str:
    """A float, or its name if it is not finite: JSON has no NaN."""
    return float(value) if math.isfinite(value) else str(float(value))
