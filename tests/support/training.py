"""Shared by the tests of both training stages: data of the small world, small runs, and a run that kills itself.

As a program, `python training.py STAGE MODEL CONFIG.yaml STEP` runs a stage and dies by SIGKILL when it has written the
metrics of STEP: at this moment the most work is unsaved.
"""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmr1_jax.config import dump_config, load_config
from rmr1_jax.data.examples import sft_example
from rmr1_jax.distributed.mesh import MeshConfig, activation_sharding, single_device_mesh
from rmr1_jax.model.qwen import abstract_params
from rmr1_jax.pairs.pair import render_pair
from rmr1_jax.policy import load
from rmr1_jax.quickstart.world import make_items, oracle_trace, to_pair, world_prompt
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train.config import GrpoConfig, SftConfig
from rmr1_jax.train.grpo import grpo
from rmr1_jax.train.metrics import MetricsLog, read_metrics
from rmr1_jax.train.optim import OptimConfig, compile_update, init_state
from rmr1_jax.train.rollout import RlPrompt
from rmr1_jax.train.sft import sft

EIGHT_DEVICES = (MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(replica=2, fsdp=2, tensor=2))


def is_timing(key: str) -> bool:
    return key.endswith("seconds") or key.startswith("tokens_per_second") or key == "mfu"


small_sft = functools.partial(
    SftConfig,
    row_length=256,
    rows_per_step=2,
    micro_rows=2,
    epochs=50,
    optimizer=OptimConfig(lr=1e-2),
    dtype="float32",
    remat="none",
)
small_grpo = functools.partial(
    GrpoConfig,
    prompts_per_step=4,
    mini_batch_prompts=4,
    max_prompt_length=80,
    row_length=128,
    micro_rows=16,  # all sequences of a step are one micro-batch: one shape, one compilation
    sampling=SamplingConfig(n=4, max_new_tokens=12),
    optimizer=OptimConfig(lr=1e-2, schedule="constant", warmup_ratio=0.0, b2=0.999),
    dtype="float32",
    remat="none",
)


def small_examples(policy, count=12):
    prompt = world_prompt()
    return [
        sft_example(policy.tokenizer, item.id, render_pair(prompt, to_pair(item)), oracle_trace(item))
        for item in make_items(count, split="sft")
    ]


def small_prompts(policy, count=10):
    prompt = world_prompt()
    return [
        RlPrompt(
            item.id, np.asarray(policy.tokenizer.render(render_pair(prompt, to_pair(item))), np.int32), item.better
        )
        for item in make_items(count, split="grpo")
    ]


def vowels(text: str, prompt: RlPrompt) -> float:
    """A reward that random text earns in part: its number of vowels."""
    return float(sum(c in "aeiou" for c in text))


def run(stage: str, config, policy):
    """Run a stage on small data, with held-out data if the config names any."""
    if stage == "sft":
        held_out = small_examples(policy, 15)[12:] if config.eval_data else None
        return sft(config, policy=policy, examples=small_examples(policy), eval_examples=held_out)
    held_out = small_prompts(policy, 13)[10:] if config.eval_data else None
    return grpo(config, policy=policy, prompts=small_prompts(policy), reward=vowels, eval_prompts=held_out)


def run_and_kill(stage: str, model: Path, config, step: int) -> None:
    """Runs a stage in another process, which kills itself when the metrics of `step` are written."""
    path = model / f"{stage}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, __file__, stage, str(model), str(path), str(step)]
    killed = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def metrics_but_timings(directory) -> list[dict]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(directory)]


def assert_same(ours, theirs, atol=0.0):
    """Asserts that two trees of arrays are equal to within `atol`."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


def called(tree):
    """The arrays of a tree of functions."""
    return jax.tree.map(lambda read: read(), tree)


def on_mesh(policy, mesh):
    """The same policy, its weights laid out on another mesh."""
    return dataclasses.replace(policy, mesh=mesh).with_params(to_mesh(policy.model, policy.params, mesh))


def to_mesh(module, params, mesh):
    """Arrays in the layout of training on a mesh."""
    layout = jax.tree.map(lambda w: w.sharding, abstract_params(module, mesh, "float32"))
    return jax.device_put(params, layout)


def plain_step(policy, loss):
    """`step(params, arrays [A, B, T], count) -> (params less their gradient, metrics)` on the policy's mesh.

    The update is plain gradient descent, so that weights differ as gradients do (Adam would amplify rounding errors of
    gradients that are zero).
    """
    optimizer = optax.sgd(1.0)
    programs = []

    def step(params, arrays, count):
        with jax.set_mesh(policy.mesh):
            state = init_state(jax.tree.map(jnp.array, params), optimizer)
            if not programs:
                programs.append(compile_update(state, loss=loss, optimizer=optimizer, clip=1e9))
            arrays = {k: jax.device_put(v, activation_sharding(policy.mesh, "ABT", v.shape)) for k, v in arrays.items()}
            state, metrics = programs[0](state, [(arrays, count)])
        return state.params, metrics

    return step


def _run_and_die(stage: str, model: str, config: str, step: str) -> None:
    write = MetricsLog.write

    def write_and_die(self, metrics):
        write(self, metrics)
        if metrics["step"] == int(step):
            while not all(p.name.isdigit() for p in self.path.parent.glob("checkpoints/*")):
                time.sleep(0.01)  # a save is in progress
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsLog.write = write_and_die
    run(
        stage,
        load_config({"sft": SftConfig, "grpo": GrpoConfig}[stage], config),
        load(model, "float32", single_device_mesh()),
    )


if __name__ == "__main__":
    _run_and_die(*sys.argv[1:])
