"""Attention with shared prompts by kernels that know segments only: rows are unfolded, and the result is taken back.

In a row with `parents` several responses see one prompt. Unfolded, each response stands behind a prompt of its own, as
one segment, so any kernel for packed rows computes it. Only q, k and v are repeated; all else of a layer runs on the
row as it is. Both directions, and their gradients, are gathers: a scatter that adds is slow on TPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from rmr1_jax.model.gather import at, take

# The positions of an unfolded row, in rows. Packing puts no more into a row than unfolds to this.
UNFOLDED_ROWS = 3


class Unfolding(NamedTuple):
    """Where the tokens of rows [B, T] stand in unfolded rows [B, U], U = UNFOLDED_ROWS x T.

    segment_ids, parents: of the rows. source: the token at each place. unfolded_ids: one segment for each response, 0
    is padding. starts: for each token, where the first response that it belongs to starts in the row; within: how many
    tokens of that response and its prompt are before it. offsets, nexts: for each token that starts a response, the
    first place of its copy of the prompt, and the token behind the response. fits: whether a row unfolds to at most U.
    """

    segment_ids: Int[Array, "B T"]
    parents: Int[Array, "B T"]
    source: Int[Array, "B U"]
    unfolded_ids: Int[Array, "B U"]
    starts: Int[Array, "B T"]
    within: Int[Array, "B T"]
    offsets: Int[Array, "B T"]
    nexts: Int[Array, "B T"]
    fits: Bool[Array, " B"]


def attend_unfolded(
    attend: Callable[..., jax.Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[ArrayLike, "B T"],
    parents: Int[ArrayLike, "B T"],
) -> Float[Array, "B T N H"]:
    """Compute `attend(q, k, v, segment_ids)`, causal within segments, for rows whose segments see a parent too, which
    they follow directly. NaN in a row that unfolds to more than `UNFOLDED_ROWS` times its length: never a wrong
    number."""
    plan = unfolding(jnp.asarray(segment_ids), jnp.asarray(parents))
    out = attend(*(_unfold(x, plan) for x in (q, k, v)), plan.unfolded_ids)
    places = jnp.where(plan.segment_ids > 0, at(plan.offsets, plan.starts) + plan.within, out.shape[1])
    is_first = (plan.unfolded_ids > 0) & (at(places, plan.source) == jnp.arange(out.shape[1]))
    folded = take(out, places, jnp.where(is_first, plan.source, q.shape[1]))  # of a prompt's token its first copy
    return jnp.where(plan.fits[:, None, None, None], folded, jnp.nan)


def unfolding(segment_ids: Int[Array, "B T"], parents: Int[Array, "B T"]) -> Unfolding:
    """Lay each response of each row out behind its own prompt."""
    B, T = segment_ids.shape
    U, token = UNFOLDED_ROWS * T, jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), segment_ids.shape)
    begins = segment_ids != jnp.pad(segment_ids[:, :-1], [(0, 0), (1, 0)])
    begin = lax.cummax(jnp.where(begins, token, 0), axis=1)
    # The next token at which a segment begins, T at the end.
    end = jnp.pad(
        lax.cummin(jnp.where(begins, token, T), axis=1, reverse=True)[:, 1:], [(0, 0), (0, 1)], constant_values=T
    )
    prompt = (segment_ids > 0) & (at(parents, end) == segment_ids)
    # A response follows its prompt directly, or other responses of it.
    prompt_begin = lax.cummax(jnp.where(prompt, begin, 0), axis=1)
    before = jnp.where(parents > 0, lax.cummax(jnp.where(prompt, end, 0), axis=1) - prompt_begin, 0)
    starts_response = begins & (segment_ids > 0) & ~prompt
    size = jnp.where(starts_response, before + end - begin, 0)
    total = jnp.cumsum(size, axis=1)
    offsets = total - size
    # The token that starts the response at each place.
    marks = jnp.zeros((B, U), jnp.int32)
    marks = marks.at[jnp.arange(B)[:, None], jnp.where(starts_response, offsets, U)].set(token, mode="drop")
    start = lax.cummax(marks, axis=1)
    place = jnp.arange(U, dtype=jnp.int32) - at(offsets, start)
    from_prompt = place < at(before, start)
    source = jnp.where(from_prompt, at(prompt_begin, start) + place, start + place - at(before, start))
    real = jnp.arange(U) < total[:, -1:]
    return Unfolding(
        segment_ids,
        parents,
        jnp.where(real, source, 0),
        jnp.where(real, at(segment_ids, start), 0),
        jnp.where(prompt, end, begin),
        jnp.where(prompt, 0, before) + token - begin,
        offsets,
        end,
        total[:, -1] <= U,
    )


@jax.custom_vjp
def _unfold(x: jax.Array, plan: Unfolding) -> jax.Array:
    """[B, T, N, H] -> [B, U, N, H]."""
    return at(x, plan.source)


def _unfold_backward(plan: Unfolding, d_out: jax.Array) -> tuple[jax.Array, None]:
    """Add up the copies of each token, one gather for each copy of a prompt."""
    T = plan.segment_ids.shape[1]

    def add(state):
        starts, alive, total = state
        part = at(d_out, at(plan.offsets, starts) + plan.within)
        total += jnp.where(alive[:, :, None, None], part, 0)
        following = at(plan.nexts, starts)
        alive &= (following < T) & (at(plan.parents, following) == plan.segment_ids)
        return following, alive, total

    zeros = jnp.zeros((*plan.segment_ids.shape, *d_out.shape[2:]), jnp.float32)
    _, _, total = lax.while_loop(lambda state: state[1].any(), add, (plan.starts, plan.segment_ids > 0, zeros))
    return total.astype(d_out.dtype), None


_unfold.defvjp(lambda x, plan: (_unfold(x, plan), plan), _unfold_backward)
