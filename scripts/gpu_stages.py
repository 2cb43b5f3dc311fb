"""`gpu_check.py`: the updates of a GRPO step at the shapes of real models, and the quickstart's two stages."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from gpu_speed import Rows, peak_gib, shape
from gpu_trace import profile

from rmr1_jax.data.packing import mean_length
from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import Qwen, init_params, with_params
from rmr1_jax.policy import Policy, fresh_policy
from rmr1_jax.quickstart import quickstart, world
from rmr1_jax.quickstart.tokenizer import train_tokenizer
from rmr1_jax.sampler.sample import Sample, SamplingConfig
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.grpo import _Trainer
from rmr1_jax.train.grpo import grpo as run_grpo
from rmr1_jax.train.losses import policy_loss
from rmr1_jax.train.metrics import forward_flops, mfu, read_metrics, train_flops
from rmr1_jax.train.optim import init_state, make_optimizer
from rmr1_jax.train.rollout import Group, RlPrompt
from rmr1_jax.train.sft import sft as run_sft


def grpo(case: str, *, out: Path, tiny: bool) -> Rows:
    """The two updates of a GRPO step, in rows of 12,288. A prompt has about 1,150 tokens, and seven responses of about
    700."""
    model, mesh = shape(case, tiny), single_device_mesh()
    sizes = {"row_length": 128, "max_prompt_length": 64, "sampling": SamplingConfig(n=4, max_new_tokens=64)}
    config = GrpoConfig(
        out="unused", prompts_per_step=16, mini_batch_prompts=8, micro_rows=1, **(sizes if tiny else {})
    )
    groups = random_groups(config, model, *((20, 20) if tiny else (1151, 700)))
    with jax.set_mesh(mesh):
        params = init_params(Qwen(model), jax.random.key(0), mesh=mesh)
        policy = Policy(with_params(Qwen(model), params), None, mesh)
        optimizer = make_optimizer(config.optimizer, 100)
        state = init_state(params, optimizer)
        trainer = _Trainer(config, policy, policy_loss, optimizer, state, mean_length([g.prompt for g in groups]))
        del params, policy
        seconds: dict[str, list[float]] = {"logprobs": [], "updates": []}
        for step in range(2):  # the first compiles
            start = time.perf_counter()
            batches = trainer.prepare(groups, state.params)
            updates = [(batch.lengths, batch.starts) for _, batch in batches]
            middle = time.perf_counter()
            state, row, _ = trainer.update(state, batches, step)
            seconds["logprobs"].append(middle - start)
            seconds["updates"].append(time.perf_counter() - middle)
        batches = trainer.prepare(groups[: config.mini_batch_prompts], state.params)
        traced = profile(out, f"grpo-{case}", lambda: trainer.update(state, batches, 2)[1])
    (first, preparing), (compiled, updating) = seconds["logprobs"], seconds["updates"]
    passes = [*updates, *updates[1:]]  # of the reference, and of the old policy for all updates but the first
    flops = sum(forward_flops(model, *each) for each in passes)
    yield {
        "name": f"{case} 1x{config.row_length}, {len(groups)} groups",
        "ok": bool(np.isfinite(row["loss"])),
        "tokens_s": sum(sum(lengths) for lengths, _ in updates) / updating,
        "mfu": mfu(sum(train_flops(model, *each) for each in updates), updating, mesh).get("mfu"),
        "updates_s": updating,
        "logprobs_tokens_s": sum(sum(lengths) for lengths, _ in passes) / preparing,
        "logprobs_mfu": mfu(flops, preparing, mesh).get("mfu"),
        "packed": row["packed"],
        "compile_s": first - preparing + compiled - updating,
        "peak_gib": peak_gib(),
        **traced,
    }


def random_groups(config: GrpoConfig, model: QwenConfig, prompt_length: int, length: int) -> list[Group]:
    """Groups of random samples with mixed rewards."""
    rng, groups = np.random.default_rng(0), []
    for number in range(config.prompts_per_step):
        tokens = rng.integers(0, model.vocab_size, max(2, int(prompt_length * rng.uniform(0.7, 1.3)))).astype(np.int32)
        samples = []
        for n in np.clip(length * rng.lognormal(-0.06, 0.357, config.sampling.n), 1, config.sampling.max_new_tokens):
            logp = np.full(int(n), -11.0, np.float32)
            samples.append(Sample(rng.integers(0, model.vocab_size, int(n)).tolist(), logp, logp, "stop"))
        rewards = np.where(np.arange(len(samples)) % 2, 1.0, -1.0).astype(np.float32)
        prompt = RlPrompt(str(number), tokens, "A")
        groups.append(Group(prompt, samples, [""] * len(samples), rewards, rewards - rewards.mean()))
    return groups


def small_world(case: str, *, out: Path, tiny: bool) -> Rows:
    """The quickstart's two stages, with fewer steps: its model of a million parameters, float32."""
    steps, rl_steps = (4, 1) if tiny else (200, 4)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        train_tokenizer(world.world_texts(seed=0), where / "tokenizer")
        policy = fresh_policy(quickstart.MODEL, where / "tokenizer", seed=0)
        examples = quickstart.sft_examples(policy, world.make_items(17 * steps, split="sft", seed=0), 0)
        prompts = quickstart.rl_prompts(policy, world.make_items(200, split="grpo", seed=0))
        start = time.perf_counter()
        config = dataclasses.replace(quickstart.SFT, out=f"{where}/sft", max_steps=steps)
        policy = run_sft(config, policy=policy, examples=examples)
        rows = read_metrics(where / "sft")
        median = {k: float(np.median([row[k] for row in rows[len(rows) // 4 :]])) for k in ("seconds", "tokens")}
        yield {
            "name": f"SFT, {steps} steps",
            "ok": rows[-1]["loss"] < rows[0]["loss"],
            "tokens_s": median["tokens"] / median["seconds"],
            "ms": 1e3 * median["seconds"],
            "whole_s": time.perf_counter() - start,
            "loss": rows[-1]["loss"],
        }
        start = time.perf_counter()
        config = dataclasses.replace(quickstart.GRPO, out=f"{where}/grpo", steps=rl_steps)
        if tiny:
            config = dataclasses.replace(config, prompts_per_step=4, mini_batch_prompts=4)
        run_grpo(config, policy=policy, prompts=prompts)
        rows = read_metrics(where / "grpo")
        shown = {k: rows[-1][k] for k in ("rollout_seconds", "update_seconds", "seconds")}
        whole = time.perf_counter() - start
        yield {
            "name": f"GRPO, {rl_steps} steps",
            "ok": True,
            **shown,
            "first_step_s": rows[0]["seconds"],
            "whole_s": whole,
        }


PARTS = {"grpo": grpo, "quickstart": small_world}
