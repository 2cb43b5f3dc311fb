"""Log-probabilities of given tokens, in chunks of the vocabulary: [B, T, V] logits never exist.

Both stages train on `row_logprobs`. Next: `sft.py`, which calls it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from rmr1_jax.distributed.mesh import constrain, constrain_weight, rows_divisor
from rmr1_jax.model.attention import choose
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.model.cudnn import most_segments
from rmr1_jax.model.gather import at, take
from rmr1_jax.model.qwen import Qwen
from rmr1_jax.policy import DTYPES
from rmr1_jax.train.config import RunConfig

# Whether the entropy is computed, and whether its gradient is: that takes several passes over the logits.
Entropy = Literal["none", "value", "gradient"]

CHUNK_LOGITS = 2**26  # the most logits on a device at a time: 256 MiB in float32
LANES = 128  # a chunk has a multiple of so many columns


def forward_options(config: RunConfig, model: QwenConfig, mesh: Mesh, mean_length: float = 128.0) -> dict[str, Any]:
    """The options of `row_logprobs` that a run's config decides. mean_length: the tokens of a packed sequence in the
    mean, or a lower bound. Raises InputError as `attention.choose`."""
    options = {"dtype": DTYPES[config.dtype], "head_dim": model.head_dim}
    options["max_segments"] = most_segments(config.row_length, mean_length)
    attention = choose(config.attention, mesh.devices.flat[0], **options)
    return {"dtype": DTYPES[config.dtype], "remat": config.remat, "attention": attention}


def row_logprobs(
    model: Qwen,
    batch: Mapping[str, Shaped[Array, "B _"]],
    *,
    temperature: float = 1.0,
    entropy: Entropy = "none",
    **forward: Any,
) -> TokenLogprobs:
    """`token_logprobs` of packed rows under a policy. batch: tokens, positions, segment_ids and, where prompts are
    shared, parents, int32; with trained_at (see `trained_logprobs`) of the trained tokens alone. forward: dtype, remat
    and attention, for `Qwen.hidden_states`."""
    where = (batch["positions"], batch["segment_ids"])
    hidden = model.hidden_states(batch["tokens"], *where, parents=batch.get("parents"), **forward)
    head = model.output_weight
    options = {"temperature": temperature, "entropy": entropy, "head_is_embedding": head.dims == "VD"}
    arguments = (hidden, head.get_value(), batch["tokens"])
    if "trained_at" in batch:
        return trained_logprobs(*arguments, batch["trained_at"], **options)
    return token_logprobs(*arguments, **options)


def chunk_width(columns: int, positions: int, chunk_logits: int = CHUNK_LOGITS) -> int:
    """How many of a device's `columns` of the head a chunk has, if the device has so many `positions`."""
    return min(columns, max(LANES, chunk_logits // positions // LANES * LANES))


class TokenLogprobs(NamedTuple):
    """Float32, in nats; `entropy` is None if it was not requested."""

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None


def trained_places(trained: Bool[np.ndarray, "*A T"], most: int) -> Int[np.ndarray, "*A S"] | None:
    """Return where the trained tokens of each row are, in order, then T: the `trained_at` of `trained_logprobs`. most:
    the most trained tokens of any row, in all processes. S is `places_size`; None where that is."""
    T = trained.shape[-1]
    if (size := places_size(T, most)) is None:
        return None
    places = np.where(trained, np.arange(T), T)
    return np.sort(places, axis=-1)[..., :size].astype(np.int32)


def places_size(T: int, most: int) -> int | None:
    """Return `most` rounded up to a sixteenth of T, so that programs are compiled for few sizes; None where that is T:
    then nothing is saved."""
    part = -(-T // 16)
    size = max(1, -(-most // part)) * part
    return size if size < T else None


def trained_logprobs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "_ _"],
    tokens: Int[Array, "B T"],
    trained_at: Int[Array, "B S"],
    **options: Any,
) -> TokenLogprobs:
    """`token_logprobs` at the tokens `trained_at` of each row alone (T and more: none), 0 elsewhere: the head reads S
    positions of a row and not T. options: as of `next_logprobs`."""
    T, S = tokens.shape[1], trained_at.shape[1]
    # The place of each token among the S. Row by row under vmap: rows that are split over devices then stay there.
    ranks = jnp.arange(S, dtype=jnp.int32)
    places = jax.vmap(lambda row: jnp.full(T, S, jnp.int32).at[row].set(ranks, mode="drop"))(trained_at)
    before = jnp.where(trained_at < T, trained_at - 1, T)
    read = constrain(take(hidden, before, jnp.pad(places[:, 1:], [(0, 0), (0, 1)], constant_values=S)), "BTD")
    out = next_logprobs(read, head, at(tokens, trained_at), **options)
    return jax.tree.map(lambda x: take(x, places, trained_at), out)


def token_logprobs(
    hidden: Float[Array | np.ndarray, "B T D"],
    head: Float[Array | np.ndarray, "_ _"],
    tokens: Int[Array | np.ndarray, "B T"],
    **options: Any,
) -> TokenLogprobs:
    """The log-probability of every token given the ones before it: `next_logprobs` with each at the token's own index.

    [b, t] belongs to tokens[b, t] and comes from hidden[b, t - 1]; 0 at t = 0. At the first token of a later segment of
    a packed row it is finite but means nothing (the prediction crosses from the segment before): its weight must be 0.
    """
    targets = jnp.pad(tokens[:, 1:], [(0, 0), (0, 1)])
    out = next_logprobs(hidden, head, targets, **options)
    return jax.tree.map(lambda x: jnp.pad(x[:, :-1], [(0, 0), (1, 0)]), out)


def next_logprobs(
    hidden: Float[Array | np.ndarray, "B T D"],
    head: Float[Array | np.ndarray, "_ _"],
    targets: Int[Array | np.ndarray, "B T"],
    *,
    chunk_logits: int = CHUNK_LOGITS,
    temperature: ArrayLike = 1.0,
    entropy: Entropy = "none",
    head_is_embedding: bool = False,
) -> TokenLogprobs:
    """The log-probability that each state gives to its target, without ever holding [B, T, V] logits.

    At most about `chunk_logits` logits exist on a device at a time, in the forward and in the backward pass (which
    computes them again): all positions, and as much of the vocabulary as fits. So each part of a sharded head is
    gathered, and its gradient reduced, once a pass, however many positions there are.

    hidden: the final, normed activations. head: [D, V], or with `head_is_embedding` the tied embedding [V, D]. The
    products have hidden's dtype (the head is cast to it, and its gradient is summed in the head's own dtype: pass
    float32 master weights) and yield float32 logits, divided by `temperature` (> 0). The entropy is of the whole
    distribution.
    """
    chunks = _Chunks.of(hidden, head, head_is_embedding, chunk_logits)
    return _logprobs(chunks, entropy, hidden, chunks.split(head), targets, temperature)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How the vocabulary is cut. It has N equal shards over the mesh axis `tensor`, and a chunk has `width` columns of
    each. A head in parts is [D, N, C], or [N, C, D] if it is the embedding, where C is the size of a shard."""

    shards: int
    size: int
    width: int
    dims: str

    @classmethod
    def of(cls, hidden: ArrayLike, head: ArrayLike, embedding: bool, chunk_logits: int) -> _Chunks:
        mesh, V = jax.sharding.get_abstract_mesh(), head.shape[0 if embedding else 1]
        tensor = 1 if mesh.empty else mesh.shape["tensor"]
        rows = 1 if mesh.empty else rows_divisor(mesh)
        shards = tensor if V % tensor == 0 else 1
        positions = math.prod(hidden.shape[:2]) // (rows if hidden.shape[0] % rows == 0 else 1)
        width = chunk_width(V // shards, positions, chunk_logits)
        return cls(shards, V // shards, width, "NCD" if embedding else "DNC")

    @property
    def axis(self) -> int:
        return self.dims.index("C")

    def split(self, head: ArrayLike) -> ArrayLike:
        """Reshape [D, V] or [V, D] into parts."""
        parts = (self.shards, self.size)
        return head.reshape((*parts, -1) if self.dims == "NCD" else (-1, *parts))

    @property
    def count(self) -> int:
        return -(-self.size // self.width)

    def start(self, i: ArrayLike) -> Array:
        """The first column of chunk i. The last chunk ends with the shard, so it may overlap the one before."""
        return jnp.minimum(i * self.width, self.size - self.width)

    def logits(self, i: Array, hidden: ArrayLike, head: ArrayLike, temperature: ArrayLike) -> tuple[Array, Array]:
        """The logits of chunk i, [B, T, N, width] float32, -inf where a column was in the chunk before; and the chunk
        of the head in hidden's dtype, whole on every row shard."""
        part = lax.dynamic_slice_in_dim(head, self.start(i), self.width, self.axis)
        # Constrain the slice first: otherwise the whole head would be gathered and then cut.
        part = constrain(constrain_weight(part, self.dims).astype(hidden.dtype), self.dims)
        logits = jnp.einsum(f"BTD,{self.dims}->BTNC", hidden, part, preferred_element_type=jnp.float32) / temperature
        fresh = self.start(i) + jnp.arange(self.width) >= i * self.width
        return constrain(jnp.where(fresh, logits, -jnp.inf), "BTNC"), part

    def is_target(self, i: Array, targets: Array, logits: Array) -> Array:
        """Where a logit is that of the target, [B, T, N, width] bool, only in the first chunk that has its column."""
        columns = self.start(i) + jnp.arange(self.width) + self.size * jnp.arange(self.shards)[:, None]
        return (targets[:, :, None, None] == columns) & (logits > -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logprobs(chunks: _Chunks, entropy_kind: Entropy, hidden, head, targets, temperature):
    """hidden [B, T, D] predicts targets [B, T]; the head is in parts. The backward pass is written by hand, because
    automatic differentiation would keep every chunk's logits, or differentiate the running sums."""
    return _logprobs_forward(chunks, entropy_kind, hidden, head, targets, temperature)[0]


@jax.named_scope("head")
def _logprobs_forward(chunks: _Chunks, entropy_kind: Entropy, hidden, head, targets, temperature):
    def add(i, sums):
        highest, total, chosen, weighted = sums
        logits, _ = chunks.logits(i, hidden, head, temperature)
        higher = jnp.maximum(highest, jnp.max(logits, axis=(2, 3)))
        scale, weights = jnp.exp(highest - higher), jnp.exp(logits - higher[..., None, None])
        # A masked sum fuses, and stays local where the vocabulary is sharded; a gather would do neither.
        chosen += jnp.sum(jnp.where(chunks.is_target(i, targets, logits), logits, 0.0), axis=(2, 3))
        total = total * scale + jnp.sum(weights, axis=(2, 3))
        if entropy_kind != "none":
            weighted = weighted * scale + jnp.sum(jnp.where(weights > 0, weights * logits, 0.0), axis=(2, 3))
        return higher, total, chosen, weighted

    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = (jnp.full(targets.shape, -jnp.inf), zeros, zeros, zeros)
    highest, total, chosen, weighted = lax.fori_loop(0, chunks.count, add, start)
    normalizer = highest + jnp.log(total)
    entropy = normalizer - weighted / total if entropy_kind != "none" else None
    return TokenLogprobs(chosen - normalizer, entropy), (hidden, head, targets, temperature, normalizer, entropy)


@jax.named_scope("head")
def _logprobs_backward(chunks: _Chunks, entropy_kind: Entropy, saved, d_out: TokenLogprobs):
    hidden, head, targets, temperature, normalizer, entropy = saved

    def add(i, sums):
        d_hidden, d_head = sums
        logits, part = chunks.logits(i, hidden, head, temperature)
        log_probs = logits - normalizer[..., None, None]
        probs = jnp.exp(log_probs)
        d_logits = d_out.logp[..., None, None] * (chunks.is_target(i, targets, logits) - probs)
        if entropy_kind == "gradient":
            surprise = jnp.where(logits > -jnp.inf, log_probs, 0.0) + entropy[..., None, None]
            d_logits -= d_out.entropy[..., None, None] * probs * surprise
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        d_hidden += jnp.einsum(f"BTNC,{chunks.dims}->BTD", d_logits, part, preferred_element_type=jnp.float32)
        d_part = jnp.einsum(f"BTD,BTNC->{chunks.dims}", hidden, d_logits, preferred_element_type=jnp.float32)
        d_part = constrain_weight(d_part.astype(head.dtype), chunks.dims)
        before = lax.dynamic_slice_in_dim(d_head, chunks.start(i), chunks.width, chunks.axis)
        d_head = lax.dynamic_update_slice_in_dim(d_head, before + d_part, chunks.start(i), chunks.axis)
        return constrain(d_hidden, "BTD"), constrain_weight(d_head, chunks.dims)

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, head.dtype))
    d_hidden, d_head = lax.fori_loop(0, chunks.count, add, start)
    return d_hidden.astype(hidden.dtype), d_head, None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)
