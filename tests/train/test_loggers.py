"""TensorBoard and Weights & Biases: what their own readers read is what metrics.jsonl holds, after a kill as well."""

import dataclasses
import importlib.machinery
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from logged import events_of, offline_history
from training import run, run_and_kill, small_sft

from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.policy import load
from rmr1_jax.train.loggers import Loggers, check_loggers, logged_values
from rmr1_jax.train.metrics import MetricsLog, read_metrics
from rmr1_jax.train.sft import sft

needs_tensorboard = pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="needs the extra tensorboard"
)
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs the extra wandb")


@pytest.fixture(scope="module")
def model(tiny_policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("logged") / "model"
    tiny_policy.save(path)
    return path


@pytest.fixture(scope="module")
def policy(model):
    return load(model, "float32", single_device_mesh())


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    # A process that a test starts and kills has a W&B process of its own, as one that a user starts.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


def expected(directory) -> dict[int, dict[str, float]]:
    return {row["step"]: logged_values(row) for row in read_metrics(directory)}


def in_float32(values: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {step: {k: float(np.float32(v)) for k, v in row.items()} for step, row in values.items()}


def write_rows(config, steps):
    log = MetricsLog(Path(config.out), next_step=steps.start)
    with Loggers(config, steps.start) as loggers:
        for step in steps:
            row = {"step": step, "stage": "sft", "loss": 1 / (step + 1), "lr": 0.1, "seconds": float(steps.start)}
            row |= {"eval_loss": step * 2.5} if step % 2 else {}
            row["grad_norm"] = math.nan if step == 1 else 1.0
            log.write(row)
            loggers.write(row)


def test_names_are_those_of_trl():
    row = {"step": 3, "stage": "grpo", "loss": 0.5, "lr": 0.1, "truncated": 0.25, "response_length": 7.0, "kl": None}
    row |= {"eval_loss": 2.0, "eval_truncated": 0.5, "eval_seconds": 9.0, "reward": math.inf, "valid": 1}
    assert logged_values(row) == {
        "train/loss": 0.5,
        "train/learning_rate": 0.1,
        "train/completions/clipped_ratio": 0.25,
        "train/completions/mean_length": 7.0,
        "train/valid": 1,
        "eval/loss": 2.0,
        "eval/completions/clipped_ratio": 0.5,
        "eval/runtime": 9.0,
    }


@needs_tensorboard
def test_tensorboard_reads_what_metrics_jsonl_holds_after_a_step_back(tmp_path):
    config = small_sft(out=str(tmp_path), logger=["tensorboard"])
    write_rows(config, range(5))
    assert events_of(tmp_path) == in_float32(expected(tmp_path))
    newest = max((tmp_path / "tensorboard").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])  # a kill may come in the middle of a record
    write_rows(config, range(3, 7))  # within the same second
    assert sorted(expected(tmp_path)) == list(range(7)) and expected(tmp_path)[3]["train/step_time"] == 3.0
    assert events_of(tmp_path) == in_float32(expected(tmp_path))


@needs_tensorboard
def test_a_logger_that_is_added_later_gets_the_earlier_steps(tmp_path):
    config = small_sft(out=str(tmp_path))
    write_rows(config, range(4))
    write_rows(dataclasses.replace(config, logger=["tensorboard"]), range(4, 6))
    assert len(events_of(tmp_path)) == 6
    assert events_of(tmp_path) == in_float32(expected(tmp_path))


@needs_wandb
def test_wandb_offline_holds_what_metrics_jsonl_holds_after_a_step_back(tmp_path):
    config = small_sft(out=str(tmp_path), logger=["wandb"])
    for steps in (range(5), range(3, 7)):
        write_rows(config, steps)
    assert sorted(expected(tmp_path)) == list(range(7)) and expected(tmp_path)[3]["train/step_time"] == 3.0
    ids, history = offline_history(tmp_path)
    assert ids == [(tmp_path / "wandb_run_id").read_text()]
    assert history == list(expected(tmp_path).items())


@pytest.mark.slow
@needs_tensorboard
@needs_wandb
def test_a_killed_run_is_logged_as_an_uninterrupted_one(model, policy, tmp_path):
    config = small_sft(out=str(tmp_path), max_steps=8, save_every=3, logger=["tensorboard", "wandb"])
    run_and_kill("sft", model, config, step=5)
    assert sorted(events_of(tmp_path)) in ([*range(5)], [*range(6)])
    run("sft", config, policy)
    assert sorted(expected(tmp_path)) == list(range(8))
    assert events_of(tmp_path) == in_float32(expected(tmp_path))
    ids, history = offline_history(tmp_path)
    assert len(set(ids)) == 1
    assert history == list(expected(tmp_path).items())


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = small_sft(out=str(tmp_path / "run"), model="no/such/model", logger=["wandb"])
    with pytest.raises(InputError, match=r"logger: wandb requires the package .* pip install 'rmr1-jax\[wandb\]'"):
        sft(config)
    assert not (tmp_path / "run").exists()


def test_a_directory_of_the_name_is_no_package(tmp_path, monkeypatch):
    """W&B itself makes a directory `wandb`, which Python could import."""
    (tmp_path / "wandb").mkdir()
    finder = importlib.machinery.PathFinder
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: finder.find_spec(name, [str(tmp_path)]))
    with pytest.raises(InputError, match="requires the package wandb"):
        check_loggers(["wandb"])


@needs_wandb
def test_wandb_that_refuses_is_one_error(tmp_path, monkeypatch):
    import wandb

    def refuse(**unused):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(RunError, match=r"cannot start a run: No API key configured; log in with `wandb login`"):
        Loggers(small_sft(out=str(tmp_path), logger=["wandb"]), 0)
