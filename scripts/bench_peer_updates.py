"""One GRPO update by each peer, the way its own trainer makes it; see `bench_peers.py` and `bench_update.py`.

The work has the prompts of P groups, the R responses of each, and for each response its advantage and the
log-probabilities of its tokens under the old policy. Each function returns facts and a call that makes one update.
"""

import time
from pathlib import Path

import numpy as np
from bench_peer_models import hf_version, load_hf, load_tunix, tunix_version


def update_hf(work: dict, model_dir: Path) -> tuple:
    """An update as TRL's GRPOTrainer makes it (1.16: loss_type "grpo", beta 0), by Transformers and torch's AdamW.

    Prompts are padded on the left and completions on the right, to the longest of the whole batch, before it is split
    into micro-batches. The head is computed for the completions alone (`logits_to_keep`). TRL also checkpoints
    activations and computes the entropy, by default; here neither costs anything.
    """
    import torch

    model, device = load_hf(model_dir)
    model = model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    samples = flat(work)
    batch = {k: torch.tensor(v, device=device) for k, v in padded(samples, pad=work["pad"]).items()}
    keep, count, rows = batch["completion_mask"].shape[1], len(samples), work["hf_rows"]
    low, high = 1 - work["clip_low"], 1 + work["clip_high"]

    def backward(part: slice):
        """Adds the gradient of a micro-batch. Returns its share of the loss."""
        ids, mask, chosen = batch["ids"][part], batch["mask"][part], batch["completion_mask"][part]
        out = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1, use_cache=False)
        logits = out.logits[:, :-1]  # the last position predicts a token that nobody sampled
        drawn = logits.gather(-1, ids[:, -keep:, None]).squeeze(-1)
        logp = drawn - torch.stack([row.logsumexp(-1) for row in logits])  # as TRL, row by row to save memory
        ratio = torch.exp(logp - batch["old_logp"][part])
        advantages = batch["advantages"][part, None]
        terms = -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
        loss = ((terms * chosen).sum(-1) / chosen.sum(-1)).sum() / count
        loss.backward()
        return loss.item()

    def update() -> dict:
        loss = sum(backward(slice(start, start + rows)) for start in range(0, count, rows))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm.item()}

    backward(slice(0, rows))  # allocate; nothing is compiled
    optimizer.zero_grad(set_to_none=True)
    return {"positions": batch["ids"].numel(), "rows": rows, "device": device, "version": hf_version()}, update


def update_tunix(work: dict, model_dir: Path) -> tuple:
    """An update by tunix's own RL trainer and GRPO loss, set up as its GRPOLearner does.

    The learner pads prompts and completions to the limits of the rollout, and its smallest micro-batch is one prompt
    with all its completions.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.rl.grpo.grpo_learner import TrainExample

    trainer, model = tunix_trainer(work, model_dir)
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    samples, group, prompt = flat(work), len(work["responses"][0]), work["prompt_limit"]
    arrays = padded(samples, pad=work["pad"], prompt_limit=prompt, completion_limit=work["completion_limit"])
    examples = [
        TrainExample(
            prompt_ids=jnp.asarray(arrays["ids"][part, :prompt], jnp.int32),
            prompt_mask=jnp.asarray(arrays["mask"][part, :prompt], bool),
            completion_ids=jnp.asarray(arrays["ids"][part, prompt:], jnp.int32),
            completion_mask=jnp.asarray(arrays["completion_mask"][part], bool),
            advantages=jnp.asarray(arrays["advantages"][part]),
            ref_per_token_logps=None,
            old_per_token_logps=jnp.asarray(arrays["old_logp"][part]),
        )
        for part in (slice(start, start + group) for start in range(0, len(samples), group))
    ]

    def update() -> dict:
        losses = [step(example)[0] for example in examples]
        return {"loss": float(np.mean(jax.block_until_ready(losses)))}

    # Warm up with two micro-batches, and forget them. The second compiles again: what a step returns is laid out
    # otherwise than what was loaded.
    before = jax.tree.map(jnp.copy, nnx.state((model, trainer.optimizer)))
    start = time.perf_counter()
    jax.block_until_ready([step(examples[0]) for _ in range(2)])
    layout = jax.tree.map(lambda x: x.sharding, nnx.state((model, trainer.optimizer)))
    nnx.update((model, trainer.optimizer), jax.device_put(before, layout))
    facts = {"warm_up_seconds": time.perf_counter() - start, "device": jax.default_backend()}
    return facts | {"positions": arrays["ids"].size, "rows": group, "version": tunix_version()}, update


def tunix_trainer(work: dict, model_dir: Path) -> tuple:
    """tunix's RL trainer with its GRPO loss, and the model that it trains."""
    import optax
    from tunix.models.qwen2.model import RematConfig
    from tunix.rl import function_registry
    from tunix.rl.grpo.grpo_learner import GRPOConfig
    from tunix.rl.rl_cluster import RLTrainingConfig
    from tunix.rl.trainer import Trainer

    model, _ = load_tunix(model_dir, remat_config=RematConfig[work["tunix_remat"]])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(work["lr"], 0.9, 0.95, weight_decay=0.0))
    config = GRPOConfig(num_generations=len(work["responses"][0]), beta=0.0, epsilon=work["clip_low"])
    config.epsilon_high, config.temperature = work["clip_high"], 1.0  # GRPOLearner sets the temperature so
    policy_loss = function_registry.get_policy_loss_fn(config.policy_loss_fn)
    training = RLTrainingConfig(
        actor_optimizer=optimizer,
        mini_batch_size=len(work["prompts"]),
        train_micro_batch_size=1,
        eval_every_n_steps=10**9,
        max_steps=10**9,
    )

    def loss(model, train_example, algo_config):
        return policy_loss(model, train_example, algo_config=config, pad_id=work["pad"], eos_id=work["pad"])

    trainer = Trainer(model, optimizer, training, custom_checkpoint_metadata_fn=dict)
    trainer.with_loss_fn(loss, has_aux=True)
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example, "algo_config": config})
    return trainer, model


def flat(work: dict) -> list[dict]:
    """Lists the samples of all groups: prompt, response, old_logp, advantage."""
    keys = ("responses", "old_logp", "advantages")
    return [
        {"prompt": prompt, "response": response, "old_logp": old_logp, "advantage": advantage}
        for prompt, *group in zip(work["prompts"], *(work[key] for key in keys), strict=True)
        for response, old_logp, advantage in zip(*group, strict=True)
    ]


def padded(samples: list[dict], *, pad: int, prompt_limit: int = 0, completion_limit: int = 0) -> dict[str, np.ndarray]:
    """Pads prompts on the left and completions on the right, to a limit or else to the longest, as arrays of S rows."""
    P = prompt_limit or max(len(s["prompt"]) for s in samples)
    C = completion_limit or max(len(s["response"]) for s in samples)
    ids, old_logp = np.full((len(samples), P + C), pad, np.int64), np.zeros((len(samples), C), np.float32)
    for row, sample in enumerate(samples):
        prompt, response = sample["prompt"], sample["response"]
        ids[row, P - len(prompt) : P + len(response)] = prompt + response
        old_logp[row, : len(response)] = sample["old_logp"]
    mask = (ids != pad).astype(np.int64)
    advantages = np.array([s["advantage"] for s in samples], np.float32)
    return {"ids": ids, "mask": mask, "completion_mask": mask[:, P:], "old_logp": old_logp, "advantages": advantages}
