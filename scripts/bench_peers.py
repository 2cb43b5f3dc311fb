"""Measures one peer on a workload that bench.py has written to a folder.

python scripts/bench_peers.py hf|tunix FOLDER

bench.py starts it in the peer's own environment, where this project is not installed, so it imports nothing from it.
FOLDER contains `workload.json` (the task and its arguments) and `model/` (the weights as a Hugging Face directory). The
samples or losses and the seconds are written to `FOLDER/result.json`. A first call compiles and allocates; it is timed
separately.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path


def sample_hf(work: dict, model_dir: Path) -> dict:
    """Transformers' `generate`: static batch, left padded, until every row has stopped."""
    import torch

    model, device = load_hf(model_dir)
    model = model.eval()
    longest, pad = max(map(len, work["prompts"])), work["stop_ids"][-1]
    padded = [[pad] * (longest - len(p)) + p for p in work["prompts"]]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in work["prompts"]]
    inputs = {"input_ids": torch.tensor(padded, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def draw(max_new: int) -> list[list[int]]:
        torch.manual_seed(work["seed"])
        out = model.generate(
            **inputs,
            max_new_tokens=max_new,
            num_return_sequences=work["group"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=work["stop_ids"],
            pad_token_id=pad,
        )
        return out[:, longest:].tolist()

    warm_up_seconds, _ = timed(lambda: draw(min(4, work["max_new"])))  # nothing is compiled, so a few steps are enough
    seconds, rows = timed(lambda: draw(work["max_new"]))
    facts = {"device": device, "version": hf_version()}
    return {"seconds": seconds, "rows": rows, "warm_up_seconds": warm_up_seconds} | facts


def train_hf(work: dict, model_dir: Path) -> dict:
    """Transformers' own loss, torch's AdamW and clipping, `sdpa` attention, no rematerialization."""
    import torch

    model, device = load_hf(model_dir)
    model = model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    rows = torch.tensor(work["rows"], device=device)
    losses = []

    def step() -> None:
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    step()
    seconds = [timed(step)[0] for _ in range(work["steps"])]
    return {"seconds": seconds, "first_loss": losses[0], "device": device, "version": hf_version()}


def load_hf(model_dir: Path) -> tuple:
    """Loads the model in float32; returns it with the name of its device."""
    import torch
    from transformers import Qwen2ForCausalLM

    # By default torch uses one thread for each physical core, and JAX one for each logical core.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Qwen2ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device), device


def hf_version() -> str:
    return f"transformers {version('transformers')}, torch {version('torch')}"


def sample_tunix(work: dict, model_dir: Path) -> dict:
    """tunix's own `Sampler` (the one without vLLM or SGLang): static batch, left padded, until every row has stopped.

    It cannot draw several samples of a prompt, so each prompt is given once for every sample.
    """
    import jax
    import jax.numpy as jnp
    from tunix.generate.sampler import CacheConfig, Sampler

    model, config = load_tunix(model_dir)
    longest, stop_ids = max(map(len, work["prompts"])), work["stop_ids"]
    cache = CacheConfig(
        cache_size=longest + work["max_new"],
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    # Positions with the pad id are masked. No prompt contains a stop id, and a row that draws one is finished.
    sampler = Sampler(model, PromptNumbers(work["prompts"], pad=stop_ids[-1]), cache)
    compiling: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiling.append(seconds) if event.endswith("backend_compile_duration") else None
    )

    def draw() -> list[list[int]]:
        out = sampler(
            [str(number) for number in range(len(work["prompts"])) for _ in range(work["group"])],
            max_generation_steps=work["max_new"],
            max_prompt_length=longest,
            eos_tokens=stop_ids,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            seed=work["seed"],
        )
        # Rows are returned without their stop id; it does not matter which one it was.
        return [r.tolist() + stop_ids[:1] * (len(r) < work["max_new"]) for r in out.tokens]

    # Warm up: compile the same programs, with a head that makes each row stop at once because its logits of the stop
    # ids are huge.
    weights = sampler.transformer_state
    stopping = jax.tree.map(lambda x: x, weights)
    head = stopping["lm_head"]["w"]
    stopping["lm_head"]["w"] = head.replace(head[...].at[:, jnp.array(stop_ids)].multiply(1e6))
    sampler.transformer_state = stopping
    warm_up_seconds, _ = timed(draw)
    sampler.transformer_state = weights
    compiling.clear()
    seconds, rows = timed(draw)
    return {
        "seconds": seconds,
        "rows": rows,
        "warm_up_seconds": warm_up_seconds,
        "compile_seconds": round(sum(compiling), 3),  # part of `seconds`; usually 0.02
        "device": jax.default_backend(),
        "version": tunix_version(),
        "note": "each prompt is given, and prefilled, once for every sample",
    }


def train_tunix(work: dict, model_dir: Path) -> dict:
    """The compiled step of tunix's own trainer, with its default loss and optax's AdamW."""
    import jax
    import numpy as np
    import optax
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    model, _ = load_tunix(model_dir)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(work["lr"], 0.9, 0.95, weight_decay=0.0))
    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9))
    step, _ = trainer.jit_train_and_eval_step()
    rows = np.asarray(work["rows"], np.int32)
    B, T = rows.shape
    batch = {
        "input_tokens": rows,
        "input_mask": np.ones((B, T), bool),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "attention_mask": np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T)),
    }
    first = float(step(batch)[0])
    seconds = [timed(lambda: jax.block_until_ready(step(batch)))[0] for _ in range(work["steps"])]
    facts = {"device": jax.default_backend(), "version": tunix_version()}
    return {"seconds": seconds, "first_loss": first} | facts


def load_tunix(model_dir: Path) -> tuple:
    """Loads the model in float32; returns it with its configuration."""
    import jax.numpy as jnp
    from tunix.models.qwen2.model import ModelConfig
    from tunix.models.qwen2.params import create_model_from_safe_tensors

    hf = json.loads((model_dir / "config.json").read_text())
    config = ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        use_tied_embedding=hf["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(str(model_dir), config, dtype=jnp.float32), config


def tunix_version() -> str:
    return f"google-tunix {version('google-tunix')}, jax {version('jax')}"


class PromptNumbers:
    """A tokenizer, as tunix requires one, for prompts that are tokens already: the text is the prompt's number."""

    def __init__(self, prompts: list[list[int]], pad: int):
        self.prompts, self.pad = prompts, pad

    def encode(self, text: str) -> list[int]:
        return self.prompts[int(text)]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None  # no token before a prompt

    def eos_id(self) -> int:
        return self.pad

    def pad_id(self) -> int:
        return self.pad


def timed(call):
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def main(peer: str, folder: Path) -> None:
    work = json.loads((folder / "workload.json").read_text())
    runs = {
        ("sample", "hf"): sample_hf,
        ("sample", "tunix"): sample_tunix,
        ("train", "hf"): train_hf,
        ("train", "tunix"): train_tunix,
    }
    result = runs[work["task"], peer](work, folder / "model")
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
