"""The names that the package takes from `jax._src` exist in the installed JAX, and one file alone takes them."""

import inspect
from pathlib import Path

import jax

from rmr1_jax import jax_private

PACKAGE = Path(jax_private.__file__).parent


def test_one_file_alone_imports_from_jax_src():
    files = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if "jax._src" in p.read_text(encoding="utf-8")]
    assert files == [Path("jax_private.py")]


def test_the_names_are_there():
    """If this fails, JAX has moved a private name: mend `jax_private.py`, and add the release to TRIED."""
    assert jax_private.coordination_client() is None  # one process
    asked = ("is_env_present", "get_process_count", "get_process_id", "get_local_process_id", "get_coordinator_address")
    for cluster in jax_private.cluster_classes():
        assert cluster.name and all(callable(getattr(cluster, name)) for name in asked)
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    taken = inspect.signature(cudnn.dot_product_attention).parameters
    given = ("query", "key", "value", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type")
    assert {*given, "qkv_layout"} <= set(taken), f"jax {jax.__version__}, tried with {jax_private.TRIED}"
    assert cudnn.MaskType.PADDING_CAUSAL
