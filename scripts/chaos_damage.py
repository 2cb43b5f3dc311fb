"""Damaged checkpoints, for `chaos.py`: each must be reported by name, and the newest intact one must be used."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from chaos_faults import reference
from chaos_world import Child


def damages(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """Changes, truncates, removes or exchanges files of checkpoints; all restores happen in one process."""
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
            both = rng.random() < 0.1  # no checkpoint is left to load
            for step in [newest, older] if both else [newest]:
                name = DAMAGES[kind](rng, copy / "checkpoints" / str(step), copy / "checkpoints" / str(older))
            row["done"] += 1
            said: list[str] = []
            try:
                state, _ = _recording(Checkpointer(copy, keep=2), said).restore(like)
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


def _recording(checkpointer: Any, said: list[str]) -> Any:
    """Appends the messages to the user to `said`."""
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
    """Exchanges two files of a checkpoint."""
    for _ in range(1000):
        a, b = _any_file(rng, directory), _any_file(rng, directory)
        if a.read_bytes() != b.read_bytes() and "manifest.json" not in (a.name, b.name):
            break
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    return min(str(p.relative_to(directory)) for p in (a, b))


def _stale(rng: random.Random, directory: Path, older: Path) -> str:
    """Replaces a file by the one of the same name in an older checkpoint: well-formed, but wrong."""
    both = [p for p in directory.rglob("*") if p.is_file() and (older / p.relative_to(directory)).is_file()]
    differing = sorted(p for p in both if p.read_bytes() != (older / p.relative_to(directory)).read_bytes())
    if not differing:  # the directory is the older checkpoint itself
        return _flip(rng, directory, older)
    path = rng.choice(differing)
    shutil.copy(older / path.relative_to(directory), path)
    return path.name


DAMAGES = {"bit flipped": _flip, "cut off": _truncate, "removed": _remove, "swapped": _swap, "of another step": _stale}
