"""The other side of `bench.py`: one peer's sampler on a workload that bench.py has written to a folder.

python scripts/bench_peers.py hf|tunix FOLDER

It runs in the peer's own environment, where this project is not installed, so it imports nothing of it. FOLDER holds
`workload.json` (prompts, group, max_new, stop_ids, seed) and `model/`, the weights as a Hugging Face directory; the
tokens that were drawn and the seconds go to `FOLDER/result.json`. What a first call compiles or sets up is done by an
earlier call and timed apart.
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
    from transformers import Qwen2ForCausalLM

    # By itself torch takes one thread a physical core; JAX takes them all.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
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

    warm_up_seconds, _ = timed(lambda: draw(min(4, work["max_new"])))  # nothing is compiled: a few steps are enough
    seconds, rows = timed(lambda: draw(work["max_new"]))
    versions = f"transformers {version('transformers')}, torch {version('torch')}"
    return {"seconds": seconds, "rows": rows, "warm_up_seconds": warm_up_seconds, "device": device, "version": versions}


def sample_tunix(work: dict, model_dir: Path) -> dict:
    """tunix's own `Sampler` (the one without vLLM or SGLang): static batch, left padded, until every row has stopped.

    It has no n samples a prompt, so a prompt is given once for each. It stops on a list of ids.
    """
    import jax
    import jax.numpy as jnp
    from tunix.generate.sampler import CacheConfig, Sampler
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
    model = create_model_from_safe_tensors(str(model_dir), config, dtype=jnp.float32)
    longest, stop_ids = max(map(len, work["prompts"])), work["stop_ids"]
    cache = CacheConfig(
        cache_size=longest + work["max_new"],
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    # Cells that hold the pad id are masked. No prompt has a stop id, and a row that draws one is done.
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
        # A row comes back without its stop id. Which one it was does not matter.
        return [r.tolist() + stop_ids[:1] * (len(r) < work["max_new"]) for r in out.tokens]

    # The same programs, and so everything compiled, but with a head that makes each row stop at once: its logits of the
    # 16 stop ids are huge, of either sign.
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
        "compile_seconds": round(sum(compiling), 3),  # within `seconds`: one comparison of scalars, 0.02 here
        "device": jax.default_backend(),
        "version": f"google-tunix {version('google-tunix')}, jax {version('jax')}",
        "note": "no n samples a prompt: each prompt is given, and prefilled, once for every sample",
    }


class PromptNumbers:
    """A tokenizer in tunix's sense, for prompts that are tokens already: the text is the prompt's number."""

    def __init__(self, prompts: list[list[int]], pad: int):
        self.prompts, self.pad = prompts, pad

    def encode(self, text: str) -> list[int]:
        return self.prompts[int(text)]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None  # nothing is put before a prompt

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
    result = {"hf": sample_hf, "tunix": sample_tunix}[peer](work, folder / "model")
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
