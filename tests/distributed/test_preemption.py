"""SIGTERM: recorded, raised in interruptible work, agreed on by all processes, and obeyed within the grace period."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from hosts import free_port, start
from training import assert_same, metrics_but_timings, run, small_grpo, small_sft

from rmr1_jax.cli import main as cli
from rmr1_jax.distributed.heartbeat import Heartbeat
from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.distributed.preemption import PREEMPTED, Preempted, Preemption
from rmr1_jax.errors import RunError, exit_code
from rmr1_jax.policy import load
from rmr1_jax.train import grpo as grpo_stage
from rmr1_jax.train import health, rollout
from rmr1_jax.train import sft as sft_stage
from rmr1_jax.train.checkpoint import steps_of
from rmr1_jax.train.health import check_finite
from rmr1_jax.train.metrics import MetricsLog, read_metrics
from rmr1_jax.train.micro_batches import to_micro_batches
from rmr1_jax.train.rewards import rewards_of


def send_sigterm() -> None:
    """Send SIGTERM to this process, and wait until it has been handled."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


@pytest.fixture(scope="module")
def policy(tiny_policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("preemption") / "model"
    tiny_policy.save(path)
    return load(path, "float32", single_device_mesh())


# ---- one process


def test_the_signal_is_recorded_and_raised_in_interruptible_work():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached()
        send_sigterm()
        assert preemption.reached()
        with pytest.raises(Preempted), preemption.interruptible():
            raise AssertionError("the block must not run")
    assert signal.getsignal(signal.SIGTERM) is before


def test_interruptible_work_ends_at_once():
    with Preemption() as preemption:
        began = time.monotonic()
        with pytest.raises(Preempted) as e, preemption.interruptible():
            threading.Timer(0.1, send_sigterm).start()
            time.sleep(60)
        assert time.monotonic() - began < 5 and e.value.code == exit_code(e.value) == PREEMPTED == 42
        assert preemption.reached()


def test_the_innermost_context_receives_the_signal():
    with Preemption() as outer, outer.interruptible():
        with Preemption() as inner:
            send_sigterm()
            assert inner.reached()
        assert not outer.reached()
        with pytest.raises(Preempted):
            send_sigterm()


def test_a_context_in_another_thread_does_nothing():
    reached = []

    def work():
        with Preemption() as preemption:
            reached.append(preemption.reached())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [False]


@pytest.mark.slow
@pytest.mark.parametrize(("hold", "least", "most"), [(0.0, 1.0, 8.0), (4.0, 4.0, 12.0)])
def test_the_process_ends_after_the_grace_period(hold, least, most):
    """The main thread runs no signal handler, as in a compilation. A save in progress is not cut off."""
    code = f"""
        import ctypes, time
        from rmr1_jax.distributed.preemption import Preemption
        with Preemption() as preemption:
            until = time.monotonic() + {hold}
            preemption.hold = lambda: time.monotonic() < until
            print("ready", flush=True)
            mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
            lock(mutex)
            lock(mutex)  # blocks in C without end, and no signal interrupts it
    """
    environ = os.environ | {"RMR1_GRACE_SECONDS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED and least <= time.monotonic() - began < most
    assert "SIGTERM: saving and stopping" in said and "cannot save within 1 s" in said


def test_the_command_ends_with_42(monkeypatch, capsys):
    def run(self):
        send_sigterm()
        raise AssertionError("it went on")

    monkeypatch.setattr(cli.Report, "run", run)
    assert cli.main(["report", "somewhere"]) == PREEMPTED
    assert "stopped by SIGTERM; run the same command again" in capsys.readouterr().err


# ---- training


def at_step(monkeypatch, number: int, then) -> None:
    """Call `then` when the metrics of a step have been written."""
    write = MetricsLog.write

    def write_and(self, metrics):
        write(self, metrics)
        if metrics["step"] == number:
            then()

    monkeypatch.setattr(MetricsLog, "write", write_and)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_saves_on_sigterm_and_resumes_bitwise(stage, policy, tmp_path, monkeypatch):
    """At the end of a step, and for GRPO also inside a rollout, which is then repeated."""
    make = small_sft if stage == "sft" else small_grpo
    length = {"sft": {"max_steps": 6}, "grpo": {"steps": 4}}[stage]
    whole, hurt = (make(out=str(tmp_path / name), save_every=100, **length) for name in ("whole", "hurt"))
    expected = run(stage, whole, policy)
    with monkeypatch.context() as patched:
        at_step(patched, 1, send_sigterm)
        with pytest.raises(Preempted):
            run(stage, hurt, policy)
    assert steps_of(tmp_path / "hurt" / "checkpoints") == [2] and len(read_metrics(hurt.out)) == 2
    if stage == "grpo":
        asked = []

        def interrupted(reward, texts, prompts):  # the run's own reward, which a run may not change
            def counted(text, prompt):
                asked.append(text)
                if len(asked) == 19:  # of 16 for each step: in the second rollout from here on
                    send_sigterm()
                return reward(text, prompt)

            return rewards_of(counted, texts, prompts)

        with monkeypatch.context() as patched, pytest.raises(Preempted):
            patched.setattr(rollout, "rewards_of", interrupted)
            run(stage, hurt, policy)
        assert len(asked) == 19 and steps_of(tmp_path / "hurt" / "checkpoints") == [2, 3]
    resumed = run(stage, hurt, policy)
    assert_same(resumed.params, expected.params)
    assert metrics_but_timings(hurt.out) == metrics_but_timings(whole.out)


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_counted(policy, tmp_path, monkeypatch, capsys):
    """The weights are those of the other steps, and a file describes the batch."""
    places = to_micro_batches

    def poisoned(batch, *rest):
        stacks, facts = places(batch, *rest)
        micro = stacks[0][0]
        if len(seen) == 2:
            trained = int(micro["weights"][0, 0].argmax())  # the head reads no other position
            micro["weights"] = micro["weights"].at[0, 0, trained].set(jnp.inf)
        seen.append(batch)
        return stacks, facts

    seen: list = []
    monkeypatch.setattr(sft_stage, "to_micro_batches", poisoned)
    config = small_sft(out=str(tmp_path), max_steps=4, on_nonfinite="skip", save_every=1)
    run("sft", config, policy)
    rows = read_metrics(tmp_path)
    assert [row["loss"] is None for row in rows] == [False, False, True, False]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1]
    assert rows[3]["lr"] == rows[2]["lr"] and (tmp_path / "model").exists()
    assert "step 2: " in (said := capsys.readouterr().err) and "The update is skipped" in said
    facts = json.loads((tmp_path / "nonfinite_step_2.json").read_text())
    assert [x["length"] for x in facts["batch"]] == seen[2].lengths and facts["batch"][0]["id"].startswith("sft-")
    assert sum(x["trained"] for x in facts["batch"]) == seen[2].trained_tokens
    assert facts["norms"]["params.embed"] > 0 and facts["metrics"]["grad_norm"] in ("nan", "inf")


@pytest.mark.slow
def test_one_of_several_updates_is_skipped(policy, tmp_path, monkeypatch):
    """GRPO: the metrics are those of the other update, and the step counts, so that a resumed run is in place."""
    check, numbers = check_finite, iter(range(100))

    def second_is_bad(row, *rest, **named):
        return check(row | ({"loss": float("nan")} if next(numbers) == 1 else {}), *rest, **named)

    monkeypatch.setattr(grpo_stage, "check_finite", second_is_bad)
    config = small_grpo(out=str(tmp_path), steps=2, mini_batch_prompts=2, on_nonfinite="skip", save_every=1)
    run("grpo", config, policy)
    rows = read_metrics(tmp_path)
    assert [row["skipped"] for row in rows] == [1, 1] and all(row["loss"] is not None for row in rows)
    facts = json.loads((tmp_path / "nonfinite_step_0.json").read_text())
    assert len(facts["batch"]) == 2 and len(facts["batch"][0]["rewards"]) == 4
    assert steps_of(tmp_path / "checkpoints") == [2, 4]


def test_a_collapse_is_reported_once(capsys):
    watch = health.CollapseWatch()
    fine = {"reward": 0.1, "verdict_a": 0.4, "truncated": 0.2}
    for step, row in enumerate([fine, *[fine | {"reward": -1.0}] * 9, fine, *[fine | {"verdict_a": 0.0}] * 4, fine]):
        watch.look(row, step)
    (said,) = capsys.readouterr().err.splitlines()
    assert said == ("warning: at step 5, for 5 steps in a row, every reward is -1: the policy may have collapsed")
    for step in range(5):
        watch.look({"verdict_a": 1.0, "truncated": 1.0}, step)
    assert [re.search("every .* (A|limit)", x) is not None for x in capsys.readouterr().err.splitlines()] == [True] * 2


def test_texts_that_are_cut_off_at_the_first_step_get_a_remedy(capsys):
    for cut, said in {0.86: True, 0.49: False, 1.0: True}.items():
        watch = health.CollapseWatch()
        for step in range(3):
            watch.look({"reward": 0.1, "truncated": cut}, step)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == said
        if said:
            assert lines[0].startswith(
                f"warning: at step 0, {cut:.0%} of the texts are cut off at sampling.max_new_tokens"
            )


# ---- several processes

TWO = """
    import os, sys, time
    from rmr1_jax.distributed.join import join_processes
    from rmr1_jax.distributed.preemption import Preempted, Preemption
    import jax
    with join_processes(), Preemption() as preemption:
        for step in range(10_000):
            if preemption.reached():
                print("agreed at", step, flush=True)
                raise Preempted
            if step == 5:
                print("ready", flush=True)
            time.sleep(0.05)
"""


def two(code: str, **environ: str) -> list[subprocess.Popen]:
    port = free_port()
    return [start([sys.executable, "-c", textwrap.dedent(code)], i, 2, port, **environ) for i in (0, 1)]


def until_ready(processes) -> None:
    for process in processes:
        assert any(line.startswith("ready") for line in process.stdout)


@pytest.mark.slow
def test_one_of_two_processes_gets_sigterm_and_both_stop_at_the_same_step():
    both = two(TWO)
    until_ready(both)
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [PREEMPTED] * 2, said
    first, second = (re.findall(r"agreed at \d+", text) for text in said)
    assert first == second and len(first) == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_that_is_lost_is_named_by_the_other(victim):
    both = two(TWO, RMR1_LOST_TIMEOUT="3")
    until_ready(both)
    both[victim].kill()
    said, _ = both[1 - victim].communicate(timeout=60)
    both[victim].communicate()
    assert both[1 - victim].returncode in (PREEMPTED, -signal.SIGABRT), said
    if victim == 1:
        assert "error: process 1 of 2 on " in said and "goes on from its last checkpoint" in said
    else:  # process 0 holds the store: JAX itself ends the others with it, with this error
        assert "error: process 0 of 2 on " in said or "the leader task was preempted/died" in said


class Store:
    """A stand-in for the client of JAX's key-value store."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite):
        self.values[key] = value

    def key_value_dir_get(self, place):
        return [(k, v) for k, v in self.values.items() if k.startswith(place)]


def start_heartbeat(store, monkeypatch, timeout) -> tuple[list, Heartbeat]:
    stops = []
    heartbeat = Heartbeat(store, index=0, count=2, host="here", timeout=timeout)
    monkeypatch.setattr(heartbeat, "_exit", lambda *given: (stops.append(given), heartbeat._ended.set()))
    heartbeat.start()
    return stops, heartbeat


@pytest.mark.slow
def test_a_failed_process_ends_the_others_and_a_finished_one_does_not(monkeypatch):
    for code, expected in (
        ("2", "process 1 of 2 on host-b ended with exit code 2; this process ends too"),
        ("0", None),
    ):
        store = Store()
        store.values |= {"rmr1/heartbeat/1": "5 host-b", "rmr1/exit_code/1": code}
        stops, heartbeat = start_heartbeat(store, monkeypatch, timeout=1)
        heartbeat.join(6)
        assert [message for message, _ in stops] == ([expected] if expected else [])
        heartbeat.end(0)
    assert store.values["rmr1/exit_code/0"] == "0"


def test_exit_codes():
    assert [exit_code(e) for e in (RunError(""), KeyboardInterrupt(), SystemExit(7), Preempted())] == [1, 130, 7, 42]


# ---- the chaos script, a few faults of each kind


@pytest.mark.slow
def test_chaos(tmp_path):
    script = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"
    counts = ["--kills", "2", "--terms", "1", "--damages", "15", "--disk", "1", "--pairs", "0", "--cost", "0"]
    command = [sys.executable, str(script), *counts, "--out", str(tmp_path / "chaos")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "chaos" / "chaos.json").read_text())
    assert sum(row["done"] for row in found if row["fault"].startswith("damaged")) == 15
    assert not any(row["failures"] for row in found)
