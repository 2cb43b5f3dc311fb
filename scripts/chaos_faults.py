"""The faults of `chaos.py`. Each function does `count` of them, lets the runs go on, and compares what came out with
what an unhurt run gives; it returns rows of the report: fault, done, failures (one line each), notes."""

from __future__ import annotations

import collections
import contextlib
import json
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

from rmr1_jax.preemption import PREEMPTED

STARTING = 4.0  # seconds in which a process loads, restores and compiles, about


def reference(root: Path, stage: str) -> Path:
    """The directory of an uninterrupted run of a stage; made once."""
    out = root / "reference" / stage
    if not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        code = rmr1(command(root, stage, out), root / f"reference-{stage}.log").wait()
        assert code == 0, f"the unhurt run ended with {code}; see {root}/reference-{stage}.log"
        (out / "done").touch()
    return out


def rest(root: Path, stage: str, run: Path, log: Path) -> list[str]:
    """Let a run go on to its end; what is not as in the unhurt one."""
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
    """Returns at a random moment of a phase, or when the process has ended."""
    before = lines(run / "metrics.jsonl")
    seen: Callable[[], Any] = {
        "start": lambda: True,
        "step": lambda: lines(run / "metrics.jsonl") > before,
        "save": lambda: lines(run / "metrics.jsonl") > before and [*(run / "checkpoints").glob("*.saving*")],
        "export": lambda: [*run.glob("*model*")],
        "judging": lambda: lines(run / "verdicts.jsonl") > 0,
    }[phase]
    longest = {"start": STARTING, "step": 0.5, "save": 0.2, "export": 0.05, "judging": 0.5}[phase]
    for _ in pauses(120, 0.001):
        if seen() or not child.alive():
            break
    for _ in pauses(rng.uniform(0, longest), 0.002):
        if not child.alive():
            break


def kills(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """SIGKILL at random moments, about a third of them while a checkpoint is being written."""
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
                break  # it had ended
            row["done"] += 1
            phases[phase] += 1
            row["failures"] += [f"after a kill: {x}" for x in unsound(run)]
        row["notes"]["runs"] += 1
        row["failures"] += rest(root, stage, run, log)
    rows["grpo"]["notes"]["in all, by phase"] = dict(phases)
    return list(rows.values())


def terms(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """SIGTERM in every phase in turn; each process must end with 42, and what goes on from there be the same."""
    rng = random.Random(seed + 1)
    cases = [(s, p) for p in ("step", "save", "start", "export") for s in CONFIGS] + [("judge", "judging")]
    rows: dict[str, dict] = {}
    slowest: collections.Counter = collections.Counter()
    for number in range(count):
        stage, phase = cases[number % len(cases)]
        name = f"SIGTERM, {stage}: {phase}"
        row = rows.setdefault(name, {"fault": name, "done": 0, "failures": [], "notes": {}})
        run, log = work / f"{number}", root / f"terms-{number}.log"
        run.mkdir()
        reference(root, stage)
        child = rmr1(command(root, stage, run), log)
        moment(rng, phase, run, child)
        sent = time.monotonic()
        child.send(signal.SIGTERM)
        code = child.wait()
        slowest[name] = max(slowest[name], round(time.monotonic() - sent, 1))
        row["done"] += 1
        row["notes"] = {"seconds to the end, at most": slowest[name]}
        # Before there is anything to save a process has no handler yet, and after its last save it may just finish.
        allowed = {PREEMPTED} | ({0} if phase == "export" else {-signal.SIGTERM} if phase == "start" else set())
        problems = [] if code in allowed else [f"exit code {code}: {last_error(log)}"]
        problems += unsound(run)
        row["failures"] += (problems + rest(root, stage, run, log))[:1]
        shutil.rmtree(run)
    return list(rows.values())


# ---- files


def damages(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """Checkpoints with a file that was changed, cut, removed or swapped: found by name, and the newest sound one used.
    All in one process that restores for real."""
    source = reference(root, "sft")
    run = work / "run"
    shutil.copytree(source, run)
    log = root / "damages.log"
    report = root / "damages.json"
    child = Child(lambda: _damage_all(run / "checkpoints", root / "model", count, seed, report), log).start()
    code = child.wait(1800)
    if code:
        return [{"fault": "damaged checkpoint", "done": count, "failures": [f"ended with {code}, see {log}"]}]
    return json.loads(report.read_text())


def _damage_all(checkpoints: Path, model: Path, count: int, seed: int, report: Path) -> int:
    import jax
    import numpy as np

    from rmr1_jax.errors import RunError
    from rmr1_jax.policy import load
    from rmr1_jax.train.checkpoint import Checkpointer, steps_of
    from rmr1_jax.train.optim import OptimConfig, init_state, make_optimizer

    rng = random.Random(seed + 2)
    policy = load(model, "float32")
    newest, older = sorted(steps_of(checkpoints))[::-1]
    rows = {kind: {"fault": f"damaged file, {kind}", "done": 0, "failures": []} for kind in DAMAGES}
    with jax.set_mesh(policy.mesh):
        like = init_state(policy.params, make_optimizer(OptimConfig(), 1))
        sound = {}
        for step in (older, newest):
            (work := checkpoints.parent / f"only-{step}").mkdir()
            shutil.copytree(checkpoints / str(step), work / "checkpoints" / str(step))
            sound[step] = Checkpointer(work, keep=2).restore(like)[0]
        for number in range(count):
            kind = list(DAMAGES)[number % len(DAMAGES)]
            row, copy = rows[kind], checkpoints.parent / "copy"
            shutil.copytree(checkpoints, copy / "checkpoints")
            both = rng.random() < 0.1  # then nothing is left to load
            for step in [newest, older] if both else [newest]:
                name = DAMAGES[kind](rng, copy / "checkpoints" / str(step), copy / "checkpoints" / str(older))
            row["done"] += 1
            said: list[str] = []
            try:
                state, _ = _listening(Checkpointer(copy, keep=2), said).restore(like)
                same = jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), state, sound[older]))
                if both or int(state.step) != older or not same:
                    row["failures"].append(f"{number}: {name}: step {int(state.step)} was loaded, the same: {same}")
            except RunError as e:
                said.append(str(e))
                if not both:
                    row["failures"].append(f"{number}: {name}: {e}")
            if not any(f"checkpoint {step} is damaged" in x and name in x for x in said for step in (newest, older)):
                row["failures"].append(f"{number}: {name} was not named: {said}")
            shutil.rmtree(copy)
    report.write_text(json.dumps(list(rows.values())))
    return 0


def _listening(checkpointer: Any, said: list[str]) -> Any:
    """Hears what is said to the user."""
    from rmr1_jax.train import checkpoint

    checkpoint.say = said.append
    return checkpointer


def _any_file(rng: random.Random, directory: Path, least: int = 1) -> Path:
    return rng.choice(sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size >= least))


def _flip(rng: random.Random, directory: Path, _: Path) -> str:
    path = _any_file(rng, directory)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path.name


def _truncate(rng: random.Random, directory: Path, _: Path) -> str:
    path = _any_file(rng, directory)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return path.name


def _remove(rng: random.Random, directory: Path, _: Path) -> str:
    path = _any_file(rng, directory, 0)
    path.unlink()
    return path.name


def _swap(rng: random.Random, directory: Path, _: Path) -> str:
    """Two files of a checkpoint, in each other's place."""
    for _ in range(1000):
        a, b = _any_file(rng, directory), _any_file(rng, directory)
        if a.read_bytes() != b.read_bytes() and "manifest.json" not in (a.name, b.name):
            break
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    return min(str(p.relative_to(directory)) for p in (a, b))


def _stale(rng: random.Random, directory: Path, older: Path) -> str:
    """A file of an older checkpoint in the place of the one of the same name: well-formed, and wrong."""
    both = [p for p in directory.rglob("*") if p.is_file() and (older / p.relative_to(directory)).is_file()]
    differing = sorted(p for p in both if p.read_bytes() != (older / p.relative_to(directory)).read_bytes())
    if not differing:  # it is the older one itself
        return _flip(rng, directory, older)
    path = rng.choice(differing)
    shutil.copy(older / path.relative_to(directory), path)
    return path.name


DAMAGES = {"bit flipped": _flip, "cut off": _truncate, "removed": _remove, "swapped": _swap, "of another step": _stale}


# ---- disks


def disk(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """A file system that is full from a random moment on, with a random rest: exit 1 with path and bytes, what was
    sound stays so, and with room again the run goes on to the same end."""
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
            where["the end, there was room enough" if not code else _place(error)] += 1
            ballast.unlink()
            row["failures"] += (problems + rest(root, stage, run, log))[:1]
            shutil.rmtree(run)
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)
    row["notes"]["stopped at"] = dict(where)
    return [row]


def _fill(mount: Path, ballast: Path, spare: int) -> None:
    """Leave no more than `spare` bytes on a file system that others write to meanwhile."""
    with ballast.open("wb") as file:
        for _ in range(100):
            stat = os.statvfs(mount)
            free = stat.f_bavail * stat.f_frsize
            if free <= spare:
                break
            with contextlib.suppress(OSError):  # somebody was faster
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free - spare)


def _place(error: str) -> str:
    found = re.search(r"/run(?:/(checkpoints/\d+|metrics.jsonl|config.yaml|model))?", error)
    return re.sub(r"\d+", "N", found.group(1) or "directory") if found else "elsewhere"


# ---- two processes


def pairs(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """One of two processes is killed: the other names it and ends in time. One is told to stop: both save, at the same
    step. Both go on from there."""
    rng = random.Random(seed + 4)
    killed = {"fault": "one of two processes killed", "done": 0, "failures": [], "notes": {}}
    told = {"fault": "one of two processes told to stop", "done": 0, "failures": [], "notes": {}}
    whole = work / "whole"
    codes = [p.wait(600) for p in _two(root, whole, work)]
    assert codes == [0, 0], f"the unhurt pair ended with {codes}; see {root}/pair-*.log"
    for number in range(count):
        for row, sent in ((killed, signal.SIGKILL), (told, signal.SIGTERM)):
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
    return [killed, told]


def _two(root: Path, run: Path, work: Path) -> list[Child]:
    """Two processes of one device each."""
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
    """Becomes the command: what JAX does at the exit of several processes takes a real exit."""
    os.execve(sys.executable, [sys.executable, "-m", "rmr1_jax", *arguments], environ)
