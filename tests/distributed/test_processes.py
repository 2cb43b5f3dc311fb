"""Several processes: start-up, errors that name the missing, and equality of two processes with one."""

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
from rmr1_jax.distributed.join import ProcessInfo, check_attendance, process_info
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.policy import load

SUPPORT = Path(__file__).resolve().parents[1] / "support"

MESH = MeshConfig(fsdp=4, tensor=2)
CONFIGS = {
    "sft": {
        "max_steps": 4,
        "save_every": 2,
        "rows_per_step": 16,
        "micro_rows": 8,
        "mesh": MESH,
        "eval_data": "given",
        "eval_every": 2,
    },
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
        "eval_every": 2,  # three held-out prompts: two for one process, one for the other
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


# ---- attendance


def attendance(*callers: tuple[int, int], port: int, timeout: float) -> list[str]:
    """The attendance check of processes (index, count), each in a thread: "present", or the message that it raises."""

    def call(index: int, count: int) -> str:
        try:
            check_attendance(f"127.0.0.1:{port}", count, index, timeout)
        except RunError as e:
            return str(e)
        return "present"

    with ThreadPoolExecutor(len(callers)) as pool:
        return list(pool.map(lambda caller: call(*caller), callers))


def test_all_are_present_and_the_port_is_free_afterwards():
    port = free_port()
    for _ in range(3):
        assert attendance((0, 3), (1, 3), (2, 3), port=port, timeout=30) == ["present"] * 3


def test_other_programs_at_the_port_are_not_counted():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(attendance, (0, 2), port=port, timeout=30)
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"2 x y\n"):
            with connect(port) as other:
                other.sendall(said)
        assert attendance((1, 2), port=port, timeout=30) == others.result() == ["present"]


def test_a_process_that_is_restarted_is_counted_once():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first_one = pool.submit(attendance, (0, 3), port=port, timeout=30)
        with connect(port) as died:
            died.sendall(b"3 1 elsewhere\n")
        assert attendance((2, 3), (1, 3), port=port, timeout=30) == first_one.result() * 2 == ["present"] * 2


def connect(port: int) -> socket.socket:
    """A connection to a port on which somebody is about to listen."""
    for _ in range(100):
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.05)
    raise AssertionError("nobody listens on the port")


def test_every_process_names_the_missing_ones_in_time():
    began = time.monotonic()
    said = attendance((0, 5), (1, 5), (4, 5), port=free_port(), timeout=1)
    present = ", ".join(f"{i} on {socket.gethostname()}" for i in (0, 1, 4))
    missing = f"processes 2, 3 of 5 did not appear within 1 s (present: {present}); start every process, on every host"
    assert said == [missing] * 3
    assert time.monotonic() - began < 5


def test_a_missing_process_0_is_named():
    port = free_port()
    (said,) = attendance((1, 2), port=port, timeout=0.5)
    assert re.match(
        rf"process 0, the coordinator at 127.0.0.1:{port}, did not appear within 0.5 s, reports process 1 of 2", said
    )


@pytest.mark.parametrize(
    ("callers", "message"),
    [
        ([(0, 3), (1, 3), (1, 3)], "process 1 was started twice, on {here} and on {here}"),
        ([(0, 3), (1, 4)], "process 1 on {here} expects 4 processes, process 0 expects 3"),
    ],
)
def test_processes_that_contradict_each_other(callers, message):
    said = attendance(*callers, port=free_port(), timeout=30)
    assert set(said) == {message.format(here=socket.gethostname())}


@pytest.mark.slow
def test_the_command_names_the_missing_process(tmp_path):
    (tmp_path / "c.yaml").write_text(f"out: {tmp_path}/run\n")
    port, command = free_port(), [sys.executable, "-m", "rmr1_jax", "sft", str(tmp_path / "c.yaml")]
    present = [start(command, i, 3, port, RMR1_START_TIMEOUT="12") for i in (0, 2)]
    for process in present:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 1
        assert re.search(r"^error: process 1 of 3 did not appear within 12 s \(present: 0 on .*, 2 on ", said, re.M), (
            said
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["both", "second"])
def test_a_process_that_fails_exits_with_its_own_code(failing):
    """It does not wait for the others, which may be waiting for it in a collective."""
    code = f"""
import time, jax
from rmr1_jax.errors import InputError
from rmr1_jax.distributed.exchange import wait
from rmr1_jax.distributed.join import join_processes
with join_processes():
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


# ---- the environment

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
SLURM_INFO = ProcessInfo(f"node3:{77 + 65536 - 4096}", 2, 1)
FOUR_TASKS = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "2"}
VARIABLES = {"RMR1_COORDINATOR": "h:1234", "RMR1_PROCESSES": "4", "RMR1_PROCESS": "3"}


@pytest.mark.parametrize(
    ("environ", "info"),
    [
        ({}, None),
        (VARIABLES, ProcessInfo("h:1234", 4, 3)),
        (VARIABLES | SLURM, ProcessInfo("h:1234", 4, 3)),
        ({"RMR1_PROCESSES": "1"} | SLURM, None),
        (SLURM, ProcessInfo(f"node3:{77 + 65536 - 4096}", 2, 1, [0])),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, ProcessInfo("node3:99", 2, 1, [0])),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # One task on this node: all its devices. Several: one each, or what Slurm shows of them.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}, SLURM_INFO),
        (SLURM | {"SLURM_TASKS_PER_NODE": "1(x2)"}, SLURM_INFO),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1"}, SLURM_INFO),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2)", "SLURM_NODEID": "2"}, SLURM_INFO._replace(devices=[0])),
        (SLURM | FOUR_TASKS | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, SLURM_INFO._replace(devices=[2])),
        (SLURM | FOUR_TASKS | {"CUDA_VISIBLE_DEVICES": "2"}, SLURM_INFO),
        (SLURM | FOUR_TASKS, SLURM_INFO._replace(devices=[2])),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "many"}, SLURM_INFO._replace(devices=[0])),
    ],
)
def test_process_info(environ, info, monkeypatch):
    for name in {*SLURM, *VARIABLES, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NODEID"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert process_info(os.environ, 1) == info


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
def test_wrong_variables(wrong, message):
    with pytest.raises(InputError, match=message):
        process_info(VARIABLES | wrong, 1)


@pytest.mark.parametrize("missing", VARIABLES)
def test_missing_variables(missing):
    with pytest.raises(InputError, match=f"{missing} must be set as well"):
        process_info({k: v for k, v in VARIABLES.items() if k != missing}, 1)


def test_an_unreachable_metadata_server_is_an_error(monkeypatch):
    def is_env_present():
        raise OSError("no route")

    monkeypatch.setattr("jax._src.clusters.GceTpuCluster.is_env_present", is_env_present)
    with pytest.raises(InputError, match=r"no route.*set RMR1_PROCESSES=1 if this is the only process"):
        process_info({}, 1)


def test_functions_of_one_process():
    assert all_shares(own_share("abcde")) == list("abcde") and gather(7) == [7] and first()
    wait("a barrier")


# ---- two processes of four devices equal one of eight


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
    """stage -> (trained policy, rollouts) of the run in one process with eight devices, cached."""
    return functools.cache(
        lambda stage: run_stage(stage, config(stage, f"{stage}-in-one"), load(model, "float32", make_mesh(MESH)))
    )


def assert_same_run(ours: str, theirs: str) -> None:
    """Compare the metrics of every step, except times and the occupancy of the sampler."""
    rows, expected = (
        [{k: v for k, v in row.items() if k != "occupancy"} for row in metrics_but_timings(out)]
        for out in (ours, theirs)
    )
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        numbers = {k: v for k, v in other.items() if isinstance(v, float)}
        assert row == row | other | {k: pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in numbers.items()}


def copy_half(run: str, to: str) -> None:
    """Copy a run without its last checkpoint."""
    shutil.copytree(run, to)
    shutil.rmtree(max(Path(to, "checkpoints").iterdir(), key=lambda p: int(p.name)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", CONFIGS)
def test_two_processes_equal_one(model, config, in_one, stage):
    """Data order, samples, losses, weights and files are equal; then one process resumes from their checkpoint."""
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
def test_two_processes_resume_from_the_checkpoint_of_one(model, config, in_one):
    trained, _ = in_one("sft")
    one, after = (config("sft", f"sft-in-{x}") for x in ("one", "two-after-one"))
    copy_half(one.out, after.out)
    run_in_two("sft", model, after)
    assert_same_run(after.out, one.out)
    assert_same(load(f"{after.out}/model", "float32").params, trained.params, atol=1e-5)
