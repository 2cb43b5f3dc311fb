"""The rows of `gpu_check.py` as text: a line for the terminal, and Markdown tables.

    python scripts/gpu_table.py runs/gpu_check/gpu_check.json

Rows that have the same columns share a table. What failed or was left out is listed at the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADS = {
    "tokens_s": "tokens/s", "mfu": "MFU", "bandwidth": "of the bandwidth", "tflop_s": "TFLOP/s", "tb_s": "TB/s",
    "compile_s": "compile, s", "peak_gib": "peak, GiB", "temporaries_gib": "temporaries, GiB",
    "weights_gib": "weights, GiB", "live_cache_gib": "cache, GiB", "updates_s": "updates, s",
    "logprobs_tokens_s": "logprobs, tokens/s", "logprobs_mfu": "their MFU", "first_step_s": "first step, s",
    "whole_s": "whole, s", "seconds": "step, s", "rollout_seconds": "rollout, s", "update_seconds": "update, s",
}  # fmt: skip
SHARES = ("mfu", "bandwidth", "logprobs_mfu", "packed", "products", "cudnn", "copies", "other")
HIDDEN = {
    "part",
    "case",
    "name",
    "ok",
    "error",
    "process_seconds",
    "at_s",
    "held_cache_gib",
    "profile_ms",
    "busy",
    "kernels",
}


def shown(key: str, value: Any) -> str:
    """A share in percent, another number with three digits or all before the point, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key in SHARES:
        return f"{100 * value:.1f}%"
    if isinstance(value, float) and (0 < abs(value) < 1e-2):
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line(row: dict[str, Any]) -> str:
    """What was measured in one row, and all its numbers, for the terminal."""
    hidden = {"part", "case", "name", "error", "process_seconds"}
    said = "  ".join(f"{key}={shown(key, value)}" for key, value in row.items() if key not in hidden)
    if "error" in row:
        said = f"FAILED {row['error']}"
    return f"{row['part'] + ':' + row['case']:<20} {row.get('name', ''):<26} {said}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The machine, all tables, and what is missing or wrong."""
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    missing = []
    for row in rows:
        keys = tuple(key for key in row if key not in HIDDEN)
        where = f"`{row['part']}:{row['case']}`"
        if "error" in row:
            missing.append(f"- {where}: {row['error']}")
        elif row.get("ok") is False or "failed" in row:
            missing.append(f"- {where}, {row['name']}: {row.get('failed', 'wrong')}")
        if row["part"] != "versions" and "error" not in row and "failed" not in row:
            tables.setdefault((row["part"], *keys), []).append(row)
    text = []
    for (part, *keys), found in tables.items():
        heads = [part, *(HEADS.get(key, key) for key in keys)]
        lines = [[row["name"], *(shown(key, row[key]) for key in keys)] for row in found]
        text += ["", *("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))]
    return "\n".join([machine(rows), *text, *(["", "Missing or wrong:", "", *missing] if missing else [])])


def machine(rows: Sequence[dict[str, Any]]) -> str:
    """One line: the card, the versions, and what it reaches in a copy and in a product."""
    facts: dict[str, Any] = {}
    for row in rows:
        if row["part"] == "versions":
            facts |= row
    versions = ", ".join(f"{name} {facts[name]}" for name in ("jax", "nvidia-cudnn-cu13") if facts.get(name))
    reached = [f"{shown(key, facts[key])} {HEADS[key]}" for key in ("tb_s", "tflop_s") if key in facts]
    said = [f"{facts.get('kind', 'unknown device')}, driver {facts.get('driver', '?')}", versions, ", ".join(reached)]
    return "; ".join(filter(None, said))


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
