"""A policy: weights, config and tokenizer together, with text in and text out.

Everything above (training, judging) holds one of these; everything below works on arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rmr1_jax.distributed.exchange import first, wait
from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import locate
from rmr1_jax.model import hf, qwen
from rmr1_jax.model.config import QwenConfig, read_config
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.sampler.engine import engine_for, generate
from rmr1_jax.sampler.sample import Sample, SampleStats, SamplingConfig
from rmr1_jax.sampler.weights import Weights, sampling_weights

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # of a hub repository


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a policy wrote. logprobs: one for each token, float32, under the model itself. finish_reason: "stop" or
    "length"."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Policy:
    """A Qwen with its tokenizer on a mesh. `params` is the tree that `model/qwen.py` describes; `dtype` is what the
    matrix products run in. Made by `load`, or from the parts."""

    config: QwenConfig
    params: qwen.Params
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: str = "float32"

    def logits(self, tokens, positions=None, segment_ids=None) -> jax.Array:
        """[B, T] int32 -> [B, T, V] float32. positions and segment_ids: [B, T] int32, see `qwen.forward`."""
        arrays = [None if x is None else jnp.asarray(x) for x in (tokens, positions, segment_ids)]
        with jax.set_mesh(self.mesh):
            return _forward(self.config, self.params, *arrays, dtype=DTYPES[self.dtype])

    def sample(
        self,
        prompts: Sequence[str | Sequence[int]],
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop_token_ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[Completion]]:
        """Complete each prompt n times. A prompt is text or token ids; stop ids default to the model's own.

        A completion depends on the seed, its prompt and its number, and on nothing else in the call.
        """
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        sampling = SamplingConfig(
            n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        groups, _ = self.generate(ids, sampling, stop_token_ids=stop_token_ids)
        return [[self._completion(s) for s in group] for group in groups]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        stop_token_ids: Sequence[int] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> tuple[list[list[Sample]], SampleStats]:
        """As `sample`, in tokens, with what it took. on_done: called with 1 for every prompt that is finished."""
        stops = self.tokenizer.stop_ids if stop_token_ids is None else stop_token_ids
        return generate(self.config, self._weights, prompts, sampling, stops, mesh=self.mesh, on_done=on_done)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        stop_token_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, int, Sample]]:
        """As `generate`: (prompt, number, sample), each as soon as it is finished."""
        stops = self.tokenizer.stop_ids if stop_token_ids is None else stop_token_ids
        engine = engine_for(self.config, self._weights, prompts, sampling, mesh=self.mesh)
        return engine.stream(self._weights, prompts, stops)

    def save(self, directory: str | Path, *, dtype: str | None = None) -> None:
        """Write a Hugging Face directory: weights (in the params' own dtype unless given), config, tokenizer. All
        processes must call it; the first one writes, and no other returns before it is there."""
        dtype = dtype or str(self.params["embed"].dtype)
        hf.save_params(directory, self.config, self.params, dtype=dtype)
        if first():
            hf.copy_side_files(self.tokenizer.directory, directory)
        wait("model saved")

    def with_params(self, params: qwen.Params) -> Policy:
        """The same policy with other weights."""
        return dataclasses.replace(self, params=params)

    @cached_property
    def _weights(self) -> Weights:
        with jax.set_mesh(self.mesh):
            return sampling_weights(self.config, self.params, dtype=DTYPES[self.dtype])

    def _completion(self, sample: Sample) -> Completion:
        text = self.tokenizer.decode(sample.token_ids)
        return Completion(text, sample.token_ids, np.asarray(sample.logprobs).tolist(), sample.finish_reason)


_forward = jax.jit(qwen.forward, static_argnames=("config", "dtype"))


def load(
    model: str | Path, dtype: str = "bfloat16", mesh: Mesh | None = None, *, master_dtype: str | None = None
) -> Policy:
    """Load a policy from a Hugging Face directory or a hub id.

    Args:
        dtype: of the matrix products, "bfloat16" or "float32". master_dtype: of the weights that are kept (training
            wants "float32"); default `dtype`. mesh: default one device.

    Raises:
        InputError: not a directory or a reachable hub id, or anything wrong in it (all differences at once).
    """
    for name in (dtype, master_dtype or dtype):
        if name not in DTYPES:
            raise InputError(f"dtype {name!r} is not known; give one of {', '.join(DTYPES)}")
    directory, mesh = locate(model, kind="model", patterns=MODEL_FILES), mesh or single_device_mesh()
    config, tokenizer = read_config(directory), Tokenizer(directory)
    if len(tokenizer.hf) > config.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {len(tokenizer.hf)} tokens, the model {config.vocab_size}")
    params = hf.load_params(directory, config, dtype=DTYPES[master_dtype or dtype], mesh=mesh)
    return Policy(config, params, tokenizer, mesh, dtype)


def fresh_policy(config: QwenConfig, tokenizer_directory: str | Path, *, seed: int, mesh: Mesh | None = None) -> Policy:
    """Random float32 weights with an existing tokenizer: a policy to train from nothing."""
    mesh = mesh or single_device_mesh()
    with jax.set_mesh(mesh):
        params = qwen.init_params(config, jax.random.key(seed), mesh=mesh)
    return Policy(config, params, Tokenizer(tokenizer_directory), mesh)
