"""Everything that the package imports from `jax._src`, which JAX may change in any release.

No public name exists for what is here. `TRIED` lists the releases of JAX that it was run with: the tests with the
first, training on one GPU, by cuDNN's attention, with the second. `tests/test_jax_private.py` fails where one
of these names has moved, and where another file imports from `jax._src`.
Nothing is imported before a function is called, so a change breaks what needs the name and nothing else.
"""

from __future__ import annotations

from typing import Any

import jax

TRIED = ("0.10.2", "0.11.2")


def coordination_client() -> Any:
    """Return the client of JAX's coordination service, which has a key-value store; None in a run of one process."""
    from jax._src.distributed import global_state

    return global_state.client


def cluster_classes() -> tuple[type, ...]:
    """Return the classes that detect a cluster: Slurm, GKE, and TPU virtual machines of Google's Compute Engine."""
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, SlurmCluster

    return SlurmCluster, GkeTpuCluster, GceTpuCluster


# The primitive whose results are the output of `cudnn_packed_attention` and what its backward pass needs.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def cudnn_packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Causal attention within the segments of packed rows by cuDNN (Hopper and newer). `jax.nn.dot_product_attention`
    takes one length a row only.

    Args:
        q: [B, T, N, H] bfloat16 or float16, scaled. k, v: the same shape: up to JAX 0.10.2 the offsets of grouped heads
            are silently wrong (jax#39521). lengths: [B, M] int32, the tokens of each segment, M at least 2; offsets:
            [B, M + 1] int32, the position in its row at which each begins. Both are -1 where there is no segment.

    Returns:
        [B, T, N, H]. What lies in no segment is not written, here and in the gradients.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    packed = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": offsets, "kv_offsets": offsets}
    mask = MaskType.PADDING_CAUSAL
    return dot_product_attention(q, k, v, **packed, scale=1.0, mask_type=mask, qkv_layout="BTNH")
