"""`rmr1 export` holds one weight at a time, and leaves accelerators alone."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import optax
import pytest
import yaml
from policies import tiny_policy

from rmr1_jax.model.config import parse_config
from rmr1_jax.policy import fresh_policy
from rmr1_jax.train.checkpoint import Checkpointer
from rmr1_jax.train.optim import TrainState

RAW = {"model_type": "qwen2", "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "head_dim": 64}
RAW |= {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}

EXPORT = """
    import sys
    from rmr1_jax.cli.main import main

    def memory(key):  # VmRSS: resident now; VmHWM: the kernel's own high-water mark of it
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

    small, large = sys.argv[1:]
    assert main(["export", f"{small}/run", "--out", f"{small}/out"]) == 0  # libraries and runtime are warm
    before = memory("VmRSS")
    assert main(["export", f"{large}/run", "--out", f"{large}/out", "--dtype", "float32"]) == 0
    print(memory("VmHWM") - before)
"""


def make_run(root, layers: int) -> int:
    """A model and a run with one checkpoint of it, in float32; returns the bytes of the weights."""
    config = parse_config(RAW | {"num_hidden_layers": layers}, "test")
    policy = fresh_policy(config, tiny_policy().tokenizer.directory, seed=0)
    policy.save(root / "model")
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(yaml.safe_dump({"model": str(root / "model")}))
    with Checkpointer(root / "run", keep=1) as checkpoints:
        checkpoints.save(TrainState(policy.params, optax.EmptyState(), jnp.int32(1)), {})
    return sum(x.nbytes for x in jax.tree.leaves(policy.params))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory from Linux's /proc")
def test_peak_memory_of_an_export_on_a_host_without_a_free_accelerator(tmp_path):
    """About 210 MB in a fresh process, whose JAX_PLATFORMS names a platform that cannot be started here."""
    make_run(tmp_path / "small", 1)
    size = make_run(tmp_path / "large", 16)
    assert 2.0e8 < size < 2.2e8
    command = [sys.executable, "-c", textwrap.dedent(EXPORT), tmp_path / "small", tmp_path / "large"]
    # With the threshold, the allocator returns freed blocks at once: what is measured is held.
    environment = os.environ | {"JAX_PLATFORMS": "tpu", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"peak {peak / size:.2f} of the {size / 1e6:.0f} MB exported")
    assert peak <= 0.8 * size
    written, stored = (root / "model.safetensors" for root in (tmp_path / "large/out", tmp_path / "large/model"))
    assert written.read_bytes() == stored.read_bytes()
