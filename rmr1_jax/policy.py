"""A policy: weights, config and tokenizer together, with text in and text out.

Everything above (training, judging) holds one of these; everything below works on arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rmr1_jax.distributed.exchange import first, gather, wait
from rmr1_jax.distributed.mesh import rows_divisor, single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import locate
from rmr1_jax.model import hf
from rmr1_jax.model.config import QwenConfig, read_config
from rmr1_jax.model.qwen import Params, Qwen, Transformer, init_params, split, with_params
from rmr1_jax.model.stored_model import StoredModel
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.prompts.prompt import PROMPT_FILE
from rmr1_jax.sampler.engine import Engine
from rmr1_jax.sampler.layout import local_layout
from rmr1_jax.sampler.sample import Sample, SampleStats, SamplingConfig
from rmr1_jax.sampler.weights import Weights, sampling_weights, stored_weights

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", PROMPT_FILE)  # of a hub repository
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Completion:
    """A completion. logprobs: one for each token, under the model itself. finish_reason: "stop" or "length"."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str

    def __repr__(self) -> str:
        text = textwrap.shorten(self.text, 80, placeholder=" ...")
        return f"Completion({text!r}, {len(self.token_ids)} tokens, {self.finish_reason})"


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its tokenizer on a mesh, made by `load` or from its parts.

    source: the Flax NNX module with its arrays; or a checked model directory, whose weights are read when something
    needs them, into the layout that needs them: `sample` and `stream` read `weights`, all else reads `model`. dtype:
    what the matrix products run in, "bfloat16" or "float32"; the arrays of `model` may have another.
    """

    source: Qwen | StoredModel
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: str = "float32"

    def __repr__(self) -> str:
        return f"Policy({model_text(self.module, self.dtype, self.mesh)})"

    def logits(self, tokens, positions=None, segment_ids=None) -> jax.Array:
        """[B, T] int32 -> [B, T, V] float32. positions and segment_ids: [B, T] int32, see `Qwen.hidden_states`.

        The weights are read into the layout of training, beside the sampler's copy if there is one.
        """
        arrays = [None if x is None else jnp.asarray(x) for x in (tokens, positions, segment_ids)]
        with jax.set_mesh(self.mesh):
            return _logits(*split(self.model), *arrays, dtype=DTYPES[self.dtype])

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
        min_p: float = 0.0,
    ) -> list[list[Completion]]:
        """Complete each prompt n times. A prompt is text or token ids; stop ids default to the model's own. top_p,
        top_k and min_p: see `sample.Truncation`.

        A completion depends on the seed, its prompt and its number, and on nothing else in the call.
        """
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        truncation = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
        sampling = SamplingConfig(n=n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, **truncation)
        groups: list[list] = [[None] * n for _ in ids]
        for prompt, number, sample in self.stream(ids, sampling, stop_token_ids=stop_token_ids):
            groups[prompt][number] = self._completion(sample)
        return groups

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        stop_token_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, int, Sample]]:
        """Samples as `sample` does, in tokens, and yields (prompt, number, sample) as they finish."""
        stops = self.tokenizer.stop_ids if stop_token_ids is None else stop_token_ids
        engine = Engine.for_prompts(self.module, self.weights, prompts, sampling, mesh=self.mesh)
        try:
            yield from engine.stream(self.weights, prompts, stops)
        finally:
            self.stats.add(engine.stats)

    @functools.cached_property
    def stats(self) -> SampleStats:
        """The sampler's counts over all calls of `sample` and `stream` in this process so far."""
        return SampleStats()

    def stats_text(self) -> str:
        """The counts so far in one line, over all processes (a collective): texts, tokens a second, devices, occupancy.
        "" where nothing was sampled."""
        counted, total, mesh = gather(self.stats), SampleStats(), self.mesh
        for stats in counted:
            total.add(stats)
        speed = total.new_tokens / max(1e-9, *(stats.seconds for stats in counted))
        where = f"{mesh.size} device{'s' * (mesh.size > 1)} (data {rows_divisor(mesh)} x tensor {mesh.shape['tensor']})"
        if len(counted) > 1:
            where = f"{len(counted)} processes with {where} each"
        if not total.samples:
            return ""
        return (
            f"sampled {total.samples:,} text{'s' * (total.samples > 1)}, {total.new_tokens:,} tokens at "
            f"{speed:,.{int(speed < 10)}f} tokens/s on {where}, "
            f"occupancy {total.occupancy:.0%}"
        )

    def save(self, directory: str | Path, *, dtype: str | None = None) -> None:
        """Write a Hugging Face directory: weights (in the params' own dtype unless given), config, tokenizer. Weights
        that were not read are read and written one array at a time. All processes must call it; the first one writes,
        and no other returns before it is there."""
        params = self.source.deferred(self.mesh) if self._unread else self.params
        own = self.source.dtype if self._unread else params["embed"].dtype
        write_model(directory, self.module, params, self.tokenizer, dtype=dtype or str(own))

    @property
    def config(self) -> QwenConfig:
        return self.module.config

    @property
    def module(self) -> Qwen:
        """The module, which need not hold arrays."""
        return self.source.module if isinstance(self.source, StoredModel) else self.source

    @functools.cached_property
    def model(self) -> Qwen:
        """The module with its arrays, in the layout of training."""
        if isinstance(self.source, StoredModel):
            return with_params(self.source.module, self.source.read(self.mesh))
        return self.source

    @functools.cached_property
    def weights(self) -> Weights:
        """The weights in the layout and dtype of the sampler. They are read from the model directory unless the arrays
        of `model` are in memory."""
        dtype = DTYPES[self.dtype]
        if self._unread and self.source.dtype in (dtype, "float32"):  # else they are rounded on the way
            return stored_weights(self.source, dtype=dtype, mesh=self.mesh)
        with jax.set_mesh(self.mesh):
            return sampling_weights(self.model, dtype=dtype)

    @property
    def params(self) -> Params:
        """The model's arrays as a plain tree, as training and checkpoints have them."""
        return split(self.model)[1]

    def with_params(self, params: Params) -> Policy:
        """The same policy with other weights."""
        return dataclasses.replace(self, source=with_params(self.module, params))

    @property
    def _unread(self) -> bool:
        return isinstance(self.source, StoredModel) and "model" not in vars(self)

    def _completion(self, sample: Sample) -> Completion:
        text = self.tokenizer.decode(sample.token_ids)
        return Completion(text, sample.token_ids, np.asarray(sample.logprobs).tolist(), sample.finish_reason)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _logits(graphdef: nnx.GraphDef, params: Params, tokens, positions, segment_ids, *, dtype) -> jax.Array:
    return nnx.merge(graphdef, params)(tokens, positions, segment_ids, dtype=dtype)


def write_model(directory: str | Path, module: Qwen, params: Params, tokenizer: Tokenizer, *, dtype: str) -> None:
    """Write a Hugging Face directory; see `Policy.save`, and `hf.save_params` for `params`."""
    hf.save_params(directory, module, params, dtype=dtype)
    if first():
        tokenizer.save(directory)
    wait("model saved")


def load(
    model: str | Path,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    *,
    tensor: int | None = None,
    master_dtype: str | None = None,
    module: type[Qwen] = Qwen,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a policy from a Hugging Face directory or a hub id. Everything is checked now; the weights are read when
    they are first needed.

    Args:
        dtype: of the matrix products, "bfloat16", "float32" or "auto" (see `settled_dtype`). master_dtype: of the
            weights that are kept (training wants "float32"); default `dtype`. mesh: default all devices of this
            process, laid out by the model's size (`sampler/layout.py`). tensor: the number of devices that share a copy
            of the weights, instead of that rule's; the devices hold as many copies as fit. module: a subclass of `Qwen`
            to put the weights into.
            chat_template_kwargs: arguments of the model's chat template, such as `{"enable_thinking": False}`.

    Raises:
        InputError: not a directory or a reachable hub id, or anything wrong in it (all differences at once); or
            `tensor` does not divide the number of devices, or the devices are too small for the weights.
    """
    dtype = settled_dtype(dtype, mesh)
    dtypes = (dtype, master_dtype or dtype)
    directory, config, tokenizer = open_model(model, *dtypes, chat_template_kwargs=chat_template_kwargs)
    stored = StoredModel.open(directory, module(config), DTYPES[master_dtype or dtype])
    return Policy(stored, tokenizer, local_layout(stored.module, DTYPES[dtype], mesh, tensor), dtype)


def model_directory(model: str | Path) -> Path:
    """Return the local directory of a model, given as a directory or a hub id. Raises InputError as `load`."""
    return locate(model, kind="model", patterns=MODEL_FILES)


def settled_dtype(dtype: str, mesh: Mesh | None = None) -> str:
    """Return `dtype`; for "auto", "float32" on CPUs, which multiply it faster, and "bfloat16" on other devices."""
    if dtype != "auto":
        return dtype
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    return "float32" if device.platform == "cpu" else "bfloat16"


def open_model(
    model: str | Path,
    *dtypes: str,
    scalar: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Path, QwenConfig, Tokenizer]:
    """Find a model by its directory or hub id; return its local directory, its config and its tokenizer. scalar: it is
    a scalar reward model. chat_template_kwargs: as of `load`. Raises InputError for anything wrong in them, or a dtype
    that is not known."""
    for name in dtypes:
        if name not in DTYPES:
            raise InputError(f"dtype {name!r} is not known; give one of {', '.join(DTYPES)}")
    directory = model_directory(model)
    config, tokenizer = read_config(directory, scalar=scalar), Tokenizer(directory, chat_template_kwargs)
    if len(tokenizer.hf) > config.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {len(tokenizer.hf)} tokens, the model {config.vocab_size}")
    return directory, config, tokenizer


def model_text(module: Transformer, dtype: str, mesh: Mesh) -> str:
    """Describe a model in a few words, such as "Qwen2 0.5B, 24 layers, bfloat16, mesh 1x8x1"."""
    config, size = module.config, sum(leaf.size for leaf in jax.tree.leaves(split(module)[1]))
    amount = f"{size / 1e9:.1f}B" if size >= 1e8 else f"{size / 1e6:.1f}M"
    axes = "x".join(map(str, mesh.shape.values()))
    return f"{config.model_type.capitalize()} {amount}, {config.num_layers} layers, {dtype}, mesh {axes}"


def fresh_policy(config: QwenConfig, tokenizer_directory: str | Path, *, seed: int, mesh: Mesh | None = None) -> Policy:
    """Random float32 weights with an existing tokenizer: a policy to train from nothing."""
    mesh, declared = mesh or single_device_mesh(), Qwen(config)
    with jax.set_mesh(mesh):
        params = init_params(declared, jax.random.key(seed), mesh=mesh)
    return Policy(with_params(declared, params), Tokenizer(tokenizer_directory), mesh)
