"""Stage one: it learns, it adds up, it shards, and it goes on from where it was killed as if nothing had happened."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import (
    EIGHT_DEVICES,
    assert_same,
    called,
    metrics_but_timings,
    on_mesh,
    plain_step,
    run,
    run_and_kill,
    small_examples,
    small_sft,
)

from rmr1_jax.data.packing import sft_batches
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh, single_device_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.model.qwen import split
from rmr1_jax.policy import load
from rmr1_jax.train.checkpoint import Checkpointer, stored_params
from rmr1_jax.train.metrics import MetricsLog, read_metrics
from rmr1_jax.train.micro_batches import to_micro_batches
from rmr1_jax.train.optim import OptimConfig, init_state, lr_schedule, make_optimizer
from rmr1_jax.train.run_directory import check_run, start_run
from rmr1_jax.train.sft import sft, sft_micro_loss


@pytest.fixture(scope="module")
def model(tiny_policy, tmp_path_factory):
    """A directory with the tiny policy."""
    path = tmp_path_factory.mktemp("sft") / "model"
    tiny_policy.save(path)
    return path


@pytest.fixture(scope="module")
def policy(model):
    return load(model, "float32", single_device_mesh())


@pytest.fixture(scope="module")
def batch(policy):
    """Eight packed rows."""
    batches, _ = sft_batches(small_examples(policy, 24), row_length=256, batch_rows=8, epochs=1, seed=0)
    return next(batches)


@pytest.fixture(scope="module")
def step(policy):
    return plain_step(policy, micro_loss(policy))


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    """(config, trained policy) of an uninterrupted run."""
    config = small_sft(
        out=str(tmp_path_factory.mktemp("whole")), max_steps=8, save_every=3, eval_data="given", eval_every=2
    )
    return config, run("sft", config, policy)


def micro_loss(policy):
    return functools.partial(sft_micro_loss, split(policy.model)[0], dtype=jnp.float32, remat="none")


def micro_batches(batch, micro_rows: int, mesh, spare: int = 1):
    """(arrays [A, micro_rows, T], how many to count): `spare` more than are to be counted."""
    ((micro, _),), facts = to_micro_batches(batch, micro_rows, mesh)
    assert facts["trained_tokens"] == batch.rows[0].arrays["trained"].sum()
    assert facts["packed"] == (batch.rows[0].arrays["segment_ids"] > 0).mean()
    return {k: np.concatenate([v, *[np.ones_like(v[:1])] * spare]) for k, v in micro.items()}, len(micro["tokens"])


def test_the_loss_falls_and_the_result_is_saved(policy, model, whole):
    config, trained = whole
    rows = read_metrics(config.out)
    assert [row["step"] for row in rows] == list(range(8))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(row["packed"] > 0.5 and row["tokens"] > row["trained_tokens"] > 0 for row in rows)
    assert rows[0]["lr"] == pytest.approx(1e-2) and 1e-3 < rows[-1]["lr"] < 2e-3
    assert_same(
        policy.params, load(model, "float32", single_device_mesh()).params
    )  # the policy that was handed in is as it was
    again = load(f"{config.out}/model", "float32", single_device_mesh())
    assert_same(again.params, trained.params)
    assert again.config == policy.config and again.tokenizer.stop_ids == policy.tokenizer.stop_ids


def test_it_says_what_it_trains_and_where_it_goes_on(policy, whole, tmp_path, capsys):
    config = dataclasses.replace(whole[0], out=str(tmp_path / "run"))
    shutil.copytree(whole[0].out, config.out)
    run("sft", config, policy)
    said = capsys.readouterr().err
    assert said.index("sft: qwen2, ") < said.index(f"sft: out {config.out}\n") < said.index("sft: finished at step 8")
    assert said.splitlines()[-1] == "sft: finished at step 8; nothing to train"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    run("sft", config, policy)
    said = capsys.readouterr().err
    assert said.index("sft: resumed at step 6 of 8 from checkpoints/6\n") < said.index("compiling the programs of the")
    assert metrics_but_timings(config.out) == metrics_but_timings(whole[0].out)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(model, policy, whole, tmp_path):
    config, expected = whole
    killed = dataclasses.replace(config, out=str(tmp_path))
    run_and_kill("sft", model, killed, step=5)
    assert len(read_metrics(tmp_path)) == 6
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill may come in the middle of a line
    resumed = run("sft", killed, policy)
    assert_same(resumed.params, expected.params)
    assert metrics_but_timings(tmp_path) == metrics_but_timings(config.out)
    assert_same(run("sft", killed, policy).params, expected.params)  # a finished run is only read
    assert len(read_metrics(tmp_path)) == 8


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(policy, whole, tmp_path, monkeypatch):
    steps = iter(range(8))

    def poisoned(*args):
        stacks, facts = to_micro_batches(*args)
        micro = stacks[0][0]
        if next(steps) == 4:
            micro["weights"] = micro["weights"].at[0, 0, 3].set(jnp.inf)
        return stacks, facts

    monkeypatch.setattr("rmr1_jax.train.sft.to_micro_batches", poisoned)
    with pytest.raises(RunError, match=r"step 4: .*loss is (nan|inf) on batch 4 .* last checkpoint is valid"):
        run("sft", dataclasses.replace(whole[0], out=str(tmp_path)), policy)
    assert len(read_metrics(tmp_path)) == 4 and not (tmp_path / "model").exists()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_an_update_that_is_not_finite_leaves_the_state_as_it_was(policy, batch, step):
    arrays, count = micro_batches(batch, 8, policy.mesh)
    arrays["weights"][0, 1, 3] = np.inf
    params, metrics = step(policy.params, arrays, count)
    assert not np.isfinite(metrics["loss"])
    assert_same(params, policy.params)


def test_micro_batches_add_up_to_the_step(policy, batch, step):
    """Eight micro-batches of one row are one of eight; one more that is there is not counted."""
    (ours, our_metrics), (theirs, their_metrics) = (
        step(policy.params, *micro_batches(batch, rows, policy.mesh)) for rows in (1, 8)
    )
    assert float(their_metrics["grad_norm"]) > 0.1
    assert_same(ours, theirs, atol=1e-5)
    assert_same(our_metrics, their_metrics, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", EIGHT_DEVICES, ids=str)
def test_eight_devices_update_as_one_does(policy, batch, step, axes):
    """The weights less their gradient, and the loss."""
    sharded = on_mesh(policy, make_mesh(axes))
    assert batch.rows[0].arrays["segment_ids"].any(axis=1).all()  # every row shard has something to do
    arrays, count = micro_batches(batch, 8, policy.mesh)
    expected, metrics = step(policy.params, arrays, count)
    params, their_metrics = plain_step(sharded, micro_loss(sharded))(sharded.params, arrays, count)
    assert not params["layers"]["mlp"]["gate"].is_fully_replicated
    assert_same(params, expected, atol=1e-5)
    assert_same(their_metrics, metrics, atol=1e-5)


def test_a_checkpoint_of_one_device_is_read_by_eight(policy, tmp_path):
    sharded = on_mesh(policy, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    optimizer = make_optimizer(OptimConfig(), 10)
    state, like = (init_state(each.params, optimizer) for each in (policy, sharded))
    state = state._replace(step=state.step + 4, opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
    checkpoints = Checkpointer(tmp_path, keep=2)
    assert checkpoints.restore(like) is None
    checkpoints.save(state, {"next_batch": 4})
    restored, cursor = checkpoints.restore(like)
    checkpoints.close()
    assert cursor == {"next_batch": 4} and int(restored.step) == 4
    assert_same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
    exported = called(stored_params(tmp_path, sharded.params))
    assert_same(exported, policy.params)
    assert exported["layers"]["mlp"]["gate"].sharding == sharded.params["layers"]["mlp"]["gate"].sharding


def test_another_config_is_refused_and_named(tmp_path):
    start_run(small_sft(out=str(tmp_path)), tmp_path)
    check_run(small_sft(out=str(tmp_path), save_every=7, keep=5), tmp_path)  # changes no number
    changed = small_sft(out=str(tmp_path), seed=1, optimizer=OptimConfig(lr=1e-2, clip=2.0))
    with pytest.raises(InputError, match=r"seed was 0, is 1; optimizer.clip was 1.0, is 2.0\); give another `out`"):
        sft(changed)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_address_is_no_run_directory():
    with pytest.raises(InputError, match=r"out=gs:/\S+ is an address; give a directory"):
        sft(small_sft(out="gs://bucket/run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"optimizer": OptimConfig(lr=1e-2, memory="host")}, {"remat": "offload"}, {"remat": "dots"}, {"remat": "full"}],
    ids=str,
)
def test_where_things_lie_changes_no_number(policy, whole, tmp_path, changes):
    """Moments and activations in the host's memory, and what the backward pass does again."""
    plain = dataclasses.replace(whole[0], max_steps=3)
    for name, config in {"plain": plain, "changed": dataclasses.replace(plain, **changes)}.items():
        run("sft", dataclasses.replace(config, out=str(tmp_path / name)), policy)
    for ours, theirs in zip(read_metrics(tmp_path / "changed"), read_metrics(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_moments_lie_where_they_are_told_and_the_first_in_its_dtype(policy):
    optimizer = make_optimizer(OptimConfig(mu_dtype="bfloat16"), 5)
    adam = init_state(policy.params, optimizer, "host").opt_state[0]
    kinds = {(x.dtype.name, x.sharding.memory_kind) for x in jax.tree.leaves(adam.mu)}
    assert kinds == {("bfloat16", "pinned_host")}
    assert {(x.dtype.name, x.sharding.memory_kind) for x in jax.tree.leaves(adam.nu)} == {("float32", "pinned_host")}


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        stored_params(tmp_path, {})
    with pytest.raises(InputError, match=r"metrics.jsonl does not exist"):
        read_metrics(tmp_path)


def test_rows_that_do_not_fit(policy, tmp_path, capsys):
    examples = small_examples(policy)
    limit = max(len(x) for x in examples) - 1
    with pytest.raises(InputError, match=rf"longer than row_length={limit} tokens"):
        sft(small_sft(out=str(tmp_path / "a"), row_length=limit), policy=policy, examples=examples)
    with pytest.raises(InputError, match=r"micro_rows=2 must be divisible by the mesh's 8 row shards"):
        sft(small_sft(out=str(tmp_path / "b")), policy=on_mesh(policy, make_mesh()), examples=examples)
    with pytest.raises(InputError, match="nothing to train on"):
        sft(small_sft(out=str(tmp_path / "c"), row_length=8, on_too_long="drop"), policy=policy, examples=examples)
    assert "dropped 12 of 12 examples longer than 8 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.2])
def test_the_learning_rate(warmup_ratio):
    """Linear warm-up that wastes no update on zero, then half a cosine to final_ratio x lr, against NumPy."""
    config = OptimConfig(lr=2.0, final_ratio=0.1, warmup_ratio=warmup_ratio)
    warm, total = round(20 * warmup_ratio), 20
    decay = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(total - warm) / (total - warm)))
    expected = 2.0 * np.concatenate([np.arange(1, warm + 1) / max(1, warm), decay])
    schedule = lr_schedule(config, total)
    np.testing.assert_allclose([schedule(i) for i in range(total)], expected, rtol=1e-6)
    constant = lr_schedule(OptimConfig(lr=2.0, schedule="constant", warmup_ratio=warmup_ratio), total)
    np.testing.assert_allclose([constant(i) for i in range(total)], np.where(np.arange(20) < warm, expected, 2.0))


def test_metrics_of_a_continued_run(tmp_path):
    log = MetricsLog(tmp_path, next_step=0)
    for step in range(4):
        log.write({"step": step, "loss": float("nan") if step == 1 else step / 2})
    with log.path.open("a") as file:
        file.write('{"step": 4')
    assert [row["loss"] for row in read_metrics(tmp_path)] == [0.0, None, 1.0, 1.5]
    MetricsLog(tmp_path, next_step=3).write({"step": 3, "loss": 7})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": None},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 7},
    ]
