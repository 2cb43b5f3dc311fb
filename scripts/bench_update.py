"""`bench.py update`: one GRPO update (forward, backward, AdamW) on given groups, compared with peers.

All systems get the same random weights in float32 and the same groups: prompts, responses, advantages, and the
log-probabilities of the old policy. The loss is the clipped surrogate, a mean over each sequence and then over the
sequences, without a KL term. A system's speed is its number of distinct tokens a second: those of each prompt once, and
those of its responses, however often it computes them. The losses of all systems must agree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bench_alternation import Alternated, CompiledUpdate
from bench_common import Range, model_config, say
from tyro.conf import UseAppendAction

from rmr1_jax.errors import InputError, RunError

LEARNING_RATE = 1e-4
PAD = 0  # occurs in no sequence, because tunix takes every token with this id for padding
TOLERANCE = 1e-5  # largest difference of two systems' losses at the same weights; a loss is about -0.08
UNSHARED = "unshared"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoUpdate(Alternated):
    """Measure the distinct tokens per second of a GRPO update."""

    seed: int = 8
    """Seed of the weights and of the workload. Of the first thousand it is the one whose lengths come nearest to those
    that the speeds were asked for: 18,101 distinct tokens, 81,312 when padded."""
    peer: UseAppendAction[tuple[Literal["hf", "tunix", "none"], ...]] = ()
    """Compare with Transformers, as TRL trains (hf), tunix or none. May be given twice. Defaults to both."""
    groups: int = 8
    """Number of prompts (P)."""
    group: int = 7
    """Responses of each prompt (R)."""
    prompt_length: Range = (448, 512)
    """Range that the lengths of the prompts are drawn from, in tokens."""
    response_length: Range = (16, 1024)
    """Range that the lengths of the responses are drawn from, in tokens."""
    median: float = 260.0
    """Median of the lognormal distribution that the lengths of the responses are drawn from."""
    sigma: float = 0.8
    """Standard deviation of the logarithm of that distribution."""
    runs: int = 3
    """Updates of each system, made in alternation; the result is their median."""
    row_length: int = 2304
    """Length of our packed rows, with and without shared prompts."""
    micro_rows: int = 1
    """Number of our rows in a micro-batch."""
    remat: Literal["none", "dots", "full"] = "dots"
    """Rematerialization in our backward pass."""
    hf_rows: int = 4
    """Samples in a micro-batch of Transformers, which keeps all activations."""
    tunix_remat: Literal["NONE", "BLOCK", "DECODER"] = "DECODER"
    """Rematerialization in tunix's backward pass."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self):
        for name in ("prompt_length", "response_length"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise InputError(f"--{name.replace('_', '-')} {low}:{high} must be LOW:HIGH with 1 <= LOW <= HIGH")
        for name in ("median", "sigma"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)} must be positive")
        for name, least in (("groups", 1), ("group", 2), ("runs", 1)):  # the advantage of one response alone is zero
            if (value := getattr(self, name)) < least:
                raise InputError(f"--{name} {value} must be at least {least}")

    def peers(self) -> tuple[str, ...]:
        return tuple(name for name in self.peer or ("hf", "tunix") if name != "none")

    def measure(self) -> Iterator[dict[str, Any]]:
        """Yields one line with all systems. Raises RunError if their losses differ."""
        results = self.alternated(self.runs)
        ours, first = results["rmr1_jax"], {name: result["loss"][0] for name, result in results.items()}
        if not all(abs(loss - first["rmr1_jax"]) <= TOLERANCE for loss in first.values()):  # false for NaN too
            raise RunError(f"the losses of the first update differ by more than {TOLERANCE}: {first}")
        seconds = {name: statistics.median(result["seconds"]) for name, result in results.items()}
        tokens = ours["distinct_tokens"]
        line = {"name": "update", "distinct_tokens": tokens, "tok_s": round(tokens / seconds["rmr1_jax"], 1)}
        over = {f"over_{name}": round(s / seconds["rmr1_jax"], 2) for name, s in seconds.items() if name != "rmr1_jax"}
        speeds = {name: {"tok_s": round(tokens / s, 1), "median": round(s, 3)} for name, s in seconds.items()}
        yield line | over | {"systems": {name: speeds[name] | result for name, result in results.items()}}

    def lengths(self) -> tuple[list[int], list[list[int]]]:
        """Draws the lengths of the prompts, and of the responses of each from the truncated lognormal distribution."""
        import numpy as np

        random = np.random.default_rng(self.seed)
        prompts = random.integers(self.prompt_length[0], self.prompt_length[1] + 1, self.groups)
        logarithm = statistics.NormalDist(math.log(self.median), self.sigma)
        low, high = (logarithm.cdf(math.log(n)) for n in self.response_length)
        drawn = random.uniform(low, high, (self.groups, self.group))
        return prompts.tolist(), [[round(math.exp(logarithm.inv_cdf(share))) for share in row] for row in drawn]

    def made_groups(self) -> list[Any]:
        """Makes the groups, of random tokens and with mixed rewards; the log-probabilities of a response are numbers
        that count its tokens among those of all responses, from 1."""
        import numpy as np

        from rmr1_jax.sampler.sample import Sample
        from rmr1_jax.train.losses import group_advantages
        from rmr1_jax.train.rollout import Group, RlPrompt

        random, groups, counted = np.random.default_rng([self.seed, 1]), [], 0

        def tokens(count: int) -> np.ndarray:
            return random.integers(PAD + 1, self.vocab, count, np.int32)

        for number, (length, responses) in enumerate(zip(*self.lengths(), strict=True)):
            samples = []
            for n in responses:
                numbers = np.arange(counted + 1, counted + n + 1, dtype=np.float32)
                samples.append(Sample(tokens(n).tolist(), numbers, numbers, "stop"))
                counted += n
            rewards = random.permutation(np.arange(self.group) % 2 * 2.0 - 1.0).astype(np.float32)
            prompt = RlPrompt(str(number), tokens(length), "A")
            advantages = group_advantages(rewards[None])[0]
            groups.append(Group(prompt, samples, [""] * self.group, rewards, advantages))
        return groups

    def settings(self, **changed: Any) -> Any:
        """The settings of our run."""
        from rmr1_jax.sampler.sample import SamplingConfig
        from rmr1_jax.train.config import GrpoConfig
        from rmr1_jax.train.losses import PolicyLossConfig
        from rmr1_jax.train.optim import OptimConfig

        return GrpoConfig(
            out="unused",
            prompts_per_step=self.groups,
            mini_batch_prompts=self.groups,
            row_length=self.row_length,
            micro_rows=self.micro_rows,
            remat=self.remat,
            dtype="float32",
            max_prompt_length=self.prompt_length[1],
            sampling=SamplingConfig(n=self.group, max_new_tokens=self.response_length[1]),
            loss=PolicyLossConfig(kl_coef=0.0),
            optimizer=OptimConfig(lr=LEARNING_RATE, schedule="constant", warmup_ratio=0.0),
            **changed,
        )

    def prepare(self, model_dir: Path | None) -> tuple[dict[str, CompiledUpdate], dict[str, Any]]:
        import jax

        from rmr1_jax.distributed.mesh import single_device_mesh
        from rmr1_jax.model.hf import save_params
        from rmr1_jax.model.qwen import Qwen, init_params

        model, mesh = Qwen(model_config(self, self.prompt_length[1] + self.response_length[1])), single_device_mesh()
        params = init_params(model, jax.random.key(self.seed), mesh=mesh)
        if model_dir:
            save_params(model_dir, model, params, dtype="float32")
        variants = {"rmr1_jax": self.settings()}
        if hasattr(variants["rmr1_jax"], "share_prompts"):
            variants[UNSHARED] = self.settings(share_prompts=False)
        with jax.set_mesh(mesh):
            say("rmr1_jax: computing the old policy's log-probabilities, and compiling")
            groups = with_old_logp(self.made_groups(), list(variants.values())[-1], model, params, self.seed)
            systems = {name: our_update(groups, config, model, params) for name, config in variants.items()}
        work = {
            "task": "update",
            "prompts": [group.prompt.tokens.tolist() for group in groups],
            "responses": [[sample.token_ids for sample in group.samples] for group in groups],
            "old_logp": [[sample.sampled_logprobs.tolist() for sample in group.samples] for group in groups],
            "advantages": [group.advantages.tolist() for group in groups],
            "pad": PAD,
            "prompt_limit": self.prompt_length[1],
            "completion_limit": self.response_length[1],
            "lr": LEARNING_RATE,
            "clip_low": variants["rmr1_jax"].loss.clip_low,
            "clip_high": variants["rmr1_jax"].loss.clip_high,
            "hf_rows": self.hf_rows,
            "tunix_remat": self.tunix_remat,
        }
        return systems, work

    def table(self, lines: list[dict[str, Any]]) -> str:
        """Formats the line as a table."""
        (line,) = lines
        text = ["system      distinct tokens/s    seconds  positions   first loss   ours / its"]
        for name, system in line["systems"].items():
            speed = f"{name:<10}{system['tok_s']:19.1f}{system['median']:11.2f}{system['positions']:11}"
            ratio = f"{line[f'over_{name}']:13.2f}" if f"over_{name}" in line else ""
            text.append(f"{speed}{system['loss'][0]:13.6f}{ratio}")
        text.append(f"{line['distinct_tokens']} distinct tokens")
        text += [f"{name}: {system['version']}" for name, system in line["systems"].items()]
        return "\n".join(text)


def with_old_logp(groups: list[Any], config: Any, model: Any, params: Any, seed: int) -> list[Any]:
    """The groups with the log-probabilities of a policy that is about a fifth of a nat away from `params`, and nearer
    to worse responses, so that the loss is not zero and the clip is used."""
    import jax
    import numpy as np

    from rmr1_jax.model.qwen import split
    from rmr1_jax.train.grpo import batch_logprobs
    from rmr1_jax.train.micro_batches import mini_batch

    ((arrays, count),), *_ = mini_batch(groups, config, skip_unmixed=False)
    inputs = {k: v for k, v in arrays.items() if v.dtype == np.int32}
    logp = jax.jit(functools.partial(batch_logprobs, split(model)[0]))(params, inputs, count)
    numbers = arrays["sampler_logp"].astype(int)  # see `made_groups`
    by_number = np.zeros(numbers.max() + 1, np.float32)
    by_number[numbers] = logp
    by_number += np.random.default_rng([seed, 2]).normal(0, 0.1, by_number.shape).astype(np.float32)

    def moved(sample: Any, advantage: float) -> Any:
        old_logp = by_number[sample.sampled_logprobs.astype(int)] - np.float32(0.1) * advantage
        return dataclasses.replace(sample, sampled_logprobs=np.minimum(old_logp, 0.0))

    return [
        dataclasses.replace(g, samples=[moved(*each) for each in zip(g.samples, g.advantages, strict=True)])
        for g in groups
    ]


def our_update(groups: list[Any], config: Any, model: Any, params: Any) -> CompiledUpdate:
    """Compiles our update of the groups, from a copy of `params`."""
    from rmr1_jax.data.packing import mean_length
    from rmr1_jax.distributed.mesh import single_device_mesh
    from rmr1_jax.model.qwen import split
    from rmr1_jax.train.grpo import grpo_micro_loss
    from rmr1_jax.train.logprobs import forward_options
    from rmr1_jax.train.losses import policy_loss
    from rmr1_jax.train.micro_batches import mini_batch
    from rmr1_jax.train.optim import init_state, make_optimizer, master_weights

    ((arrays, count),), *_ = mini_batch(groups, config, skip_unmixed=True)
    arrays |= {"old_logp": arrays["sampler_logp"]}
    forward = forward_options(config, model.config, single_device_mesh(), mean_length([g.prompt for g in groups]))
    loss = functools.partial(grpo_micro_loss, split(model)[0], config, policy_loss, **forward)
    optimizer = make_optimizer(config.optimizer, 100)
    state = init_state(master_weights(params, keep=True), optimizer)
    update = CompiledUpdate(state, arrays, count, loss=loss, optimizer=optimizer)
    responses = sum(len(sample.token_ids) for group in groups for sample in group.samples)
    update.facts["distinct_tokens"] = responses + sum(len(group.prompt.tokens) for group in groups)
    update.facts["positions"] = count * config.micro_rows * config.row_length
    return update
