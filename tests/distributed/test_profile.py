"""Profiles of real runs hold the scopes of the programs and the steps of the host."""

import re
from pathlib import Path

import jax
import pytest
from training import small_examples, small_grpo, small_prompts, small_sft

from rmr1_jax.distributed.profile import profiling
from rmr1_jax.errors import RunError
from rmr1_jax.train.config import ProfileConfig
from rmr1_jax.train.grpo import grpo
from rmr1_jax.train.sft import sft


def found(directory: Path) -> tuple[bytes, list[str]]:
    """The bytes of the only profile in a directory, and the names of the host's events."""
    (path,) = directory.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    events = [event.name for plane in planes for line in plane.lines for event in line.events]
    return path.read_bytes(), events


def scoped(data: bytes, *path: str) -> bool:
    """Whether the name of an operation passes through these scopes, in this order."""
    names = re.findall(rb"[\w()/.-]{4,}", data)  # op names such as jit(step)/while/body/layers/attention/dot_general
    return any(re.search("/.*".join(path).encode(), name) for name in names)


def test_two_steps_of_grpo(tiny_policy, tmp_path):
    config = small_grpo(out=str(tmp_path), steps=5, profile=ProfileConfig(skip=2, steps=2))
    grpo(config, policy=tiny_policy, prompts=small_prompts(tiny_policy))
    data, events = found(tmp_path / "profile")
    assert events.count("grpo") == events.count("rollout") == 2  # of five steps
    for path in (["layers", "attention"], ["layers", "mlp"], ["head"], ["draw"], ["update"]):
        assert scoped(data, *path), path
    assert not scoped(data, "mlp", "attention") and not scoped(data, "rollout", "head")


def test_a_run_that_is_shorter_than_what_is_skipped_has_no_profile(tiny_policy, tmp_path):
    config = small_sft(out=str(tmp_path), max_steps=2, profile=ProfileConfig(skip=2, steps=2))
    sft(config, policy=tiny_policy, examples=small_examples(tiny_policy))
    assert not (tmp_path / "profile").exists()


def test_a_profile_ends_with_an_error(tmp_path):
    with pytest.raises(ValueError, match="broken"), profiling(tmp_path / "first"):
        raise ValueError("broken")
    with profiling(tmp_path / "second"):  # none is active any more
        jax.block_until_ready(jax.numpy.ones(3))
    assert found(tmp_path / "first") and found(tmp_path / "second")
    with profiling(None):
        pass


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"), profiling(tmp_path / "file" / "profile"):
        pass
