"""`gpu_check.py`: the profile of a call, as an archive for XProf or TensorBoard and as a list of what took the time."""

from __future__ import annotations

import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# The profiles that are kept whole, if they are not larger than this; of all others the text remains.
ARCHIVED = ("sft-1.5b-full", "sft-7b_4-full", "decode-0.5b-256x8", "decode-7b-64x1", "grpo-0.5b")
ARCHIVE_BYTES = 12 * 2**20
LISTED = 40  # operations in the text
# Parts of the names of kernels: matrix products by cuBLAS (nvjet) and by XLA, cuDNN's attention, and copies.
KINDS = {"products": ("nvjet", "gemm", "cutlass"), "cudnn": ("cudnn",), "copies": ("memcpy", "memset")}


def profile(out: Path, name: str, call: Callable[[], Any]) -> dict[str, Any]:
    """Profile one call. Appends the operations that took most time to `out/operations.txt`, may keep the profile as
    `out/profile-NAME.tar.gz`, and returns the milliseconds of the call, the share in which a device was busy, and the
    share of each kind of kernel in the time of all."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        facts, text = summary(path)
        with (out / "operations.txt").open("a") as file:
            file.write(f"== {name}: {facts}\n{text}\n\n")
        if name in ARCHIVED:
            target = out / f"profile-{name}.tar.gz"
            with tarfile.open(target, "w:gz") as tar:
                tar.add(path, arcname=f"plugins/profile/{name}/{path.name}")
            if target.stat().st_size > ARCHIVE_BYTES:
                target.unlink()
    return facts


def summary(path: Path) -> tuple[dict[str, float], str]:
    """The busy and total milliseconds of the first device in a profile, and a table of its operations: their total
    time, their number, their kernel, and the operation of the program that it computes."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [p for p in planes if p.name.startswith("/device:GPU")] or [p for p in planes if "CPU" in p.name]
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    spans = []
    for line in devices[0].lines if devices else ():
        if devices[0].name.startswith("/device") and not line.name.startswith("Stream"):
            continue
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" not in stats and not devices[0].name.startswith("/device"):
                continue
            entry = totals[event.name[:60], str(stats.get("hlo_op", ""))[:60]]
            entry[0], entry[1] = entry[0] + event.duration_ns / 1e6, entry[1] + 1
            spans.append((event.start_ns, event.start_ns + event.duration_ns))
    if not spans:
        return {}, f"no operations in {[(p.name, [x.name for x in p.lines]) for p in planes]}"
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
    total = end - min(start for start, _ in spans)
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])
    lines = [f"{ms:10.3f} ms {count:7}x  {name:<60}  {where}" for (name, where), (ms, count) in ranked[:LISTED]]
    facts = {"profile_ms": total / 1e6, "busy": busy / total, "kernels": len(spans)}
    return facts | shares(totals), "\n".join(lines)


def shares(totals: dict[tuple[str, str], list[float]]) -> dict[str, float]:
    """Return the share of each kind of kernel in the time of all of them, by the names that kernels of NVIDIA GPUs
    have."""
    found = dict.fromkeys((*KINDS, "other"), 0.0)
    for (name, _), (ms, _) in totals.items():
        kind = next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")
        found[kind] += ms
    return {kind: ms / sum(found.values()) for kind, ms in found.items()}
