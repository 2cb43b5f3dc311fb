"""Checks and measures the package on one GPU without a network, in eight minutes or as many as `--minutes` says.

    python scripts/gpu_check.py                       everything, in the order of CASES
    python scripts/gpu_check.py --minutes 11          the last cases too
    python scripts/gpu_check.py --only attention sft  some parts
    python scripts/gpu_check.py --tiny                tiny shapes, on any device: does the script itself run?

Each case runs in a process of its own with a time limit, so that a failure loses one case and the next finds the GPU's
memory free. Writes `gpu_check.json`, `table.md` and profiles to `--out`, and prints each row. Read next:
`gpu_parity.py`, `gpu_attention.py`, `gpu_speed.py`, `gpu_stages.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_table import line, markdown

ROOT = Path(__file__).resolve().parents[1]
LAST = 15  # seconds that must be left for another case to start


class Case(NamedTuple):
    """One process. limit: the most seconds that it may take."""

    part: str
    name: str
    limit: int


# First what the last run on a GPU had no time for, then the rest by importance. All of it takes some eleven minutes.
CASES = (
    Case("versions", "all", 60),
    Case("attention", "14,2,64", 60),
    Case("attention", "40,8,128", 70),
    Case("model", "greedy", 80),
    Case("decode", "7b,256,8", 80),
    Case("sft", "7b/4,dots", 60),
    Case("grpo", "1.5b", 80),
    Case("sft", "0.5b,dots", 60),
    Case("decode", "0.5b,64", 60),
    Case("decode", "7b,64", 90),
    Case("sft", "7b/4", 60),
    Case("sft", "1.5b,dots", 60),
    Case("sft", "1.5b", 60),
    Case("attention", "28,4,128", 80),
    Case("sft", "0.5b", 60),
    Case("decode", "1.5b,64", 70),
    Case("grpo", "0.5b", 70),
    Case("decode", "0.5b,256,8", 60),
    Case("model", "loss", 80),
    Case("quickstart", "all", 90),
)


def chosen(only: Sequence[str]) -> list[Case]:
    """The cases to run: those of the given parts, or of the given `part:case`."""
    return [case for case in CASES if not only or {case.part, f"{case.part}:{case.name}"} & set(only)]


def run_cases(cases: Sequence[Case], out: Path, *, minutes: float, tiny: bool) -> Iterator[dict[str, Any]]:
    """Run each case in a process; yields its rows, and one with `error` for what failed or was left out."""
    end = time.monotonic() + 60 * minutes
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}
    for part, name, limit in cases:
        left, where = end - time.monotonic(), {"part": part, "case": name}
        if left < LAST:
            yield where | {"error": f"left out: the {minutes:g} minutes are over"}
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            rows.touch()
            command = [sys.executable, __file__, "--child", f"{part}:{name}", "--rows", rows, "--out", out]
            with (out / "log.txt").open("ab") as log:
                process = subprocess.Popen(
                    [*map(str, command), *(["--tiny"] if tiny else [])],
                    env=environment | os.environ, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
                try:
                    code = process.wait(min(limit, left))
                    error = "" if code == 0 else f"exit code {code}: {_last_words(out / 'log.txt')}"
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    error = f"stopped after {min(limit, left):.0f} s"
            found = [where | json.loads(line) for line in rows.read_text().splitlines()]
        seconds = round(time.monotonic() - began, 1)
        yield from (row | {"process_seconds": seconds} for row in found)
        if error or not found:
            yield where | {"error": error or "no result", "process_seconds": seconds}


def _last_words(log: Path) -> str:
    """The last line of the log that says something."""
    lines = log.read_text(errors="replace")[-4000:].splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")


def child(case: str, out: Path, rows: Path, *, tiny: bool) -> None:
    """Run one case here, and append each row as soon as it is measured, with the seconds until then as `at_s`."""
    began = time.monotonic()
    import gpu_attention
    import gpu_parity
    import gpu_speed
    import gpu_stages

    part, _, name = case.partition(":")
    measures = gpu_attention.PARTS | gpu_parity.PARTS | gpu_speed.PARTS | gpu_stages.PARTS
    for row in measures[part](name, out=out, tiny=tiny):
        row["at_s"] = round(time.monotonic() - began, 1)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(case, row, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a case failed, and 2 for an unknown part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts, or single cases as PART:CASE")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="directory for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop, whatever is left")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
    given.out.mkdir(parents=True, exist_ok=True)
    if given.child:
        child(given.child, given.out, given.rows, tiny=given.tiny)
        return 0
    known = {name for part, case, _ in CASES for name in (part, f"{part}:{case}")}
    if unknown := set(given.only) - known:
        print(f"error: --only {' '.join(sorted(unknown))} is unknown; give some of {', '.join(sorted(known))}")
        return 2
    rows = []
    for row in run_cases(chosen(given.only), given.out, minutes=given.minutes, tiny=given.tiny):
        rows.append(row)
        print(line(row), flush=True)
        (given.out / "gpu_check.json").write_text(json.dumps(rows, indent=1) + "\n")
    (given.out / "table.md").write_text(markdown(rows) + "\n")
    return 1 if any("error" in row or row.get("ok") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
