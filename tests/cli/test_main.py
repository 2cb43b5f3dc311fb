"""The command line: exit codes and messages, and real runs of the commands, one of which is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml
from chat_models import with_template
from policies import tiny_policy

from rmr1_jax.cli import main as cli
from rmr1_jax.cli.train import Sft
from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.policy import load
from rmr1_jax.prompts.prompt import load_prompt, save_prompt
from rmr1_jax.quickstart.world import make_items, oracle_trace, world_prompt
from rmr1_jax.train.checkpoint import Checkpointer
from rmr1_jax.train.optim import OptimConfig, init_state, make_optimizer

PAIRS = 64


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory) -> Path:
    """A folder with a model, a prompt and pairs to judge."""
    folder = tmp_path_factory.mktemp("cli")
    policy.save(folder / "model")
    save_prompt(world_prompt(), folder / "prompt.yaml")
    with (folder / "pairs.jsonl").open("w") as file:
        for item in make_items(PAIRS, split="dev"):
            row = {k: getattr(item, k) for k in ("id", "question", "response_a", "response_b", "better")}
            file.write(json.dumps(row) + "\n")
    return folder


def judge_arguments(folder: Path, output: str, *more: str) -> list[str]:
    fixed = ("--model", folder / "model", "--input", folder / "pairs.jsonl", "--prompt", folder / "prompt.yaml")
    limits = ("--dtype", "float32", "--max-new-tokens", "6", "--batch-size", "2")
    return list(map(str, ("judge", *fixed, "--output", folder / output, *limits, *more)))


def error_of(capsys, argv, code: int) -> str:
    """The command's one line on stderr."""
    capsys.readouterr()  # what a slow set-up said
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_profile_of_judging(folder, tmp_path):
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[:2]))
    arguments = judge_arguments(folder, "unused", "--profile", tmp_path / "profile")
    for option in ("--input", "--output"):
        arguments[arguments.index(option) + 1] = str(tmp_path / ("pairs.jsonl" if option == "--input" else "out.jsonl"))
    assert cli.main(arguments) == 0
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"layers/attention" in path.read_bytes() and len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_help_imports_nothing_heavy():
    code = "import sys, rmr1_jax.cli.main as c\ntry: c.main(['judge', '--help'])\nfinally: print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0
    assert "--both-orders" in out.stdout
    assert not {"jax", "numpy", "transformers", "pydantic", "yaml"} & set(out.stdout.splitlines()[-1].split())


def test_the_package_runs_as_a_module():
    out = subprocess.run([sys.executable, "-m", "rmr1_jax", "--help"], capture_output=True, text=True)
    assert out.returncode == 0
    for command in ("quickstart", "sft", "grpo", "judge", "data", "export", "report"):
        assert f"• {command} " in out.stdout


@pytest.mark.parametrize("argv", [[], ["eval"], ["data"], ["sft"]])  # of names: test_words.py
def test_a_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "rmr1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.yaml:3: field x\n  is 4"), 2, "error: a.yaml:3: field x is 4\n"),
        (RunError("the loss is nan"), 1, "error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume\n"),
    ],
)
def test_exit_codes(error, code, line, monkeypatch, capsys):
    def run(self):
        raise error

    monkeypatch.setattr(Sft, "run", run)
    assert cli.main(["sft", "a.yaml"]) == code
    assert capsys.readouterr().err == line


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def run(self):
        raise ValueError("ours")

    monkeypatch.setattr(Sft, "run", run)
    with pytest.raises(ValueError, match="ours"):
        cli.main(["sft", "a.yaml"])


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_config_and_its_overrides_reach_the_stage(stage, monkeypatch, tmp_path, capsys):
    module = pytest.importorskip(f"rmr1_jax.train.{stage}")
    path, seen = tmp_path / "run.yaml", []
    path.write_text(f"model: m\nout: {tmp_path}/run\noptimizer: {{lr: 0.1}}\n")
    monkeypatch.setattr(module, stage, seen.append)
    assert cli.main([stage, str(path), "seed=7", "optimizer.lr=1e-5"]) == 0
    assert (seen[0].model, seen[0].seed, seen[0].optimizer.lr) == ("m", 7, 1e-5)
    assert f"{tmp_path}/run/model" in capsys.readouterr().out
    assert "unknown key seeed; did you mean seed?" in error_of(capsys, [stage, str(path), "seeed=7"], 2)
    assert "nowhere.yaml" in error_of(capsys, [stage, str(tmp_path / "nowhere.yaml")], 2)
    assert len(seen) == 1


def test_quickstart_gets_its_options(monkeypatch, tmp_path):
    module = pytest.importorskip("rmr1_jax.quickstart.quickstart")
    seen = []
    monkeypatch.setattr(module, "quickstart", lambda out, seed, control: seen.append((out, seed, control)))
    assert cli.main(["quickstart"]) == 0
    assert cli.main(["quickstart", "--out", str(tmp_path), "--seed", "3", "--control"]) == 0
    assert seen == [(Path("runs/quickstart"), 0, False), (tmp_path, 3, True)]


def test_data_prompt_recovers_the_prompt_that_rows_were_rendered_with(tmp_path, capsys):
    messages = [world_prompt().render(f"question {k}", "yes", "no") for k in range(3)]
    rows = [json.dumps({"context_messages": m, "winner": "model_a"}) for m in messages]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    out = tmp_path / "mine.yaml"
    assert cli.main(["data", "prompt", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(out)]) == 0
    assert "3 single-turn" in capsys.readouterr().out
    prompt = load_prompt(out)
    assert prompt.name == "mine"
    assert prompt.render("question 1", "yes", "no") == messages[1]
    other = {"context_messages": [{"role": "user", "content": "hi"}], "winner": "model_a"}
    (tmp_path / "other.jsonl").write_text(json.dumps(other))
    arguments = ["data", "prompt", "--rows", str(tmp_path / "other.jsonl"), "--out", str(out)]
    assert "other.jsonl: row 1: " in error_of(capsys, arguments, 2)


def test_data_prompt_on_published_rows(shared_data, tmp_path):
    rows = shared_data / "published_rows" / "distill_sft.jsonl"
    assert cli.main(["data", "prompt", "--rows", str(rows), "--out", str(tmp_path / "p.yaml")]) == 0
    first = json.loads(rows.read_text().splitlines()[0])["context_messages"]
    assert load_prompt(tmp_path / "p.yaml").system == first[0]["content"]


def test_report_needs_runs(tmp_path, capsys):
    assert "no run directory is given" in error_of(capsys, ["report"], 2)
    assert str(tmp_path) in error_of(capsys, ["report", str(tmp_path)], 2)


def test_report_on_two_runs(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        row = {"step": 0, "stage": "sft", "loss": 2.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"step": 1}) + "\n")
    assert cli.main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "<html" in (tmp_path / "one" / "report.html").read_text()
    assert cli.main(["report", str(tmp_path / "one"), "--out", str(tmp_path / "r.html")]) == 0
    assert str(tmp_path / "r.html") in capsys.readouterr().out


def test_export_writes_the_newest_checkpoint(policy, folder, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    optimizer = make_optimizer(OptimConfig(), 1)
    for step in (1, 12):
        state = init_state(jax.tree.map(lambda x, by=step: x + by, policy.params), optimizer)
        checkpoints = Checkpointer(run, keep=2)
        checkpoints.save(state._replace(step=state.step + step), {})
        checkpoints.close()
    argv = ["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert "is not a run directory" in error_of(capsys, argv, 2)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": ""}))
    assert "names no model; give --model" in error_of(capsys, argv, 2)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": str(folder / "model")}))
    assert cli.main(argv) == 0
    exported = load(tmp_path / "out", "float32", single_device_mesh())
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x + 12 == y).all()), policy.params, exported.params))
    assert exported.tokenizer.encode("Reverse a b c") == policy.tokenizer.encode("Reverse a b c")
    assert cli.main([*argv[:-1], "bfloat16"]) == 0
    exported = load(tmp_path / "out", "bfloat16", single_device_mesh())
    assert jax.tree.all(
        jax.tree.map(lambda x, y: bool(((x + 12).astype("bfloat16") == y).all()), policy.params, exported.params)
    )
    (tmp_path / "empty").mkdir()
    argv = ["export", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), "--model", str(folder / "model")]
    assert "holds no checkpoint" in error_of(capsys, argv, 2)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("wrong", ["data", "model"])
def test_a_failed_start_leaves_nothing(stage, wrong, folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"{{model: {folder / 'model'}, data: {tmp_path / 'none.jsonl'}, out: {tmp_path / 'runs/first'}}}"
    )
    (tmp_path / "none.jsonl").touch()
    error = error_of(capsys, [stage, str(tmp_path / "run.yaml"), f"{wrong}=TYPO"], 2)
    assert ("data=TYPO: no such file or directory; give a set" if wrong == "data" else "'TYPO'") in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_data_is_looked_for_before_the_model_is_loaded(stage, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"{{model: TYPO, out: {tmp_path / 'run'}}}")
    assert "data=none.jsonl: no such file" in error_of(
        capsys, [stage, str(tmp_path / "run.yaml"), "data=none.jsonl"], 2
    )
    assert "data=: no such file" in error_of(capsys, [stage, str(tmp_path / "run.yaml")], 2)


@pytest.mark.slow
def test_the_same_command_with_the_right_data_then_works(folder, tmp_path, capsys):
    rows, config, out = tmp_path / "rows.jsonl", tmp_path / "run.yaml", tmp_path / "run"
    items = make_items(8, split="sft")
    messages = [world_prompt().render(item.question, item.response_a, item.response_b) for item in items]
    lines = [{"context_messages": m, "winner": oracle_trace(x)} for m, x in zip(messages, items, strict=True)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.write_text(f"{{model: {folder / 'model'}, out: {out}, dtype: float32, row_length: 512, max_steps: 1}}")
    assert "TYPO" in error_of(capsys, ["sft", str(config), "data=TYPO"], 2)
    assert cli.main(["sft", str(config), f"data={rows}"]) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["data"] == str(rows)
    capsys.readouterr()
    assert "another config (seed was 0, is 1)" in error_of(capsys, ["sft", str(config), f"data={rows}", "seed=1"], 2)


def test_a_run_in_place_of_its_model_names_the_model(folder, tmp_path, capsys):
    arguments = ["judge", "--input", str(folder / "pairs.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--model"]
    for stage in ("sft", "grpo"):
        (tmp_path / "quick" / stage).mkdir(parents=True)
        (tmp_path / "quick" / stage / "model").symlink_to(folder / "model")
    models = f"{tmp_path}/quick/grpo/model or {tmp_path}/quick/sft/model"
    assert f"is the directory of a run, not of a model; give the model in it: {models}" in error_of(
        capsys, [*arguments, str(tmp_path / "quick")], 2
    )
    line = error_of(capsys, [*arguments, str(tmp_path / "quick" / "sft")], 2)
    assert f"give the model in it: {tmp_path}/quick/sft/model\n" in line
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "config.yaml").write_text("model: m\n")
    assert f"`rmr1 export {unfinished} --out DIR`" in error_of(capsys, [*arguments, str(unfinished)], 2)
    (tmp_path / "empty").mkdir()
    assert "Expected the config.json of a Hugging Face model" in error_of(
        capsys, [*arguments, str(tmp_path / "empty")], 2
    )


def test_judge_reports_mistakes_before_it_judges(folder, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((folder / "pairs.jsonl").read_text() + "{oops\n")
    argv = judge_arguments(folder, "refused.jsonl", "--input", str(bad))
    assert f"{bad}:{PAIRS + 1}: not JSON" in error_of(capsys, argv, 2)
    assert "neither a name nor a file" in error_of(capsys, judge_arguments(folder, "r.jsonl", "--prompt", "core"), 2)
    argv = judge_arguments(folder, "refused.jsonl", "--model", str(tmp_path / "nowhere"))
    assert "is neither a directory nor a hub id" in error_of(capsys, argv, 2)
    assert not list(folder.glob("*.run.json"))


def test_judge_writes_bad_rows_to_rejects_and_refuses_another_model(policy, folder, tmp_path, capsys):
    bad, rejects = tmp_path / "bad.jsonl", tmp_path / "rejects.jsonl"
    bad.write_text("{oops\n" + "".join((folder / "pairs.jsonl").read_text().splitlines(keepends=True)[:4]))
    model = tmp_path / "model"
    policy.save(model)
    more = ("--input", str(bad), "--rejects", str(rejects), "--votes", "2", "--both-orders", "--model", str(model))
    argv = judge_arguments(folder, "kept.jsonl", *more)
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "4 pairs: " in out and "5 rows read, 4 kept, 1 rejected" in err
    assert len(rejects.read_text().splitlines()) == 1
    rows = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    assert [sum(row["votes"].values()) for row in rows] == [4] * 4
    before = (folder / "kept.jsonl").read_bytes()
    assert cli.main(argv) == 0  # everything is judged already
    assert (folder / "kept.jsonl").read_bytes() == before
    policy.with_params(jax.tree.map(lambda x: x * 1.01, policy.params)).save(
        model
    )  # other weights in the same directory
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "model was 'model (sha256 " in capsys.readouterr().err


def test_judge_samples_as_its_options_and_the_model_say(folder, tmp_path, capsys):
    model = with_template(folder / "model", tmp_path / "model", generation={"temperature": 0.6, "top_p": 0.9})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join((folder / "pairs.jsonl").read_text().splitlines(keepends=True)[:2]))

    def arguments(output: str, *more: str) -> list[str]:
        return judge_arguments(folder, str(tmp_path / output), "--model", str(model), "--input", str(pairs), *more)

    def settings_of(output: str, *more: str) -> dict:
        assert cli.main(arguments(output, *more)) == 0
        capsys.readouterr()
        return json.loads((tmp_path / f"{output}.run.json").read_text())

    plain = settings_of("plain.jsonl")
    # These keys, as in files of earlier versions, which therefore continue.
    keys = ["votes", "both_orders", "seed", "temperature", "max_new_tokens", "max_prompt_tokens"]
    assert list(plain) == ["model", "dtype", "input", "prompt", "escape_untrusted", "rule", *keys]
    theirs = settings_of("theirs.jsonl", "--generation-config")
    assert theirs == plain | {"temperature": 0.6, "top_p": 0.9}
    mixed = settings_of("mixed.jsonl", "--generation-config", "--top-p", "1", "--top-k", "7", "--min-p", "0.2")
    assert mixed == plain | {"temperature": 0.6, "top_k": 7, "min_p": 0.2}
    assert settings_of("cold.jsonl", "--generation-config", "--temperature", "0") == plain
    assert settings_of("all.jsonl", "--temperature", "0.6", "--top-k", "0") == plain | {"temperature": 0.6}
    off = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert settings_of("off.jsonl", *off) == plain | {"chat_template_kwargs": {"enable_thinking": False}}
    texts = [(tmp_path / f"{name}.jsonl").read_text() for name in ("plain", "off")]
    assert texts[0] != texts[1]
    assert cli.main(arguments("plain.jsonl", *off)) == 2
    assert "(chat_template_kwargs was None, is {'enable_thinking': False})" in capsys.readouterr().err

    for more, message in {
        ("--top-p", "0.9"): "top_p=0.9 changes nothing at temperature 0 (greedy)",
        ("--top-p", "1.5"): "sampling options: top_p: Input should be less than or equal to 1 (got 1.5)",
        (
            "--chat-template-kwargs",
            "enable_thinking=false",
        ): "expected a JSON object such as '{\"enable_thinking\": false}'",
        ("--chat-template-kwargs", "[1]"): "--chat-template-kwargs [1]: expected a JSON object",
        ("--chat-template-kwargs", '{"think": 1}'): "the chat template does not use 'think'; it takes enable_thinking",
    }.items():
        assert message in error_of(capsys, arguments("none.jsonl", *more), 2)
    argv = judge_arguments(folder, str(tmp_path / "none.jsonl"), "--generation-config")
    assert "model/generation_config.json: there is no such file" in error_of(capsys, argv, 2)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.slow
def test_a_killed_judge_resumes_to_the_same_bytes(folder, capsys):
    assert cli.main(judge_arguments(folder, "whole.jsonl")) == 0
    command = [sys.executable, "-m", "rmr1_jax", *judge_arguments(folder, "killed.jsonl")]
    cached = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    whole, output = (folder / "whole.jsonl").read_bytes(), folder / "killed.jsonl"
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=cached)
    while not (output.exists() and output.stat().st_size) and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    kept = output.read_bytes()
    assert 0 < len(kept) < len(whole)
    with output.open("ab") as file:
        file.write(b'{"id": "half')  # as a kill during a write would leave it
    resumed = subprocess.run(command, capture_output=True, text=True, env=cached, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{PAIRS} pairs: " in resumed.stdout
    assert output.read_bytes() == whole
    ids = [json.loads(line)["id"] for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert [json.loads(line)["id"] for line in whole.splitlines()] == ids
