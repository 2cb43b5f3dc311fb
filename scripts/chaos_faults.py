"""The faults of `chaos.py`. Each function injects `count` faults, resumes the runs, and compares the results with those
of an uninterrupted run. It returns rows of the report: fault, done, failures (one line each), notes."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos_world import CONFIGS, Child, command, differences, lines, pauses, rmr1, unsound

from rmr1_jax.distributed.preemption import PREEMPTED

STARTING = 4.0  # approximate seconds in which a process loads, restores and compiles


def reference(root: Path, stage: str) -> Path:
    """Returns the directory of an uninterrupted run of a stage, which is made once."""
    out = root / "reference" / stage
    if not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        code = rmr1(command(root, stage, out), root / f"reference-{stage}.log").wait()
        assert code == 0, f"the uninterrupted run ended with {code}; see {root}/reference-{stage}.log"
        (out / "done").touch()
    return out


def resume(root: Path, stage: str, run: Path, log: Path) -> list[str]:
    """Resumes a run until it ends; returns its differences from the uninterrupted one."""
    code = rmr1(command(root, stage, run), log).wait()
    if code:
        return [f"ended with {code}: {last_error(log)}"]
    if stage == "judge":
        return [] if judged(run) == judged(reference(root, stage)) else ["other verdicts"]
    return differences(run, reference(root, stage))


def judged(run: Path) -> list[bytes]:
    return sorted((run / "verdicts.jsonl").read_bytes().splitlines())


def last_error(log: Path) -> str:
    errors = [x for x in log.read_text(errors="replace").splitlines() if x.startswith("error: ")]
    return errors[-1] if errors else "no message"


# ---- moments


def moment(rng: random.Random, phase: str, run: Path, child: Child) -> None:
    """Waits for a random moment of a phase, or until the process has ended."""
    before = lines(run / "metrics.jsonl")
    seen: Callable[[], Any] = {
        "start": lambda: True,
        "step": lambda: lines(run / "metrics.jsonl") > before,
        "save": lambda: lines(run / "metrics.jsonl") > before and [*(run / "checkpoints").glob("*.saving*")],
        "export": lambda: [*run.glob("*model*")],
        "judging": lambda: lines(run / "verdicts.jsonl") > 0,
    }[phase]
    longest = {"start": STARTING, "step": 0.5, "save": 0.2, "export": 0.05, "judging": 0.05}[phase]
    for _ in pauses(120, 0.001):
        if seen() or not child.alive():
            break
    for _ in pauses(rng.uniform(0, longest), 0.002):
        if not child.alive():
            break


def kills(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """Sends SIGKILL at random moments, about a third of them while a checkpoint is written."""
    rng = random.Random(seed)
    rows = {s: {"fault": f"SIGKILL, {s}", "done": 0, "failures": [], "notes": {"runs": 0}} for s in CONFIGS}
    phases: collections.Counter = collections.Counter()
    number = 0
    while sum(row["done"] for row in rows.values()) < count:
        stage, run = list(CONFIGS)[number % 2], work / f"{number}"
        number += 1
        row, log = rows[stage], root / f"kills-{number}.log"
        reference(root, stage)
        for _ in range(min(10, count - sum(r["done"] for r in rows.values()))):
            child = rmr1(command(root, stage, run), log)
            phase = rng.choices(("start", "step", "save", "export"), (2, 4, 4, 1))[0]
            moment(rng, phase, run, child)
            child.send(signal.SIGKILL)
            if child.wait() == 0:
                break  # it had finished before the signal
            row["done"] += 1
            phases[phase] += 1
            row["failures"] += [f"after a kill: {x}" for x in unsound(run)]
        row["notes"]["runs"] += 1
        row["failures"] += resume(root, stage, run, log)
    rows["grpo"]["notes"]["in all, by phase"] = dict(phases)
    return list(rows.values())


def terms(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """Sends SIGTERM in every phase in turn; each process must exit with 42, and the resumed run must be the same."""
    rng = random.Random(seed + 1)
    cases = [(s, p) for p in ("step", "save", "start", "export") for s in CONFIGS] + [("judge", "judging")]
    rows: dict[str, dict] = {}
    slowest: collections.Counter = collections.Counter()
    number = done = 0
    while done < count:
        stage, phase = cases[done % len(cases)]
        number += 1
        name = f"SIGTERM, {stage}: {phase}"
        row = rows.setdefault(name, {"fault": name, "done": 0, "failures": [], "notes": {}})
        run, log = work / f"{number}", root / f"terms-{number}.log"
        run.mkdir()
        reference(root, stage)
        child = rmr1(command(root, stage, run), log)
        moment(rng, phase, run, child)
        if not child.alive() and child.wait() == 0:
            continue  # it had finished before the signal
        done += 1
        sent = time.monotonic()
        child.send(signal.SIGTERM)
        code = child.wait()
        slowest[name] = max(slowest[name], round(time.monotonic() - sent, 1))
        row["done"] += 1
        row["notes"] = {"seconds to the end, at most": slowest[name]}
        # A process has no handler before there is anything to save, and may finish normally after its last save.
        allowed = {PREEMPTED} | ({0} if phase == "export" else {-signal.SIGTERM} if phase == "start" else set())
        problems = [] if code in allowed else [f"exit code {code}: {last_error(log)}"]
        problems += unsound(run)
        row["failures"] += (problems + resume(root, stage, run, log))[:1]
        shutil.rmtree(run)
    return list(rows.values())


# ---- disks


def disk(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """Fills the disk at a random moment, up to a random number of bytes.

    The run must exit with 1 and name the path and the free bytes, keep its checkpoints intact, and resume to the same
    result when there is space again.
    """
    row = {"fault": "disk full", "done": 0, "failures": [], "notes": {"stopped at": {}}}
    rng, mount = random.Random(seed + 3), work / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", mount], capture_output=True, text=True)
    if mounted.returncode:
        return [row | {"notes": {"skipped": f"no tmpfs can be mounted here ({mounted.stderr.strip()})"}}]
    where: collections.Counter = collections.Counter()
    try:
        for number in range(count):
            stage = list(CONFIGS)[number % 2]
            run, log, ballast = mount / "run", root / f"disk-{number}.log", mount / "ballast"
            row["done"] += 1
            reference(root, stage)
            child = rmr1(command(root, stage, run), log)
            moment(rng, rng.choice(("start", "step", "step", "save", "export")), run, child)
            _fill(mount, ballast, spare=int(rng.choice((0, 4096, 65536, 1 << 20)) * rng.random()))
            code = child.wait()
            problems = unsound(run) if code else []
            error = last_error(log)
            if code not in (0, 1) or (code and not re.search(r"/\S+ .*bytes free", error)):
                problems.append(f"{number}: exit code {code}: {error}")
            where["the end: there was space enough" if not code else _place(error)] += 1
            ballast.unlink()
            row["failures"] += (problems + resume(root, stage, run, log))[:1]
            shutil.rmtree(run)
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)
    row["notes"]["stopped at"] = dict(where)
    return [row]


def _fill(mount: Path, ballast: Path, spare: int) -> None:
    """Fills a file system that others write to, until at most `spare` bytes are free."""
    with ballast.open("wb") as file:
        for _ in range(100):
            stat = os.statvfs(mount)
            free = stat.f_bavail * stat.f_frsize
            if free <= spare:
                break
            with contextlib.suppress(OSError):  # another process took the space first
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free - spare)


def _place(error: str) -> str:
    found = re.search(r"/run(?:/(checkpoints/\d+|metrics.jsonl|config.yaml|model))?", error)
    return re.sub(r"\d+", "N", found.group(1) or "directory") if found else "elsewhere"


# ---- two processes


def pairs(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """Stops one of two processes, by SIGKILL and by SIGTERM.

    After SIGKILL the other process must name the lost one and exit in time; after SIGTERM both must save at the same
    step. Both runs must resume to the same result.
    """
    rng = random.Random(seed + 4)
    killed = {"fault": "one of two processes killed", "done": 0, "failures": [], "notes": {}}
    terminated = {"fault": "SIGTERM to one of two processes", "done": 0, "failures": [], "notes": {}}
    whole = work / "whole"
    codes = [p.wait(600) for p in _two(root, whole, work)]
    assert codes == [0, 0], f"the uninterrupted pair ended with {codes}; see {root}/pair-*.log"
    for number in range(count):
        for row, sent in ((killed, signal.SIGKILL), (terminated, signal.SIGTERM)):
            run, victim = work / f"{row['fault'].replace(' ', '-')}-{number}", (number + 1) % 2
            both = _two(root, run, work)
            moment(rng, "step", run, both[victim])
            began = time.monotonic()
            both[victim].send(sent)
            other = both[1 - victim].wait(120)
            code = both[victim].wait(120)
            seconds = round(time.monotonic() - began, 1)
            row["done"] += 1
            row["notes"]["seconds to the end"] = max(seconds, row["notes"].get("seconds to the end", 0))
            said = both[1 - victim].log.read_text(errors="replace")
            if sent == signal.SIGKILL:
                problems = [] if other > 127 or other in (PREEMPTED, -6) else [f"the other ended with {other}"]
                named = f"process {victim} of 2" in said or (victim == 0 and "the leader task was preempted" in said)
                problems += [] if named else ["the other did not name it"]
                row["notes"]["exit code of the other"] = other
            else:
                problems = [] if code == other == PREEMPTED else [f"they ended with {code} and {other}"]
            problems += unsound(run)
            codes = [p.wait(600) for p in _two(root, run, work)]
            problems += [] if codes == [0, 0] else [f"the next start ended with {codes}"]
            problems += differences(run, whole) if codes == [0, 0] else []
            row["failures"] += problems[:1]
    return [killed, terminated]


def _two(root: Path, run: Path, work: Path) -> list[Child]:
    """Starts the two processes of a run, with one device each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = command(root, "sft", run, mesh={"fsdp": 2}, rows_per_step=4, max_steps=24)
    children = []
    for index in (0, 1):
        place = {"RMR1_COORDINATOR": f"127.0.0.1:{port}", "RMR1_PROCESSES": "2", "RMR1_PROCESS": str(index)}
        environ = os.environ | place | {"RMR1_LOST_TIMEOUT": "5"}
        children.append(
            Child(
                lambda environ=environ: subprocess_main(arguments, environ),
                root / f"pair-{run.name}-{index}.log",
            ).start()
        )
    return children


def subprocess_main(arguments: list[str], environ: dict[str, str]) -> int:
    """Replaces this process by the command: JAX ends a run of several processes only in a real exit."""
    os.execve(sys.executable, [sys.executable, "-m", "rmr1_jax", *arguments], environ)
