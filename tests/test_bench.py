"""scripts/bench.py on a tiny shape: its output, its errors, and that the peers get the same work."""

import functools
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from rmr1_jax.model import qwen

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench.py"
TINY = "sample --layers 1 --width 32 --mlp 64 --heads 2 --kv-heads 1 --head-dim 16 --vocab 64 --prompts 2 --group 3"
TINY = [*TINY.split(), "--prompt-length", "8:16", "--max-new", "16", "--json"]


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench", SCRIPT)
    sys.modules["bench"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench"]


@pytest.fixture(scope="module")
def sampling(bench):
    """Its module for sampling."""
    return sys.modules["bench_sample"]


@pytest.fixture(scope="module")
def common(bench):
    return sys.modules["bench_common"]


def lines_of(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_line_of_our_sampler(bench, capsys):
    assert bench.main(TINY) == 0
    (line,) = lines_of(capsys)
    prompts = bench.Sample(vocab=64, prompts=2, prompt_length=(8, 16)).workload()["prompts"]
    assert line["name"] == "rmr1_jax" and line["samples"] == line["slots"] == 6
    assert 6 <= line["useful"] <= 6 * 16
    assert line["useful_tok_s"] == pytest.approx(line["useful"] / line["seconds"], rel=0.2)  # seconds are rounded
    assert line["seconds"] > 0 and line["warm_up_seconds"] > 0
    assert 0 < line["occupancy"] <= 1 and line["compiles"] == 0
    assert line["unique_prompt_tokens"] == sum(map(len, prompts)) <= line["prefill_tokens"] + 2
    # One layer's keys and values in float32 of two prompts and of six samples' 16 tokens, at least.
    assert line["cache_bytes"] >= 2 * 4 * 16 * (sum(map(len, prompts)) - 2 + 6 * 16)


def test_the_workload(bench):
    sample = functools.partial(bench.Sample, vocab=32, prompts=100, prompt_length=(3, 6), stop_ids=5)
    work = sample().workload()
    assert {len(p) for p in work["prompts"]} == {3, 4, 5, 6}
    assert {token for p in work["prompts"] for token in p} == set(range(27))
    assert work["stop_ids"] == [27, 28, 29, 30, 31]
    assert work == sample().workload() != sample(seed=1).workload()


def test_useful_tokens_end_with_the_first_stop(sampling):
    assert sampling.useful_tokens([[1, 2, 9, 3, 9], [8], [1, 2, 3], []], [8, 9]) == 3 + 1 + 3


@pytest.mark.parametrize("peer", ["hf", pytest.param("tunix", marks=pytest.mark.slow)])
def test_a_peer_draws_the_same_samples(bench, sampling, common, peer, monkeypatch, capsys):
    """The head is so sharp that a sample at temperature 1 is the greedy one. Equal samples prove that the peer got the
    same weights, prompts and stop ids."""
    try:
        common.peer_python(peer)
    except bench.InputError as e:
        pytest.skip(str(e))
    plain, count, drawn = qwen.init_params, sampling.useful_tokens, []

    def sharp(*args, **kwargs):
        params = plain(*args, **kwargs)
        return params | {"head": params["head"] * 1e4}

    def remember(rows, stop_ids):
        # tunix does not report which stop id ended a sample.
        drawn.append([[min(token, stop_ids[0]) for token in row] for row in rows])
        return count(rows, stop_ids)

    monkeypatch.setattr(qwen, "init_params", sharp)
    monkeypatch.setattr(sampling, "useful_tokens", remember)
    assert bench.main([*TINY, "--seed", "5", "--peer", peer]) == 0
    ours, theirs = lines_of(capsys)
    assert [len(row) for row in drawn[0]] == [9] * 3 + [3] * 3  # all stopped
    assert drawn[0] == [row[: len(our)] for row, our in zip(drawn[1], drawn[0], strict=True)]
    assert max(map(len, drawn[1])) == 9  # and the peer with them
    assert (theirs["name"], theirs["useful"]) == (peer, ours["useful"])
    assert theirs["ratio"] == pytest.approx(ours["useful_tok_s"] / theirs["useful_tok_s"], abs=0.01)


def test_the_printed_table(bench, common, sampling, monkeypatch, capsys):
    ours = {"name": "rmr1_jax", "useful_tok_s": 100.0, "seconds": 3.0, "useful": 300, "samples": 56, "slots": 56}
    ours |= {"occupancy": 0.95, "compiles": 0, "warm_up_seconds": 9.0, "cache_bytes": 3 * 2**20}
    ours |= {"prefill_tokens": 40, "unique_prompt_tokens": 39}
    peer = {"seconds": 10.0, "rows": [[1] * 5] * 56, "warm_up_seconds": 1.0, "version": "tunix 1", "note": "one by one"}
    monkeypatch.setattr(bench.Sample, "measure_ours", lambda self, model_dir: ours)
    monkeypatch.setattr(common, "peer_python", lambda name: Path(sys.executable))
    monkeypatch.setattr(sampling, "run_peer", lambda name, python, folder: dict(peer))
    assert bench.main(["sample", "--peer", "tunix", "--peer", "hf", "--peer", "tunix"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["rmr1_jax", "100.0", "3.0", "300", "56"],
        ["tunix", "28.0", "10.0", "280", "56", "3.57"],
        ["hf", "28.0", "10.0", "280", "56", "3.57"],
    ]
    assert "95.0% of 56 slots, 0 compiles" in lines[4] and "3.0 MiB, prefilled 40 tokens for 39" in lines[4]
    assert lines[5] == "tunix: tunix 1; one by one"


def test_an_absent_peer_is_refused_before_anything_runs(bench, common, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(common.PEERS, "tunix", common.Peer(tmp_path / "nowhere", "tunix"))
    assert bench.main([*TINY, "--peer", "tunix"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == (
        f"error: --peer tunix needs tunix in {tmp_path}/nowhere, which lacks it; run: bash scripts/peers\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setitem(common.PEERS, "hf", common.Peer(tmp_path, "no_such_package"))
    assert bench.main([*TINY, "--peer", "hf"]) == 2
    assert "--peer hf needs no_such_package in" in capsys.readouterr().err


def test_the_error_output_of_a_failed_peer_is_shown(bench, common, tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(bench.Sample, "measure_ours", lambda self, model_dir: {"name": "rmr1_jax"})
    monkeypatch.setattr(common, "peer_python", lambda name: python)
    assert bench.main([*TINY, "--peer", "hf"]) == 1
    error = "error: the peer hf failed with exit code 3; its error output is above"
    assert capsys.readouterr().err.splitlines()[-2:] == ["out of luck", error]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt-length", "9:3"], "1 <= LOW <= HIGH"),
        (["--prompt-length", "many"], "--prompt-length"),
        (["--stop-ids", "16", "--vocab", "16"], "less than the vocabulary"),
        (["--stop-ids", "17"], "1 to 16"),
        (["--heads", "7"], "num_key_value_heads"),
        (["--peer", "vllm"], "invalid choice 'vllm'"),
        (["--depth", "3"], "--depth"),
    ],
)
def test_a_wrong_command_line_exits_with_2(bench, argv, words, capsys):
    assert_refused(bench, ["sample", *argv], words, capsys)


def assert_refused(bench, argv, words, capsys):
    """The command exits with 2, and says why."""
    try:
        code = bench.main(argv)
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_help_needs_neither_jax_nor_torch():
    code = "import sys, runpy\ntry: runpy.run_path(sys.argv.pop(1), run_name='__main__')\nfinally: print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, SCRIPT, "sample", "--help"], capture_output=True, text=True)
    assert out.returncode == 0 and "--prompt-length" in out.stdout
    assert not {"jax", "numpy", "torch", "transformers"} & set(out.stdout.splitlines()[-1].split())


def test_steps_by_length(bench, capsys):
    shape = "--layers 1 --width 32 --mlp 64 --heads 2 --kv-heads 1 --head-dim 16 --vocab 64 --slots 2 --max-new 128"
    assert bench.main(["steps", *shape.split(), "--json"]) == 0
    lines = lines_of(capsys)
    assert [line["live_length"] for line in lines] == [64, 128]
    assert all(line["ms"] > 0 for line in lines)
    # One layer's keys and values in float32: two prompts of 16 columns, and two rings.
    assert [line["cache_bytes"] for line in lines] == [2 * 4 * 16 * 2 * (16 + width) for width in (64, 128)]


TRAIN = "train --layers 2 --width 32 --mlp 64 --heads 4 --kv-heads 2 --head-dim 8 --vocab 64 --batch 2 --length 48"
TRAIN = [*TRAIN.split(), "--steps", "3", "--json"]


@pytest.mark.parametrize("peer", ["hf", pytest.param("tunix", marks=pytest.mark.slow)])
def test_a_peer_trains_on_the_same_batch(bench, common, peer, capsys):
    """Equal first losses prove that the peer got the same weights and rows."""
    try:
        common.peer_python(peer)
    except bench.InputError as e:
        pytest.skip(str(e))
    assert bench.main([*TRAIN, "--peer", peer]) == 0
    ours, theirs = lines_of(capsys)
    assert theirs["name"] == peer and theirs["first_loss"] == pytest.approx(ours["first_loss"], abs=2e-4)
    assert ours["tokens"] == theirs["tokens"] == 2 * 48
    assert ours["tok_s"] == pytest.approx(96 / ours["seconds"], rel=0.05)  # both are rounded
    assert theirs["ratio"] == pytest.approx(ours["tok_s"] / theirs["tok_s"], abs=0.01)
    assert ours["share_of_limit"] == pytest.approx(ours["tok_s"] / ours["limit_tok_s"], rel=0.01)


def test_the_matrix_products_of_a_step(bench, monkeypatch):
    """The kinds and numbers of matrix products agree with a count by hand."""
    training = sys.modules["bench_train"]
    counted = []

    def product(equation, a, b):
        sizes = dict(zip(equation.replace("->", ",").split(",")[0], a, strict=True))
        sizes |= dict(zip(equation.split(",")[1].split("->")[0], b, strict=True))
        counted.append(2 * math.prod(sizes.values()))
        return 1.0

    monkeypatch.setattr(training, "_product", product)
    shape = {"layers": 3, "width": 8, "mlp": 16, "heads": 4, "kv_heads": 2, "head_dim": 5, "vocab": 32}
    seconds, flops = bench.Train(**shape, batch=2, length=7).products()
    weights = 3 * (2 * 8 * 20 + 2 * 8 * 10 + 3 * 8 * 16) + 8 * 32
    # layers x products x (2 x rows x heads x length^2 x head size), halved because the mask is a triangle
    attention = 3 * 6 * (2 * 2 * 4 * 7 * 7 * 5) / 2
    assert flops == 6 * 14 * weights + attention
    assert seconds == 3 * (3 * (2 + 2 + 3) + 6 / 2) + 3
    assert sorted(set(counted)) == sorted({2 * 14 * n for n in (8 * 20, 8 * 10, 8 * 16, 8 * 32)} | {2 * 2 * 4 * 49 * 5})


TINY_UPDATE = {
    **{"layers": 2, "width": 32, "mlp": 64, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 64},
    **{"groups": 2, "group": 3, "prompt_length": (5, 9), "response_length": (1, 16), "median": 6.0, "row_length": 25},
}


def test_an_update_beside_transformers_written_out(bench, tmp_path):
    """Two updates of ours have the losses, and the first the gradient's norm, of torch's autograd over whole logits of
    one sample after the other."""
    torch, F = pytest.importorskip("torch"), pytest.importorskip("torch.nn.functional")
    from transformers import Qwen2ForCausalLM

    systems, work = bench.GrpoUpdate(**TINY_UPDATE, peer=("none",)).prepare(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    made = [systems["rmr1_jax"]() for _ in range(2)]
    for update in made:
        losses = []
        for p, prompt in enumerate(work["prompts"]):
            for r, response in enumerate(work["responses"][p]):
                ids = torch.tensor([prompt + response])
                logp = F.log_softmax(model(ids).logits, -1)[0, range(len(prompt) - 1, ids.shape[1] - 1), response]
                ratio = torch.exp(logp - torch.tensor(work["old_logp"][p][r]))
                advantage = work["advantages"][p][r]
                losses.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean())
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert update["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert update["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    assert abs(made[0]["loss"]) > 0.01 and made[1]["loss"] < made[0]["loss"]


def as_flags(values: dict) -> list[str]:
    texts = {k: ":".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in values.items()}
    return [part for k, text in texts.items() for part in ("--" + k.replace("_", "-"), text)]


def test_the_lengths_of_an_update(bench):
    """The lognormal distribution, cut where 4.3% of it lie above 1,024 and next to nothing below 16."""
    prompts, responses = bench.GrpoUpdate(groups=300).lengths()
    flat = sorted(n for group in responses for n in group)
    assert len(prompts) == 300 and set(prompts) == set(range(448, 513))
    assert len(flat) == 2100 and 16 <= flat[0] < 40 and 1000 < flat[-1] <= 1024
    shares = [sum(n <= 260 * math.exp(sigma * 0.8) for n in flat) / 2100 for sigma in (-1, 0, 1)]
    assert shares == pytest.approx([0.1587 / 0.957, 0.5 / 0.957, 0.8413 / 0.957], abs=0.03)
    again, other = (bench.GrpoUpdate(groups=300, seed=seed).lengths() for seed in (8, 0))
    assert (prompts, responses) == again != other


def test_the_default_lengths_of_an_update(bench):
    prompts, responses = bench.GrpoUpdate().lengths()
    assert sum(prompts) + sum(map(sum, responses)) == 18101
    assert 56 * (max(prompts) + max(map(max, responses))) == 81312


@pytest.mark.parametrize("peer", ["hf", pytest.param("tunix", marks=pytest.mark.slow)])
def test_a_peer_makes_the_same_update(bench, common, peer, capsys):
    """The command itself fails if the first losses differ; the second ones agree if the updates do."""
    try:
        common.peer_python(peer)
    except bench.InputError as e:
        pytest.skip(str(e))
    assert bench.main(["update", *as_flags(TINY_UPDATE), "--runs", "2", "--peer", peer, "--json"]) == 0
    (line,) = lines_of(capsys)
    work = bench.GrpoUpdate(**TINY_UPDATE)
    prompts, responses = work.lengths()
    assert line["distinct_tokens"] == sum(prompts) + sum(map(sum, responses))
    ours, theirs = line["systems"]["rmr1_jax"], line["systems"][peer]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    assert abs(ours["loss"][1] - ours["loss"][0]) > 1e-3  # the update changed something
    assert ours["positions"] % 25 == 0
    longest = {"hf": max(prompts) + max(map(max, responses)), "tunix": 9 + 16}[peer]
    assert theirs["positions"] == 6 * longest
    assert line["tok_s"] == pytest.approx(line["distinct_tokens"] / ours["median"], rel=0.05)  # both are rounded
    assert line[f"over_{peer}"] == pytest.approx(theirs["median"] / ours["median"], rel=0.05)


def test_losses_that_differ_are_an_error(bench, monkeypatch, capsys):
    made = {"distinct_tokens": 9, "seconds": [2.0, 1.0, 3.0], "loss": [-0.08, 0.0, 0.0]}
    results = {"rmr1_jax": made, "hf": made | {"seconds": [8.0]}, "tunix": made | {"seconds": [10.0]}}
    monkeypatch.setattr(bench.GrpoUpdate, "alternated", lambda self, runs: results)
    assert bench.main(["update", "--json"]) == 0
    (line,) = lines_of(capsys)
    assert (line["tok_s"], line["over_hf"], line["over_tunix"]) == (4.5, 4.0, 5.0)
    for loss in (-0.0801, math.nan):
        results["tunix"] = made | {"loss": [loss]}
        assert bench.main(["update", "--json"]) == 1
        assert "error: the losses of the first update differ by more than 1e-05" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--response-length", "9:3"], "--response-length 9:3 must be LOW:HIGH"),
        (["--group", "1"], "--group 1 must be at least 2"),
        (["--sigma", "0"], "--sigma 0.0 must be positive"),
        (["--runs", "0"], "--runs 0 must be at least 1"),
        (["--row-length", "100"], "row_length=100 cannot hold a prompt and its response"),
        (["--peer", "trl"], "invalid choice 'trl'"),
    ],
)
def test_a_wrong_command_line_of_update_exits_with_2(bench, argv, words, capsys):
    assert_refused(bench, ["update", "--peer", "none", *argv], words, capsys)


def test_systems_take_turns(bench):
    made = []

    def system(name):
        return lambda: made.append(name) or {"seconds": len(made), "loss": 0.5}

    results = sys.modules["bench_alternation"].alternate({name: system(name) for name in "ab"}, 3)
    assert made == list("ababab")
    assert results == {"a": {"seconds": [1, 3, 5], "loss": [0.5] * 3}, "b": {"seconds": [2, 4, 6], "loss": [0.5] * 3}}
