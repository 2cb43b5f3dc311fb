"""Measures one peer on a workload that bench.py has written to a folder.

python scripts/bench_peers.py hf|tunix FOLDER

bench.py starts it in the peer's own environment, where this project is not installed, so it imports nothing from it.
FOLDER contains `workload.json` (the task and its arguments) and `model/` (the weights as a Hugging Face directory). It
answers with one line of JSON when it has warmed up (compiled and allocated), which has the samples and seconds of a
task that samples. Of a task that trains it then makes one update for each line of its standard input, and answers with
one line for each. Read next, for GRPO: `bench_peer_updates.py`.
"""

import json
import os
import sys
import time
from pathlib import Path

from bench_peer_models import hf_version, load_hf, load_tunix, tunix_version
from bench_peer_updates import update_hf, update_tunix


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


def train_hf(work: dict, model_dir: Path) -> tuple:
    """Transformers' own loss, torch's AdamW and clipping, `sdpa` attention, no rematerialization."""
    import torch

    model, device = load_hf(model_dir)
    model = model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    rows = torch.tensor(work["rows"], device=device)

    def step() -> dict:
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item()}

    return {"first_loss": step()["loss"], "device": device, "version": hf_version()}, step


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


def train_tunix(work: dict, model_dir: Path) -> tuple:
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
    facts = {"first_loss": float(step(batch)[0]), "device": jax.default_backend(), "version": tunix_version()}
    return facts, lambda: {"loss": float(jax.block_until_ready(step(batch))[0])}


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
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    work = json.loads((folder / "workload.json").read_text())
    runs = {
        ("sample", "hf"): lambda *given: (sample_hf(*given), None),
        ("sample", "tunix"): lambda *given: (sample_tunix(*given), None),
        ("train", "hf"): train_hf,
        ("train", "tunix"): train_tunix,
        ("update", "hf"): update_hf,
        ("update", "tunix"): update_tunix,
    }
    facts, step = runs[work["task"], peer](work, folder / "model")
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        seconds, made = timed(step)
        print(json.dumps({"seconds": seconds} | made), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
