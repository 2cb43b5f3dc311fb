"""Sets up eight virtual CPU devices and one compilation cache for all tests, before JAX starts."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# The programs of the tests are small: most of the time is compilation, and level 0 halves it.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="rmr1-test-cache-"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

# The shapes and dtypes in the signatures of these rooms are checked at every call, here and nowhere else.
install_import_hook(["rmr1_jax.model", "rmr1_jax.sampler", "rmr1_jax.train"], "signatures.check")

import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data next to the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tiny_policy():
    """Random float32 weights on one device, with the small world's tokenizer."""
    import policies

    return policies.tiny_policy()


@pytest.fixture(scope="session")
def world_tokenizer(tiny_policy) -> Path:
    """The directory of the tokenizer of `tiny_policy`."""
    return tiny_policy.tokenizer.directory
