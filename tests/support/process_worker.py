"""One of several processes of a run: `python process_worker.py STAGE MODEL CONFIG.yaml`, with RMR1_PROCESS and the like
in the environment. Each process writes the rollouts that it saw beside the run, as seen-<its number>.json."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from training import run, small_prompts, vowels

from rmr1_jax.config import load_config
from rmr1_jax.distributed import exchange
from rmr1_jax.distributed.exchange import all_shares, gather, own_share
from rmr1_jax.distributed.join import join_processes
from rmr1_jax.distributed.mesh import MeshConfig, local_mesh, make_mesh, own_rows, place_rows, sampling_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.policy import load
from rmr1_jax.train.config import GrpoConfig, SftConfig
from rmr1_jax.train.grpo import grpo


def run_stage(stage: str, config, policy):
    """Run a stage on small data. Returns the policy, and for GRPO (id, tokens, rewards) of each group of each step."""
    if stage == "sft":
        return run(stage, config, policy), []
    seen = []

    def look(step, groups):
        seen.append([[g.prompt.id, [s.token_ids for s in g.samples], g.rewards.tolist()] for g in groups])

    given = {"prompts": small_prompts(policy), "eval_prompts": small_prompts(policy, 13)[10:], "reward": vowels}
    trained = grpo(config, policy=policy, on_rollout=look, **given)
    return trained, seen


def check_rows_and_exchange() -> None:
    """Check the rows that each process holds, on meshes where processes own rows and where they share them, and the
    exchange of values."""
    whole = np.arange(24.0).reshape(8, 3)
    for sizes, rows in (({"replica": 2}, 4), ({"tensor": 2}, 4), ({"tensor": 8}, 8), ({"tensor": 4, "replica": 2}, 4)):
        mesh = make_mesh(MeshConfig(**sizes))
        own = own_rows(mesh, 8)
        assert own == list(range(8) if rows == 8 else range(4 * jax.process_index(), 4 * jax.process_index() + 4))
        placed = place_rows(mesh, "BT", {"x": whole[own]}, 8)["x"]
        assert placed.shape == (8, 3)
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        if rows == 8:
            with pytest.raises(InputError, match=r"sampling_tensor=8 .* which has 4 of the 8 devices; .* \[1, 2, 4\]"):
                sampling_mesh(mesh)
        local = local_mesh(sampling_mesh(mesh, 2))
        assert local.devices.shape == (1, 2, 2) and list(local.devices.flat) == jax.local_devices()
    exchange.GATHER_BYTES = 2048
    assert gather("x" * 3000 * jax.process_index()) == ["", "x" * 3000]
    for count in (0, 1, 2, 5):
        assert all_shares([10 * i for i in own_share(range(count))]) == [10 * i for i in range(count)]


def main(stage: str, model: str, path: str) -> None:
    with join_processes():
        config = load_config({"sft": SftConfig, "grpo": GrpoConfig}[stage], path)
        assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
        check_rows_and_exchange()
        policy = load(model, "float32", make_mesh(config.mesh), master_dtype="float32")
        _, seen = run_stage(stage, config, policy)
        file = Path(config.out).with_name(f"{Path(config.out).name}-seen-{jax.process_index()}.json")
        file.write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
