"""Numbers gone wrong: an update that is not finite is never saved, and a policy that collapses is said to.

`optim.update` leaves the weights as they were where the loss or the gradient is not finite; here it is decided what
becomes of the run, and what somebody who looks for the cause will want to know is written down.
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
from rmr1_jax.errors import RunError
from rmr1_jax.files.write import write_whole
from rmr1_jax.train.config import OnNonfinite
from rmr1_jax.train.metrics import say
from rmr1_jax.train.optim import TrainState

PATIENCE = 5  # steps in a row that look like a collapse before it is said


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
    directory: Path,
    state: TrainState,
    batch: Callable[[], Any],
    then: OnNonfinite,
) -> bool:
    """Whether an update was applied. One that was not leaves `directory/nonfinite_step_N.json`, with its numbers, the
    norms of the weights and moments, and its batch.

    Args:
        metrics: `loss` and `grad_norm`. state: after the update, which is the one before it where that is not finite.
        batch: called for the ids and lengths of what was trained on, only then.

    Raises:
        RunError: it was not and `then` is stop; names the step, the batch and the file.
    """
    wrong = {k: metrics[k] for k in ("grad_norm", "loss") if not math.isfinite(metrics[k])}
    if not wrong:
        return True
    path = directory / f"nonfinite_step_{step}.json"
    facts = {"step": step, "of": what, "metrics": _json(metrics), "norms": _norms(state), "batch": batch()}
    if first():
        write_whole(path, json.dumps(facts, indent=1) + "\n")
    said = f"step {step}: {', '.join(f'{k} is {v}' for k, v in wrong.items())} on {what}."
    if then == "stop":
        raise RunError(
            f"{said} Nothing of this step was kept and the last checkpoint stands; see {path}. Lower the learning "
            "rate, look at these rows, or set on_nonfinite=skip"
        )
    say(f"{said} The update is skipped; see {path}")
    return False


class CollapseWatch:
    """Says once, in a line, that a sign of collapse has been there for `PATIENCE` steps in a row."""

    def __init__(self):
        self._steps = dict.fromkeys(SIGNS, 0)

    def look(self, metrics: Mapping[str, Any], step: int) -> None:
        """metrics: of a step; those that it lacks are no sign."""
        for name, (key, is_so) in SIGNS.items():
            value = metrics.get(key)
            self._steps[name] = self._steps[name] + 1 if value is not None and is_so(value) else 0
            if self._steps[name] == PATIENCE:
                say(f"warning: at step {step}, for {PATIENCE} steps in a row, {name}: the policy may have collapsed")


def _norms(state: TrainState) -> dict[str, Any]:
    """The norm of every weight and moment; what is not finite there was so before the update."""
    norms = jax.device_get(
        jax.tree.map(lambda x: jnp.linalg.norm(jnp.asarray(x, jnp.float32).ravel()), state._asdict())
    )
    return {
        jax.tree_util.keystr(k, simple=True, separator="."): _finite(v) for k, v in jax.tree.leaves_with_path(norms)
    }


def _json(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {k: _finite(v) for k, v in metrics.items()}


def _finite(value: Any) -> float | str:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else str(float(value))
