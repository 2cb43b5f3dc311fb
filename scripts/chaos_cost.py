"""Measures the cost of checkpoints: the quickstart's SFT step with a save every 50 steps, and without."""

from __future__ import annotations

import functools
import json
import statistics
import time
from pathlib import Path

from chaos_world import Child

STEPS = 50  # steps between saves
MOST = 0.03  # the highest acceptable share of the step time


def cost(root: Path, work: Path, count: int, seed: int) -> list[dict]:
    """Runs `count` stretches of 50 steps that begin with a save, alternating with as many without; returns medians."""
    report = work / "cost.json"
    code = Child(lambda: _measure(work, count, seed, report), root / "cost.log").start().wait(3600)
    row = {"fault": "none: a save every 50 steps", "done": count, "failures": [], "notes": {}}
    if code:
        return [row | {"failures": [f"ended with {code}, see {root}/cost.log"]}]
    row["notes"] = json.loads(report.read_text())
    if row["notes"]["more wall time"] > MOST:
        row["failures"] = [f"more than {MOST:.0%} (on a busy machine, measure again)"]
    return [row]


def _measure(work: Path, count: int, seed: int, report: Path) -> int:
    import jax

    from rmr1_jax.data.packing import sft_batches
    from rmr1_jax.model.qwen import split
    from rmr1_jax.policy import fresh_policy
    from rmr1_jax.quickstart import world
    from rmr1_jax.quickstart.quickstart import MODEL, SFT, sft_examples
    from rmr1_jax.quickstart.tokenizer import train_tokenizer
    from rmr1_jax.train.checkpoint import Checkpointer
    from rmr1_jax.train.logprobs import forward_options
    from rmr1_jax.train.micro_batches import to_micro_batches
    from rmr1_jax.train.optim import compile_update, init_state, make_optimizer, master_weights
    from rmr1_jax.train.sft import sft_micro_loss

    policy = fresh_policy(MODEL, train_tokenizer(world.world_texts(seed=0), work / "tokenizer"), seed=seed)
    examples = sft_examples(policy, world.make_items(3000, split="sft", seed=seed), seed)
    shape = {"row_length": SFT.row_length, "batch_rows": SFT.rows_per_step}
    batches, total = sft_batches(examples, **shape, epochs=1000, seed=seed)
    wall: dict[bool, list[float]] = {False: [], True: []}
    busy: dict[bool, list[float]] = {False: [], True: []}
    kept = []
    with jax.set_mesh(policy.mesh), Checkpointer(work, keep=SFT.keep) as checkpoints:
        optimizer = make_optimizer(SFT.optimizer, total)
        state = init_state(master_weights(policy.params, keep=True), optimizer)
        loss = functools.partial(
            sft_micro_loss, split(policy.model)[0], **forward_options(SFT, policy.config, policy.mesh)
        )
        step = compile_update(state, loss=loss, optimizer=optimizer, clip=SFT.optimizer.clip)
        for stretch in range(-2, 2 * count):
            saves, began, used = bool(stretch % 2), time.perf_counter(), time.process_time()
            seconds = checkpoints.save(state, {}) if saves else 0.0
            for _ in range(STEPS):
                stacks, _ = to_micro_batches(next(batches), SFT.micro_rows, policy.mesh)
                state, metrics = step(state, stacks)
                jax.device_get(metrics)
                checkpoints.check()
            checkpoints.finish()
            if stretch >= 0:  # the first stretches compile
                wall[saves].append(time.perf_counter() - began)
                busy[saves].append(time.process_time() - used)
                kept += [seconds] if saves else []
    middle = statistics.median
    found = {
        "ms a step without": round(1e3 * middle(wall[False]) / STEPS, 2),
        "ms a step with": round(1e3 * middle(wall[True]) / STEPS, 2),
        "more wall time": round(middle(wall[True]) / middle(wall[False]) - 1, 4),
        "more processor time": round(middle(busy[True]) / middle(busy[False]) - 1, 4),
        "ms that a save blocked the step": round(1e3 * middle(kept), 1),
    }
    report.write_text(json.dumps(found))
    return 0
