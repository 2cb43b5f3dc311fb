"""Real faults against training, with a report: whatever kills a run, what comes after is what would have been.

scripts/chaos --kills 100 --terms 40 --damages 200 --disk 20 --pairs 2 --cost 20 --out runs/chaos

Leaves OUT/chaos.json, the logs of all processes, and prints a table; exits with 1 where anything did not hold. A disk
is filled up in a small tmpfs, which takes root (or `unshare -rm`); without it these faults are skipped, and it says so.
Next: `chaos_faults.py` and `chaos_damage.py`, the faults; `chaos_world.py`, the runs.
"""

from __future__ import annotations

import os

# Before JAX is imported. Programs are small: compiling them is most of the time, and at level 0 it takes half as long.
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
    """Do the faults, and report.

    Args:
        kills: SIGKILLs at random moments of SFT and GRPO runs.
        terms: SIGTERMs spread over the phases.
        damages: of checkpoint files.
        disk: times that the disk is full.
        pairs: times that one of two processes is killed, and that one is told to stop.
        cost: stretches of 50 steps to measure what saving costs.
        seed: of the moments.
        out: the directory to work in; what is there is removed.
    """
    out = out.absolute()
    if (out / "chaos.json").exists() or not out.exists():
        shutil.rmtree(out, ignore_errors=True)
    elif any(out.iterdir()):
        print(f"error: {out} holds something that is not of this command; give another --out", file=sys.stderr)
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
    print(f"\n{'fault':<42}{'done':>6}{'held':>6}  {'seconds':>8}  what else")
    print("\n".join(line(result) for result in found))
    return int(any(result["failures"] for result in found))


def line(result: dict) -> str:
    held = result["done"] - len(result["failures"])
    said = "; ".join([*result["failures"][:3], *(f"{k} {v}" for k, v in result.get("notes", {}).items())])
    return f"{result['fault']:<42}{result['done']:>6}{held:>6}  {result['seconds']:>8}  {said}"


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
