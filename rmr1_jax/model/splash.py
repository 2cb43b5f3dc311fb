"""Attention on TPUs: the splash kernel that JAX ships (Pallas), with segment ids and a fused backward pass.

Never more than a block of scores exists. On other machines the kernel runs in Pallas' interpreter, which is slow and is
there for tests: the numbers of the TPU path can be checked without a TPU. Called by `attention.attend` alone.
"""

from __future__ import annotations

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)
from jax.sharding import PartitionSpec

from rmr1_jax.errors import InputError
from rmr1_jax.mesh import activation_spec

# Rows of a block, the largest that divides the row length; a TPU's lane holds 128. The fused backward pass makes a
# gradient of all queries for every block of keys before it adds them up: larger blocks of keys, less memory.
BLOCKS = (1024, 512, 256, 128)
KEY_BLOCKS = (3072, 2048, *BLOCKS)


def splash_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Causal self-attention within segments; the tokens of a segment must lie in the order of their positions.

    Args:
        q: [B, T, N, H], scaled. k, v: [B, T, K, H], N a multiple of K. segment_ids: [B, T] int32.

    Returns:
        [B, T, N, H] in q's dtype. What padding (segment 0) gets means nothing: it sees the padding before it.

    Raises:
        InputError: T is not a multiple of 128.
    """
    T = q.shape[1]
    if T % BLOCKS[-1]:
        longer = -(-T // BLOCKS[-1]) * BLOCKS[-1]
        raise InputError(f"row_length={T}: TPU attention takes multiples of {BLOCKS[-1]}; try {longer}")
    block = next(b for b in BLOCKS if T % b == 0)
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=min(block, 512),  # with 1,024 rows the blocks of 3,072 keys overflow VMEM at a head size of 64
        block_kv_dkv=next(b for b in KEY_BLOCKS if T % b == 0),
        block_kv_dkv_compute=min(block, 512),
        use_fused_bwd_kernel=True,
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        mask = MultiHeadMask([CausalMask((T, T))] * q.shape[2])
        kernel = make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
        heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
        out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=SegmentIds(s, s)))(*heads_first, segment_ids)
        return out.swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, segment_ids)
    # A kernel is a black box to the compiler: rows and heads are dealt out by hand. Heads as the keys' divide.
    heads = activation_spec(mesh, "BTKH", k.shape)
    mapped = jax.shard_map(
        local, in_specs=(heads, heads, heads, PartitionSpec(heads[0])), out_specs=heads, check_vma=False
    )
    return mapped(q, k, v, segment_ids)
