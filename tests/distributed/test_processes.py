"""Several processes: they find each other or say who is missing, and two of four devices do what one of eight does."""

import functools
import json
import os
import re
import shutil
import socket
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hosts import free_port, start
from process_worker import run_stage
from training import assert_same, metrics_but_timings, small_grpo, small_sft

from rmr1_jax.config import dump_config
from rmr1_jax.distributed.exchange import all_shares, first, gather, own_share, wait
from rmr1_jax.distributed.join import Place, find_place, roll_call
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.policy import load

SUPPORT = Path(__file__).resolve().parents[1] / "support"

MESH = MeshConfig(fsdp=4, tensor=2)
CONFIGS = {
    "sft": {"max_steps": 4, "save_every": 2, "rows_per_step": 16, "micro_rows": 8, "mesh": MESH},
    # Nine prompts: five for one process, four for the other; three updates a step.
    "grpo": {
        "steps": 3,
        "save_every": 2,
        "prompts_per_step": 9,
        "mini_batch_prompts": 3,
        "micro_rows": 8,
        "mesh": MESH,
        "sampling_tensor": 1,
        "dynamic_sampling": 2,
    },
}


def run_in_two(stage: str, model: Path, config) -> None:
    """A stage in two processes of four devices."""
    path, port = model.parent / f"{Path(config.out).name}.yaml", free_port()
    path.write_text(dump_config(config), encoding="utf-8")
    worker = str(SUPPORT / "process_worker.py")
    both = [start([sys.executable, worker, stage, str(model), str(path)], i, 2, port) for i in (0, 1)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)


# ---- who is there


def call_the_roll(*callers: tuple[int, int], port: int, timeout: float) -> list[str]:
    """The roll call of processes (number, of how many), each in a thread: "there", or what it raises."""

    def call(index: int, count: int) -> str:
        try:
            roll_call(f"127.0.0.1:{port}", count, index, timeout)
        except RunError as e:
            return str(e)
        return "there"

    with ThreadPoolExecutor(len(callers)) as pool:
        return list(pool.map(lambda caller: call(*caller), callers))


def test_all_are_there_and_the_port_is_free_again():
    port = free_port()
    for _ in range(3):
        assert call_the_roll((0, 3), (1, 3), (2, 3), port=port, timeout=30) == ["there"] * 3


def test_strangers_at_the_port_are_not_counted():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(call_the_roll, (0, 2), port=port, timeout=30)
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"2 x y\n"):
            with connect(port) as stranger:
                stranger.sendall(said)
        assert call_the_roll((1, 2), port=port, timeout=30) == others.result() == ["there"]


def test_a_process_that_is_started_again_is_counted_once():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first_one = pool.submit(call_the_roll, (0, 3), port=port, timeout=30)
        with connect(port) as died:
            died.sendall(b"3 1 elsewhere\n")
        assert call_the_roll((2, 3), (1, 3), port=port, timeout=30) == first_one.result() * 2 == ["there"] * 2


def connect(port: int) -> socket.socket:
    """A connection to a port that is about to be there."""
    for _ in range(100):
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.05)
    raise AssertionError("nobody listens")


def test_those_who_are_missing_are_named_everywhere_in_time():
    began = time.monotonic()
    said = call_the_roll((0, 5), (1, 5), (4, 5), port=free_port(), timeout=1)
    present = ", ".join(f"{i} on {socket.gethostname()}" for i in (0, 1, 4))
    missing = f"processes 2, 3 of 5 did not appear within 1 s (present: {present}); start every process, on every host"
    assert said == [missing] * 3
    assert time.monotonic() - began < 5


def test_a_missing_first_process_is_named():
    port = free_port()
    (said,) = call_the_roll((1, 2), port=port, timeout=0.5)
    assert re.match(rf"process 0, the coordinator at 127.0.0.1:{port}, was not there within 0.5 s", said)


@pytest.mark.parametrize(
    ("callers", "message"),
    [
        ([(0, 3), (1, 3), (1, 3)], "process 1 is there twice, on {here} and on {here}"),
        ([(0, 3), (1, 4)], "process 1 on {here} was told of 4 processes, process 0 of 3"),
    ],
)
def test_processes_that_contradict_each_other(callers, message):
    said = call_the_roll(*callers, port=free_port(), timeout=30)
    assert set(said) == {message.format(here=socket.gethostname())}


@pytest.mark.slow
def test_the_command_says_who_is_missing(tmp_path):
    (tmp_path / "c.yaml").write_text(f"out: {tmp_path}/run\n")
    port, command = free_port(), [sys.executable, "-m", "rmr1_jax", "sft", str(tmp_path / "c.yaml")]
    there = [start(command, i, 3, port, RMR1_START_TIMEOUT="12") for i in (0, 2)]
    for process in there:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 1
        assert re.search(r"^error: process 1 of 3 did not appear within 12 s \(present: 0 on .*, 2 on ", said, re.M), (
            said
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["both", "second"])
def test_a_process_that_fails_leaves_with_its_own_code(failing):
    """It does not wait for the others, which may wait for it in the middle of a step."""
    code = f"""
import time, jax
from rmr1_jax.errors import InputError
from rmr1_jax.processes import together, wait
with together():
    assert jax.process_count() == 2
    wait("all")
    if {failing == "both"} or jax.process_index() == 1:
        raise InputError("bad")
    time.sleep(300)
"""
    code = f"import sys\ntry:\n{textwrap.indent(code, '    ')}\nexcept ValueError:\n    sys.exit(2)\n"
    port = free_port()
    both = [start([sys.executable, "-c", code], i, 2, port) for i in (0, 1)]
    try:
        for process in both if failing == "both" else both[1:]:
            said, _ = process.communicate(timeout=200)
            assert process.returncode == 2, said
    finally:
        both[0].kill()
        both[0].communicate()


# ---- what the environment says

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
TOLD = {"RMR1_COORDINATOR": "h:1234", "RMR1_PROCESSES": "4", "RMR1_PROCESS": "3"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        (TOLD, Place("h:1234", 4, 3)),
        (TOLD | SLURM, Place("h:1234", 4, 3)),
        ({"RMR1_PROCESSES": "1"} | SLURM, None),
        (SLURM, Place(f"node3:{77 + 65536 - 4096}", 2, 1, [0])),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, Place("node3:99", 2, 1, [0])),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
)
def test_the_place_of_a_process(environ, place, monkeypatch):
    for name in {*SLURM, *TOLD}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find_place(os.environ, 1) == place


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"RMR1_PROCESSES": "x"}, "RMR1_PROCESSES='x' must be a whole number of at least 1"),
        ({"RMR1_PROCESSES": "0"}, "RMR1_PROCESSES='0' must be"),
        ({"RMR1_PROCESS": "4"}, r"RMR1_PROCESS='4' must be a number from 0 to 3 \(RMR1_PROCESSES=4\)"),
        ({"RMR1_PROCESS": "-1"}, "RMR1_PROCESS='-1' must be"),
        ({"RMR1_COORDINATOR": "h"}, "RMR1_COORDINATOR='h' must be host:port"),
    ],
)
def test_an_environment_that_cannot_be(wrong, message):
    with pytest.raises(InputError, match=message):
        find_place(TOLD | wrong, 1)


@pytest.mark.parametrize("missing", TOLD)
def test_an_environment_that_says_half(missing):
    with pytest.raises(InputError, match=f"{missing} must be set as well"):
        find_place({k: v for k, v in TOLD.items() if k != missing}, 1)


def test_metadata_that_do_not_answer_are_no_sign_of_one_process(monkeypatch):
    def is_env_present():
        raise OSError("no route")

    monkeypatch.setattr("jax._src.clusters.GceTpuCluster.is_env_present", is_env_present)
    with pytest.raises(InputError, match=r"no route.*set RMR1_PROCESSES=1 where this is the only one"):
        find_place({}, 1)


def test_one_process_has_everything_and_waits_for_nobody():
    assert all_shares(own_share("abcde")) == list("abcde") and gather(7) == [7] and first()
    wait("anybody")


# ---- two of four devices do what one of eight does


@pytest.fixture(scope="module")
def model(tiny_policy, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "model"
    tiny_policy.save(path)
    return path


@pytest.fixture(scope="module")
def config(model):
    """(stage, name) -> the same run under a directory of this name."""
    return lambda stage, name: {"sft": small_sft, "grpo": small_grpo}[stage](
        out=str(model.parent / name), **CONFIGS[stage]
    )


@pytest.fixture(scope="module")
def in_one(model, config):
    """stage -> (trained policy, what was seen) of the run in one process with eight devices; each is made once."""
    return functools.cache(
        lambda stage: run_stage(stage, config(stage, f"{stage}-in-one"), load(model, "float32", make_mesh(MESH)))
    )


def assert_same_run(ours: str, theirs: str) -> None:
    """Metrics of every step, but for what is measured in time, and how busy a sampler was."""
    rows, expected = (
        [{k: v for k, v in row.items() if k != "occupancy"} for row in metrics_but_timings(out)]
        for out in (ours, theirs)
    )
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        numbers = {k: v for k, v in other.items() if isinstance(v, float)}
        assert row == row | other | {k: pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in numbers.items()}


def copy_half(run: str, to: str) -> None:
    """A run as it was before its last checkpoint."""
    shutil.copytree(run, to)
    shutil.rmtree(max(Path(to, "checkpoints").iterdir(), key=lambda p: int(p.name)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", CONFIGS)
def test_two_processes_do_what_one_does(model, config, in_one, stage):
    """Data order, samples, losses, weights, and what is written; then one process goes on from their checkpoint."""
    one, two, after = (config(stage, f"{stage}-in-{x}") for x in ("one", "two", "one-after-two"))
    trained, seen = in_one(stage)
    run_in_two(stage, model, two)
    for i in (0, 1):
        assert json.loads(Path(f"{two.out}-seen-{i}.json").read_text()) == seen
    assert_same_run(two.out, one.out)
    assert_same(load(f"{two.out}/model", "float32").params, trained.params, atol=1e-5)
    assert sorted(os.listdir(f"{two.out}/model")) == sorted(os.listdir(f"{one.out}/model"))

    copy_half(two.out, after.out)
    resumed, rest = run_stage(stage, after, load(model, "float32", make_mesh(MESH)))
    assert rest == seen[2:]
    assert_same(resumed.params, trained.params, atol=1e-5)
    assert_same_run(after.out, one.out)


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_of_one(model, config, in_one):
    trained, _ = in_one("sft")
    one, after = (config("sft", f"sft-in-{x}") for x in ("one", "two-after-one"))
    copy_half(one.out, after.out)
    run_in_two("sft", model, after)
    assert_same_run(after.out, one.out)
    assert_same(load(f"{after.out}/model", "float32").params, trained.params, atol=1e-5)
