"""Checkpoints: written beside the steps, proven before an older one goes, and never loaded when they are damaged."""

import json
import shutil
import time
from datetime import UTC, datetime

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from jax.sharding import NamedSharding, PartitionSpec
from training import assert_same, called, small_grpo, small_sft

import rmr1_jax
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train import manifest
from rmr1_jax.train.checkpoint import Checkpointer, steps_of, stored_params
from rmr1_jax.train.config import BestConfig
from rmr1_jax.train.metrics import MetricsLog
from rmr1_jax.train.optim import OptimConfig, TrainState
from rmr1_jax.train.run import open_run
from rmr1_jax.train.run_directory import check_run, same_data, start_run


def state_of(step: int, width: int = 4096, mesh=None) -> TrainState:
    """Weights and moments whose values say which step they are of."""
    whole = NamedSharding(mesh or make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())

    def filled():
        return {"w": jnp.full((width,), step, jnp.float32, device=whole), "b": jnp.arange(3.0, device=whole) + step}

    return TrainState(filled(), (filled(), filled()), jax.device_put(np.int32(step), whole))


def write(directory, *steps: int, keep: int = 9, **options) -> None:
    with Checkpointer(directory, keep=keep, **options) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), {"at": step}, {"reward": [0, 3, 1, 2][step % 4]})


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


# ---- saving


def test_a_state_that_is_donated_at_once_is_saved_as_it_was(tmp_path):
    """The step goes on in the same memory while it is written."""
    onward = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = state_of(1, width=1 << 20)
    with Checkpointer(tmp_path, keep=9) as checkpoints:
        checkpoints.save(state, {})
        assert checkpoints.saving
        for _ in range(30):
            state = onward(state)
        restored, _ = checkpoints.restore(state)
    assert_same(restored, state_of(1, width=1 << 20))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": 1}, [8]),
        ({"keep": 3}, [6, 7, 8]),
        ({"keep": 2, "best": BestConfig(metric="reward")}, [5, 7, 8]),
        ({"keep": 1, "best": BestConfig(metric="reward", mode="min")}, [8]),
        ({"keep": 2, "best": BestConfig(metric="reward", mode="min")}, [7, 8]),
    ],
    ids=str,
)
def test_which_checkpoints_stay(tmp_path, options, left):
    write(tmp_path, *range(1, 9), **options)
    assert steps_of(tmp_path / "checkpoints") == left


def test_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoints = Checkpointer(tmp_path, keep=1, every=4, minutes=2.0)
    assert [step for step in range(1, 9) if checkpoints.due(step)] == [4, 8]
    monkeypatch.setattr(time, "time", lambda: 1e12)  # the clock on the wall jumps
    now[0] += 119
    assert not checkpoints.due(9)
    now[0] += 1
    assert checkpoints.due(9)
    checkpoints.save(state_of(9), {})
    assert not checkpoints.due(10)
    checkpoints.close()


def test_a_metric_that_is_not_there_is_named(tmp_path):
    with Checkpointer(tmp_path, keep=1, best=BestConfig(metric="rewards")) as checkpoints:
        with pytest.raises(
            InputError, match=r"best.metric='rewards' is not a metric of this stage, which has loss, reward"
        ):
            checkpoints.save(state_of(1), {}, {"loss": 1.0, "reward": 2.0})
        checkpoints.save(state_of(2), {})  # at a place where there are none yet


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    write(tmp_path, 1, 2)
    root = tmp_path / "checkpoints"
    (root / "3.saving.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (root / "4.saving").mkdir()
    (root / "1").rename(root / "1.removing")
    checkpoints = Checkpointer(tmp_path, keep=2)
    assert [p.name for p in root.iterdir()] == ["2"]
    assert checkpoints.restore(state_of(0))[1] == {"at": 2}


# ---- damage


def test_every_damaged_file_is_found_and_named(tmp_path):
    """In turn each file of a checkpoint, the manifest too: a bit, its end, the whole of it."""
    write(tmp_path, 1)
    directory = tmp_path / "checkpoints" / "1"
    manifest.verify(directory)
    names = [path.relative_to(directory).as_posix() for path in files_of(directory)]
    assert len(names) > 5 and manifest.NAME in names
    for name in names:
        path = directory / name
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 16
        for damaged in (bytes(flipped), data[:-1], data + b" ", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(manifest.Damage, match=f"{name}: (expected|cannot be read)"):
                manifest.verify(directory)
            path.write_bytes(data)
    manifest.verify(directory)


def test_the_newest_undamaged_checkpoint_is_used_and_the_damaged_one_replaced(tmp_path, capsys):
    write(tmp_path, 1, 2, 3)
    root = tmp_path / "checkpoints"
    largest = max((p for p in files_of(root / "3") if p.name != manifest.NAME), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    shutil.rmtree(root / "2" / "d")
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        state, cursor = checkpoints.restore(state_of(0))
        assert_same(state, state_of(1))
        said = capsys.readouterr().err
        assert cursor == {"at": 1} and "checkpoint 2 is damaged" in said and "; it is skipped" in said
        assert f"checkpoint 3 is damaged: {largest}: expected sha256 " in said and ", found " in said
        assert_same(called(stored_params(tmp_path, state.params)), state_of(1).params)
        checkpoints.save(state_of(2), {"at": 2})
        checkpoints.finish()
        assert steps_of(root) == [1, 2]  # 3 is not one of the two newest: it never was sound
        checkpoints.save(state_of(3), {"at": 3})
    assert Checkpointer(tmp_path, keep=2).restore(state_of(0))[1] == {"at": 3}


def test_a_checkpoint_in_the_place_of_another_is_found(tmp_path, capsys):
    write(tmp_path, 1, 2)
    root = tmp_path / "checkpoints"
    shutil.rmtree(root / "2")
    shutil.copytree(root / "1", root / "2")
    assert Checkpointer(tmp_path, keep=2).restore(state_of(0))[1] == {"at": 1}
    assert "/2/manifest.json: expected to be of step 2, found 1; it is skipped" in capsys.readouterr().err


def test_when_none_is_sound_nothing_is_begun_anew(tmp_path):
    write(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / manifest.NAME).unlink()
    with pytest.raises(
        RunError, match=r"no undamaged checkpoint is left: checkpoint 2 is damaged: .*manifest.json: expected"
    ):
        Checkpointer(tmp_path, keep=2).restore(state_of(0))
    assert steps_of(tmp_path / "checkpoints") == [1, 2]


def test_an_older_one_goes_only_after_the_new_one_was_verified(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def damage(directory):
        raise manifest.Damage("d/x: expected 4 bytes, found 3")

    monkeypatch.setattr(manifest, "verify", damage)
    with pytest.raises(RunError, match=r"checkpoints/2 cannot be written: d/x: expected 4 bytes.*step 1 remains"):
        write(tmp_path, 2, keep=1)
    assert steps_of(tmp_path / "checkpoints") == [1]


# ---- what the disk refuses


def test_a_failed_save_is_raised_at_the_next_step_and_again_at_the_end(tmp_path, monkeypatch):
    def full(self, *_):
        self._orbax.wait_until_finished()
        raise OSError(28, "No space left on device", str(tmp_path))

    write(tmp_path, 1)
    monkeypatch.setattr(Checkpointer, "_complete", full)
    checkpoints = Checkpointer(tmp_path, keep=2)
    checkpoints.save(state_of(2), {})
    checkpoints._pending[2].exception()
    with pytest.raises(RunError) as e:
        checkpoints.check()
    assert f"{tmp_path}/checkpoints/2 cannot be written" in str(e.value) and "No space left on device" in str(e.value)
    assert "49,192 bytes wanted, " in str(e.value)
    assert "bytes free" in str(e.value) and "the checkpoint of step 1 remains" in str(e.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    checkpoints.save(state_of(3), {})
    with pytest.raises(RunError, match="checkpoints/3 cannot be written"):
        checkpoints.close()


def test_a_save_that_fails_at_once_is_one_error(tmp_path, monkeypatch):
    """Orbax may raise in the step, and again when it is closed."""

    def refuse(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 7 bytes [tensorstore_spec='{\"a\":1}']")

    message = r"/checkpoints/1 cannot be written: RESOURCE_EXHAUSTED: Failed to write 7 bytes \(49,192 bytes wanted, "
    with pytest.raises(RunError, match=message), Checkpointer(tmp_path, keep=2) as checkpoints:
        monkeypatch.setattr(checkpoints._orbax, "save", refuse)
        monkeypatch.setattr(checkpoints._orbax, "close", refuse)
        checkpoints.save(state_of(1), {})


def test_a_checkpoint_that_is_gone_at_the_end_is_missed(tmp_path):
    message = r"checkpoints/1 cannot be written: manifest.json: expected, not there"
    with pytest.raises(RunError, match=message), Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state_of(1), {})
        checkpoints.finish()
        shutil.rmtree(tmp_path / "checkpoints")


def test_an_error_on_its_way_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(manifest, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state_of(1), {})
        raise ZeroDivisionError
    assert "also: " in (said := capsys.readouterr().err) and "there is no checkpoint yet" in said


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"/file/run cannot be written: Not a directory \(.*bytes free\)"):
        check_run(small_sft(out=str(tmp_path / "file" / "run")), tmp_path / "file" / "run")
    with pytest.raises(RunError, match=r"/file/run cannot be written: Not a directory \(.*bytes free\)"):
        start_run(small_sft(out=str(tmp_path / "file" / "run")), tmp_path / "file" / "run")
    with pytest.raises(RunError, match=r"/file cannot be written: Not a directory"):
        check_run(small_sft(out=str(tmp_path / "file")), tmp_path / "file")
    with pytest.raises(RunError, match=r"/file/checkpoints cannot be written: (Not a directory|File exists)"):
        Checkpointer(tmp_path / "file", keep=1)
    log = MetricsLog(tmp_path / "gone", next_step=0)
    with pytest.raises(RunError, match=r"gone/metrics.jsonl cannot be written: No such file .* bytes wanted"):
        log.write({"step": 0})


def test_a_full_device_names_what_makes_less_do(tmp_path):
    message = r"out of device memory \(RESOURCE_EXHAUSTED: 9 GiB\)\. .*micro_rows.*remat"
    with pytest.raises(RunError, match=message), open_run(small_sft(out=str(tmp_path)), "sft"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), open_run(small_sft(out=str(tmp_path)), "sft"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


# ---- going on elsewhere, or with something else


def test_another_mesh_is_said(tmp_path, capsys):
    write(tmp_path, 1)
    Checkpointer(tmp_path, keep=1).restore(state_of(0))
    assert capsys.readouterr().err == ""
    restored, _ = Checkpointer(tmp_path, keep=1).restore(state_of(0, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2))))
    assert_same(restored, state_of(1))
    said = capsys.readouterr().err
    assert "checkpoint 1 was written on a mesh of replica=1 x fsdp=1 x tensor=1 in 1 process; " in said
    assert "the run continues on a mesh of replica=1 x fsdp=4 x tensor=2 in 1 process" in said


def test_a_checkpoint_whose_layers_are_one_flat_dict_is_restored(tmp_path):
    """As the first version wrote them, weights and moments alike."""
    names = ["attn_norm", "q", "q_bias", "gate", "mlp_norm"]
    whole = state_of(0).step.sharding

    def flat(start: int):
        layers = {name: jnp.arange(2.0, device=whole) + start + i for i, name in enumerate(names)}
        return {"embed": jnp.full(3, start, jnp.float32, device=whole), "layers": layers}

    def nested(start: int):
        w = flat(start)["layers"]
        parts = {"attn": {k: w[k] for k in ("q", "q_bias")}, "mlp": {"gate": w["gate"]}}
        return flat(start) | {"layers": parts | {k: w[k] for k in ("attn_norm", "mlp_norm")}}

    def state(params):
        moments = optax.ScaleByAdamState(jax.device_put(np.int32(7), whole), params(100), params(200))
        return TrainState(params(0), (moments, optax.EmptyState()), jax.device_put(np.int32(7), whole))

    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state(flat), {"at": 7})
    like = jax.tree.map(jnp.zeros_like, state(nested))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        restored, cursor = checkpoints.restore(like)
        assert jax.tree.structure(restored) == jax.tree.structure(like) and cursor == {"at": 7}
        assert_same(restored, state(nested))
        assert_same(called(stored_params(tmp_path, like.params)), nested(0))
        checkpoints.save(restored._replace(step=restored.step + 1), {"at": 8})  # from here on in today's layout
    assert_same(Checkpointer(tmp_path, keep=1).restore(like)[0].params, nested(0))
    with pytest.raises(InputError, match=r"is of another model: params.layers.mlp.up: is None, expected \(2,\)"):
        like.params["layers"]["mlp"]["up"] = like.params["layers"]["mlp"]["gate"]
        stored_params(tmp_path, like.params)


def test_another_model_is_named_by_its_leaves(tmp_path):
    write(tmp_path, 1)
    message = r"is of another model: params.w: is \(4096,\), expected \(5,\)"
    with pytest.raises(InputError, match=message):
        Checkpointer(tmp_path, keep=1).restore(state_of(0, width=5))
    with pytest.raises(InputError, match=message):
        stored_params(tmp_path, state_of(0, width=5).params)


def test_changes_of_a_config_that_do_not_matter_are_said(tmp_path, capsys):
    start_run(small_grpo(out=str(tmp_path)), tmp_path)
    changed = small_grpo(out=str(tmp_path), save_minutes=5.0, best=BestConfig(), mesh=MeshConfig(fsdp=2), remat="full")
    check_run(changed, tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert "changed settings, which change no number: save_minutes was None, is 5.0; best was None, is {" in said[0]
    assert (
        said[1].startswith("changed settings, which change only the last bits of numbers: ")
        and "mesh.fsdp was" in said[1]
    )
    with pytest.raises(InputError, match=r"holds a run with another config .*optimizer.clip was 1.0, is 9.0"):
        check_run(small_grpo(out=str(tmp_path), optimizer=OptimConfig(lr=1e-2, clip=9.0)), tmp_path)


def test_a_run_of_a_version_without_a_setting_continues_with_its_default(tmp_path):
    start_run(small_grpo(out=str(tmp_path)), tmp_path)
    path = tmp_path / "config.yaml"
    old = yaml.safe_load(path.read_text())
    del old["sampling"]["min_p"], old["max_segments"]
    path.write_text(yaml.safe_dump(old))
    with pytest.raises(InputError, match=r"another config \(sampling.min_p was 0.0, is 0.1\)"):
        check_run(small_grpo(out=str(tmp_path), sampling=SamplingConfig(n=4, max_new_tokens=12, min_p=0.1)), tmp_path)
    check_run(small_grpo(out=str(tmp_path)), tmp_path)
    start_run(small_grpo(out=str(tmp_path)), tmp_path)
    assert yaml.safe_load(path.read_text())["sampling"]["min_p"] == 0


def test_other_data_under_the_same_name_is_refused():
    assert same_data({"data": "a", "prompts_consumed": 8}, {"data": "a", "prompts_consumed": 0, "skipped": 0}) == {
        "data": "a",
        "prompts_consumed": 8,
        "skipped": 0,
    }
    with pytest.raises(InputError, match="the data has changed since the checkpoint was written"):
        same_data({"data": "a"}, {"data": "b"})


def test_a_manifest_says_what_its_checkpoint_is_of(tmp_path):
    write(tmp_path, 3, about={"config": {"seed": 7}})
    about = json.loads((tmp_path / "checkpoints" / "3" / manifest.NAME).read_text())["about"]
    assert about["step"] == 3 and about["config"] == {"seed": 7} and about["cursor"] == {"at": 3}
    assert about["mesh"] == {"replica": 1, "fsdp": 1, "tensor": 1} and about["processes"] == 1
    assert about["version"] == rmr1_jax.__version__ and datetime.fromisoformat(about["written"]) <= datetime.now(UTC)
