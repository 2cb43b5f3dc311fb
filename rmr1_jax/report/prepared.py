"""Reads prepared sets for their page: rows kept and left out, lengths, sources, and the balance of A and B.

All numbers are from `prepared.json`; the reasons why rows were left out are from `rejects.jsonl`.

Read next: `templates/prepared.html.j2`; `data/store.py`, for what a prepared set holds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rmr1_jax.data.store import MANIFEST, REJECTS, is_prepared, read_manifest
from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import whole_rows
from rmr1_jax.report.curves import BOTTOM, LEFT, RIGHT, TOP
from rmr1_jax.report.reading import text_of

MAX_REASONS = 20
KINDS = {"tokens": "Whole rows", "prompt": "Prompts", "trained": "Trained tokens"}
FACTS = {"mean": "mean", "p50": "median", "p99": "99th percentile", "max": "longest", "sum": "total"}


def prepared_page(roots: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """Returns the variables of `prepared.html.j2` for named prepared sets.

    Raises:
        InputError: a directory is not a prepared set, or its manifest or rejects file is malformed.
    """
    for _, root in roots:
        if not is_prepared(root):
            raise InputError(f"{root} is not a prepared set, but another of the directories is; write two reports")
    warnings: list[str] = []
    sets = [_set(name, root, warnings) for name, root in roots]
    kept = sum(found["counts"]["kept"] for found in sets)
    headline = (
        f"{kept:,} rows are ready for training, of {sum(found['counts']['read'] for found in sets):,} that were read."
    )
    return {
        "names": [name for name, _ in roots],
        "headline": headline,
        "facts_of": {},
        "sets": sets,
        "warnings": warnings,
    }


def _set(name: str, root: Path, warnings: list[str]) -> dict[str, Any]:
    manifest = read_manifest(root)
    try:
        prompt = manifest["prompt"]
        return {
            "name": name,
            "counts": {key: int(value) for key, value in manifest["counts"].items()},
            "facts": {
                "Stage": str(manifest["stage"]),
                "Target": str(manifest["target"]),
                "Model": str(manifest["config"]["model"]),
                "Prompt": "as in the rows" if prompt is None else f"{prompt['name']} ({prompt['sha256'][:16]})",
                **{str(key).capitalize(): str(value) for key, value in manifest["fingerprint"].items()},
            },
            "histograms": [_histogram(KINDS[kind], found) for kind, found in manifest["lengths"].items()],
            "sources": _shares(manifest["sources"], "not named"),
            "better": _shares(manifest["better"], "not known"),
            "reasons": _reasons(root / REJECTS, warnings),
            "config": yaml.safe_dump(manifest["config"], sort_keys=False),
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise InputError(
            f"{root / MANIFEST}: not what `rmr1 data prepare` writes ({e!r}); prepare the set again"
        ) from e


def _shares(counts: dict[str, int], unnamed: str) -> list[dict[str, Any]]:
    total = sum(counts.values())
    return [
        {"name": unnamed if name in ("", "unknown") else name, "rows": int(n), "percent": 100 * n / total}
        for name, n in counts.items()
    ]


def _histogram(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Returns a histogram in SVG units. bars: (x, y, width, height, description); ticks: (position, label)."""
    edges, counts = [int(x) for x in found["edges"]], [int(x) for x in found["counts"]]
    if len(edges) != len(counts) + 1 or not max(counts) > 0:
        raise ValueError(f"a histogram of {len(counts)} counts between {len(edges)} edges")
    across, up = (RIGHT - LEFT) / edges[-1], (BOTTOM - TOP) / max(counts)
    bars = [
        (LEFT + a * across, BOTTOM - n * up, (b - a) * across - 1, n * up, f"{a:,} to below {b:,} tokens: {n:,}")
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
        if n
    ]
    shown = [edges[i * (len(edges) - 1) // 4] for i in range(5)]
    return {
        "name": name,
        "facts": {label: f"{float(found[key]):,.0f}" for key, label in FACTS.items()},
        "bars": bars,
        "value_ticks": [(BOTTOM - n * up, f"{n:,}") for n in sorted({0, max(counts) // 2, max(counts)})],
        "length_ticks": [(LEFT + edge * across, f"{edge:,}") for edge in shown],
    }


def _reasons(file: Path, warnings: list[str]) -> list[dict[str, Any]]:
    """Returns why rows were left out, the most frequent reason first, each with the first row it applies to.

    Numbers in the messages are replaced by dots, so that rows with the same reason are counted together.
    """
    found: Counter[str] = Counter()
    example: dict[str, str] = {}
    for row in whole_rows(file, warnings) if file.is_file() else ():
        name, field = text_of(row, "id"), text_of(row, "field")
        message = text_of(row, "reason").removeprefix(f"row {name}: ")
        reason = (f"{field}: " if field else "") + re.sub(r"\d[\d.,]*", "…", message)
        if reason not in found and len(found) >= 100 * MAX_REASONS:  # memory does not grow with the file
            reason = "other reasons"
        found[reason] += 1
        line = row.value.get("line")
        place = f"{text_of(row, 'file')}:{line}" if line else f"{text_of(row, 'file')}, row {row.value.get('row')}"
        example.setdefault(reason, f"{name or place}: {message}")
    total = sum(found.values())
    top = [{"reason": r, "rows": n, "percent": 100 * n / total, "first": example[r]} for r, n in found.most_common()]
    if len(top) > MAX_REASONS:
        rest = sum(entry["rows"] for entry in top[MAX_REASONS:])
        warnings.append(f"{file}: {len(top) - MAX_REASONS} rarer reasons, of {rest} rows, are not shown.")
    return top[:MAX_REASONS]
