"""Policies for tests: a scripted one, and a tiny one with random weights."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np

from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.qwen import module_for, split
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.policy import Policy, fresh_policy
from rmr1_jax.quickstart.tokenizer import train_tokenizer
from rmr1_jax.quickstart.world import world_texts
from rmr1_jax.sampler.sample import Sample, SampleStats

CONFIG = QwenConfig(
    model_type="qwen2",
    vocab_size=640,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    qkv_bias=True,
    qk_norm=False,
)


class ScriptedPolicy(Tokenizer):
    """Writes `script(prompt, number)`, cut at the limit. A token is a byte; a prompt is its last message, then
    `opening`."""

    stats_text = Policy.stats_text
    directory = Path("a model without files")

    def __init__(self, script, positions: int = 20_000, opening: str = ""):
        self.script, self.opening, self.calls = script, opening, []
        self.config = dataclasses.replace(CONFIG, max_position_embeddings=positions)
        self.tokenizer, self.mesh, self.stats = self, single_device_mesh(), SampleStats()

    def render(self, messages) -> list[int]:
        return list((messages[-1]["content"] + self.opening).encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode()

    def stream(self, prompts, sampling, *, stop_token_ids=None):
        self.calls.append((prompts, sampling))
        for k, prompt in enumerate(prompts):
            for number in range(sampling.n):
                text = self.script(self.decode(prompt), number).encode()
                end = "stop" if len(text) <= sampling.max_new_tokens else "length"
                text = text[: sampling.max_new_tokens]
                yield k, number, Sample(list(text), np.zeros(len(text)), np.zeros(len(text)), end)


def answer(verdict: str) -> str:
    return f"<eval>because</eval>\n<answer>[[{verdict}]]</answer>" if verdict in "AB" else "no idea"


def prefers(word: str):
    """A script without position bias: names the side whose answer holds `word`."""

    def script(prompt: str, number: int) -> str:
        return answer("A" if word in prompt.split("[The End of Chatbot A's Response]")[0] else "B")

    return script


def says(verdicts: str):
    """A script that gives sample number i the verdict i, whatever is asked ("-": none)."""
    return lambda prompt, number: answer(verdicts[number])


@functools.cache
def tiny_policy() -> Policy:
    """Random weights, one layer, the small world's tokenizer; made once, for it takes seconds."""
    tokenizer = train_tokenizer(world_texts(200), tempfile.mkdtemp(prefix="rmr1-test-tokenizer-"))
    return fresh_policy(CONFIG, tokenizer, seed=0)


def shapes_of(config: QwenConfig) -> dict:
    """The tree of the parameters' shapes."""
    return jax.tree.map(lambda w: w.shape, split(module_for(config))[1])
