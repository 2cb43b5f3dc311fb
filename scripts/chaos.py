"""Injects real faults into runs of `rmr1`, resumes them, and compares the results with those of uninterrupted runs.

scripts/chaos --kills 100 --terms 40 --damages 200 --disk 20 --pairs 2 --cost 20 --out runs/chaos

Writes OUT/chaos.json and the logs of all processes, and prints a table; exits with 1 if any run differed. The faults of
a full disk use a small tmpfs, which requires root (or `unshare -rm`); without it they are skipped, and the table says
so. Read next: `chaos_faults.py` and `chaos_damage.py`, the faults; `chaos_world.py`, the runs.
"""

from __future__ import annotations

import os

# Set before JAX is imported. The programs are small: most of the time is compilation, and level 0 halves it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tyro


def main(
    kills: int = 100,
    terms: int = 40,
    damages: int = 200,
    disk: int = 20,
    pairs: int = 2,
    cost: int = 20,
    seed: int = 0,
    out: Path = Path("runs/chaos"),
) -> int:
    """Inject faults into training runs, resume them, and compare the results with those of uninterrupted runs.

    Args:
        kills: Number of SIGKILLs, at random moments of SFT and GRPO runs.
        terms: Number of SIGTERMs, spread over the phases of a run.
        damages: Number of damaged checkpoint files.
        disk: Number of full disks.
        pairs: Number of runs of two processes in which one is killed, and in which one receives SIGTERM.
        cost: Number of stretches of 50 steps to measure the cost of saving with.
        seed: Seed of the moments and of the damage.
        out: Directory to write. An earlier result in it is removed.
    """
    out = out.absolute()
    if (out / "chaos.json").exists() or not out.exists():
        shutil.rmtree(out, ignore_errors=True)
    elif any(out.iterdir()):
        print(f"error: {out} holds files that this command did not write; give another --out", file=sys.stderr)
        return 2
    out.mkdir(parents=True)
    (out / "chaos.json").write_text("[]\n")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    import chaos_cost
    import chaos_damage
    import chaos_faults
    from chaos_world import Child, make_world

    assert Child(lambda: make_world(out), out / "world.log").start().wait() == 0, f"see {out}/world.log"
    found = []
    counts = {"kills": kills, "terms": terms, "damages": damages, "disk": disk, "pairs": pairs, "cost": cost}
    for name, count in counts.items():
        if not count:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=out) as work:
            module = {"cost": chaos_cost, "damages": chaos_damage}.get(name, chaos_faults)
            results = getattr(module, name)(out, Path(work), count, seed)
        for result in results:
            found.append(result | {"seconds": round(time.monotonic() - began, 1)})
            print(line(found[-1]), flush=True)
        (out / "chaos.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{'fault':<42}{'done':>6}{'held':>6}  {'seconds':>8}  notes")
    print("\n".join(line(result) for result in found))
    return int(any(result["failures"] for result in found))


def line(result: dict) -> str:
    held = result["done"] - len(result["failures"])
    said = "; ".join([*result["failures"][:3], *(f"{k} {v}" for k, v in result.get("notes", {}).items())])
    return f"{result['fault']:<42}{result['done']:>6}{held:>6}  {result['seconds']:>8}  {said}"


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
