"""The parts of `scripts/real_model` that are no command of `rmr1`: the rows that are judged, and the table at the end.

python scripts/real_model.py held-out --rows rewardbench.jsonl --trained distill_sft.jsonl --limit 40 --out rows.jsonl
python scripts/real_model.py table --out runs/real_model --trained distill_sft.jsonl
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import tyro

from rmr1_jax.eval.intervals import share_interval
from rmr1_jax.eval.logs import read_judgements
from rmr1_jax.prompts.prompt import get_prompt
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import strict_verdict

JUDGED = {
    "before_published": ("before training", "published"),
    "before_ours": ("before training", "ours (`cor`)"),
    "after_published": ("after SFT", "published"),
    "after_ours": ("after SFT", "ours (`cor`)"),
}


def held_out(rows: Path, trained: Path, limit: int, out: Path) -> None:
    """Write the rows whose question is in no row that is trained on: of every subset in turn, up to a limit.

    Args:
        rows: RewardBench rows.
        trained: The rows that are trained on.
        limit: Most rows to write.
        out: File to write.
    """
    texts = trained.read_text()
    subsets: dict[str, list[str]] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        if not is_in(row["prompt"], texts):
            subsets.setdefault(row["subset"], []).append(line)
    rounds = itertools.chain(*itertools.zip_longest(*subsets.values()))
    kept = [line for line in rounds if line][:limit]
    out.write_text("".join(line + "\n" for line in kept))
    print(f"{len(kept)} rows of {len(subsets)} subsets have a question that is not trained on: {out}")


def table(out: Path, trained: Path) -> None:
    """Print the shares of valid traces and of right verdicts before and after training, and the seconds of each stage.

    A valid trace is complete and ends with a verdict that the strict rule reads. A verdict is right by the published
    rule, as in the benchmark. Intervals are 95% intervals (`eval/intervals.py`).

    Args:
        out: The directory that scripts/real_model wrote.
        trained: The rows that were trained on, to check that no judged question is among them.
    """
    structure = get_prompt(str(out / "prompt.yaml")).structure
    texts = trained.read_text()
    seconds = {file.name: int(file.read_text()) for file in (out / "done").iterdir()}
    print("| judge | prompt | valid traces | right verdicts | tokens a text | minutes |\n|---|---|---|---|---|---|")
    for name, (when, prompt) in JUDGED.items():
        rows = list(read_judgements(out / name / "judgements.jsonl"))
        if leaked := [row["id"] for row in rows if is_in(row["question"], texts)]:
            sys.exit(f"error: the questions of {leaked} are among the rows that were trained on")
        traces = [row["texts"][0][0] if row["texts"] else "" for row in rows]
        valid = sum(bool(strict_verdict(t)) and parse_trace(t).is_complete(structure) for t in traces)
        right = sum(row["correct"] for row in rows)
        tokens = np.mean([row["tokens"][0][0] if row["tokens"] else 0 for row in rows])
        shares = f"{share(valid, len(rows))} | {share(right, len(rows))}"
        print(f"| {when} | {prompt} | {shares} | {tokens:.0f} | {seconds[name] / 60:.0f} |")
    print(f"\nSFT: {seconds['sft'] / 60:.0f} minutes; all stages: {sum(seconds.values()) / 60:.0f} minutes")


def is_in(question: str, texts: str) -> bool:
    """Whether a question stands in JSON lines, whose strings may have escaped characters beyond ASCII or not."""
    return any(json.dumps(question.strip(), ensure_ascii=ascii)[1:-1] in texts for ascii in (True, False))


def share(count: int, total: int) -> str:
    low, high = share_interval(count, total)
    return f"{count} of {total} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"held-out": held_out, "table": table})
