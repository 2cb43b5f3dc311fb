"""Writes some texts of each GRPO step to `rollouts.jsonl`, and shows one of them from time to time.

Each line is an object with `step`, `id`, `better`, `text`, `reward`, `verdict`, `status` (ok or invalid), `reason` (of
an invalid text, as in the rows of `rmr1 judge`), `new_tokens` and `finish_reason`; and `question`, `response_a` and
`response_b` where the prompt's `meta` is a pair, otherwise `prompt`, the rendered text. Next: `rollout.py`, which makes
the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmr1_jax.distributed.terminal import say
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.prompts.escape import without_control
from rmr1_jax.prompts.verdict import eval_verdict, why_unread
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.metrics import StepLog
from rmr1_jax.train.rollout import Group

SHOWN = 300  # characters of a text that are shown from its start and from its end, together


class RolloutLog:
    """The rollouts.jsonl of a run, which continues at `next_step` as metrics.jsonl does."""

    def __init__(self, config: GrpoConfig, tokenizer: Tokenizer, next_step: int):
        self._count, self._show_every = config.log_rollouts, config.show_rollout_every
        self._tokenizer = tokenizer
        self._log = StepLog(Path(config.out) / "rollouts.jsonl", next_step=next_step)

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Write the texts of a step: one of each group, in the order of the groups, then a second one of each. Raises
        RunError if the file cannot be written."""
        P, R = len(groups), len(groups[0].samples)
        for k in range(min(self._count, P * R)):
            row = {"step": step} | self._row(groups[k % P], k // P)
            self._log.write(row)
            if k == 0 and self._show_every and step % self._show_every == 0:
                say(shown_text(row))

    def _row(self, group: Group, number: int) -> dict[str, Any]:
        prompt, sample, text = group.prompt, group.samples[number], group.texts[number]
        verdict = eval_verdict(text)
        row = {"id": prompt.id}
        names = ("question", "response_a", "response_b")
        row |= {name: value for name in names if isinstance(value := getattr(prompt.meta, name, None), str)}
        if "question" not in row:
            row["prompt"] = self._tokenizer.decode(prompt.tokens.tolist())
        reward = None if np.isnan(group.rewards[number]) else float(group.rewards[number])
        row |= {"better": prompt.better, "text": text, "reward": reward, "verdict": verdict}
        row["status"] = "ok" if verdict else "invalid"
        if not verdict:
            row["reason"] = "cut_off" if sample.finish_reason == "length" else why_unread(text, "eval")
        return row | {"new_tokens": len(sample.token_ids), "finish_reason": sample.finish_reason}


def shown_text(row: dict[str, Any]) -> str:
    """A row of rollouts.jsonl for a terminal: a line of facts, and the start and the end of the text."""
    verdict = f"verdict {row['verdict']}" if row["verdict"] else f"no verdict ({row['reason']})"
    reward = "no reward" if row["reward"] is None else f"reward {row['reward']:g}"
    facts = f"{reward}, {verdict}, better {row['better']}, {row['new_tokens']} tokens"
    text = " ".join(without_control(row["text"]).split())
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
    return f"step {row['step']}, {without_control(row['id'])}: {facts}\n  {text}"
