"""Tests of evaluations from end to end: samples, full counts, kills, and scores from logs alone."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from eval_data import made_data, write_rows
from eval_worker import ScriptedJudge, run_benchmark

from rmr1_jax.cli.main import main
from rmr1_jax.errors import InputError
from rmr1_jax.eval.evaluate import load, score_logs
from rmr1_jax.eval.registry import BENCHMARKS
from rmr1_jax.prompts.prompt import save_prompt
from rmr1_jax.quickstart.world import world_prompt

SUPPORT = Path(__file__).resolve().parents[1] / "support"

WORKER = SUPPORT / "eval_worker.py"
SAMPLES = {
    "rewardbench": "rewardbench/filtered_sample.jsonl",
    "rm-bench": "rm_bench/dataset_sample.json",
    "rmb": "rmb",
}
LOGS = {
    "rewardbench": ["reward_bench/log_result/logs.json"],
    "rm-bench": [f"RM-Bench/total_dataset_{k}_scripted.json" for k in (1, 2, 3)],
    "rmb": ["RMB/Pairwise_set_Helpfulness/logs.json", "RMB/BoN_set_Helpfulness/raw_logs.json"],
}


@pytest.fixture
def sample(shared_data, tmp_path):
    """The path of a benchmark's shared rows; for RMB without the logs beside them."""

    def sample_of(benchmark):
        source = shared_data / SAMPLES[benchmark]
        if benchmark == "rmb":
            for name in ("BoN_set", "Pairwise_set"):
                shutil.copytree(source / name, tmp_path / "rmb" / name, dirs_exist_ok=True)
            return tmp_path / "rmb"
        return source

    return sample_of


def files_of(out):
    """Contents by path."""
    return {
        str(path.relative_to(out)): path.read_text(encoding="utf-8")
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def timeless(out):
    """Contents by path, without the time at which the summary was written: two runs end at two times."""
    files = files_of(out)
    assert json.loads(files.pop("about.json")).keys() == {"version", "written"}
    return files


@pytest.mark.parametrize("benchmark", SAMPLES)
def test_a_benchmark_from_end_to_end_and_again_from_its_logs(benchmark, sample, tmp_path):
    data, out = sample(benchmark), tmp_path / "out"
    options = {"name": "scripted", "both_orders": True, "votes": 3, "batch_size": 50}
    options["limit"] = 30 if benchmark == "rm-bench" else None
    counts, scores = run_benchmark(benchmark, ScriptedJudge(), data, out, **options)
    made = files_of(out)
    assert (
        counts.pairs == len(list(load(benchmark, data, options["limit"]))) == len(made["judgements.jsonl"].splitlines())
    )
    assert {name for name in made if "score" not in name} >= {*LOGS[benchmark], "summary.json"}
    for name, content in scores.items():
        assert json.loads(made[name]) == content

    judge = ScriptedJudge()
    assert run_benchmark(benchmark, judge, data, out, **options) == (counts, scores)
    assert judge.asked == 0 and files_of(out) == made  # nothing twice, and nothing changes

    for name, logs in (("ours", out / "judgements.jsonl"), ("published", out)):
        if name == "published":
            (out / "judgements.jsonl").unlink()
        again, failures = score_logs(benchmark, logs, tmp_path / name)
        assert (again, failures) == (scores, [])
        rescored = files_of(tmp_path / name)
        assert {name: rescored[name] for name in scores} == {name: made[name] for name in scores}


def test_scores_are_computed_in_place_or_by_another_rule(sample, tmp_path):
    out = tmp_path / "out"
    _, scores = run_benchmark("rewardbench", ScriptedJudge(), sample("rewardbench"), out, name="scripted")
    before = files_of(out)
    assert score_logs("rewardbench", out, out) == (scores, [])
    assert files_of(out) == before
    with pytest.raises(InputError, match=r"holds judgements that `rmr1 score` did not make; give another --out"):
        score_logs("rewardbench", out, out, rule="strict")
    # A text that says more than its verdict is one by the published rule only.
    path = out / "judgements.jsonl"
    path.write_text(path.read_text().replace("</answer>", "</answer> I am sure."))
    assert score_logs("rewardbench", out, tmp_path / "eval", rule="eval") == (scores, [])
    strict, _ = score_logs("rewardbench", out, tmp_path / "strict", rule="strict")
    assert set(strict[BENCHMARKS["rewardbench"].main_scores].values()) == {0.0}
    again, _ = score_logs("rewardbench", out, tmp_path / "strict", rule="eval")  # its own output may be replaced
    assert again == scores


def test_a_limited_run_judges_items_all_over_the_data_and_a_later_run_the_rest(sample, tmp_path):
    whole = {name: list(load(name, sample(name))) for name in SAMPLES}
    for name, pairs in whole.items():
        few = list(load(name, sample(name), 7))
        assert len({pair.meta.get("item", pair.id) for pair in few}) == 7
        by_id = {pair.id: pair for pair in pairs}
        assert all(by_id[pair.id] == pair for pair in few)  # with the same order and place
        assert few[-1].meta["number"] > 0.7 * len(pairs)
        assert list(load(name, sample(name), 10**6)) == pairs
    with pytest.raises(InputError, match="limit=0 must be at least 1"):
        load("rmb", sample("rmb"), 0)
    out, data = tmp_path / "out", sample("rmb")
    first = run_benchmark("rmb", ScriptedJudge(), data, out, name="scripted", limit=7)[0].pairs
    judge = ScriptedJudge()
    run_benchmark("rmb", judge, data, out, name="scripted")
    assert judge.asked == len(whole["rmb"]) - first
    run_benchmark("rmb", ScriptedJudge(), data, tmp_path / "other", name="scripted")
    assert timeless(out) == timeless(tmp_path / "other")
    run_benchmark("rmb", ScriptedJudge(), data, out, name="scripted", limit=3)  # what is there counts
    assert timeless(out) == timeless(tmp_path / "other")


def test_another_judge_or_benchmark_does_not_continue_a_run(sample, tmp_path):
    out, data = tmp_path / "out", sample("rewardbench")
    run_benchmark("rewardbench", ScriptedJudge(), data, out, name="scripted", limit=3)
    with pytest.raises(InputError, match="judge was 'scripted', is 'other'"):
        run_benchmark("rewardbench", ScriptedJudge(), data, out, name="other")
    with pytest.raises(InputError, match="rule was 'eval', is 'strict'"):
        run_benchmark("rewardbench", ScriptedJudge(rule="strict"), data, out, name="scripted")
    with pytest.raises(InputError, match="holds judgements of rewardbench, not of rmb"):
        score_logs("rmb", out, tmp_path / "elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", SAMPLES)
def test_the_command_evaluates_a_small_model(benchmark, sample, tiny_policy, tmp_path, capsys):
    tiny_policy.save(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    save_prompt(world_prompt(), tmp_path / "prompt.yaml")
    out = tmp_path / "out"
    command = ["eval", benchmark, "--model", str(tmp_path / "model"), "--data", str(sample(benchmark))]
    command += ["--out", str(out), "--prompt", str(tmp_path / "prompt.yaml"), "--dtype", "float32"]
    command += ["--limit", "3", "--max-new-tokens", "8", "--max-prompt-tokens", "4096", "--slots", "8"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"written: {out}" in told and f"next:    rmr1 report {out}" in told and "0.00%" in told
    settings = json.loads((out / "judgements.jsonl.run.json").read_text())
    published = {"rule": "eval", "votes": 1, "both_orders": False, "temperature": 0.0, "escape_untrusted": False}
    assert settings.items() >= {**published, "benchmark": benchmark, "judge": "model", "max_new_tokens": 8}.items()
    rows = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    assert len(rows) == len(list(load(benchmark, sample(benchmark), 3)))
    assert {row["status"] for row in rows} <= {"invalid", "too_long"} and any(row["tokens"] == [[8]] for row in rows)
    made = files_of(out)
    assert {"summary.json", *(BENCHMARKS[benchmark].scores(rows))} < set(made)
    if benchmark == "rewardbench":
        assert main(command) == 0 and files_of(out) == made
        assert main([*command, "--votes", "2"]) == 2
        assert "was made with other settings (votes was 1, is 2" in capsys.readouterr().err
        assert main([*command[:4], "--out", str(out)]) == 2
        assert "--data is missing" in capsys.readouterr().err


# ---- killed ----


def start(benchmark, data, out, seconds=0.0, batch_size=16, model=""):
    command = [sys.executable, WORKER, benchmark, data, out, seconds, batch_size, model]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*run, **options):
    """Runs to its end; the peak memory in MiB."""
    process = start(*run, **options)
    told, error = process.communicate()
    assert process.returncode == 0, error
    return float(told)


def kill_again_and_again(kills, benchmark, data, out, total, **options):
    """Runs that are killed after a random number of further judgements each; returns how many rows each left."""
    left, draw = [0], random.Random(0)
    path = out / "judgements.jsonl"
    for k in range(kills):
        process = start(benchmark, data, out, **options)
        enough = left[-1] + draw.randint(1, max(1, 2 * (total - left[-1]) // (kills + 1 - k) - 1))
        while process.poll() is None and (path.read_bytes().count(b"\n") if path.exists() else 0) < enough:
            time.sleep(draw.random() / 100)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left.append(path.read_bytes().count(b"\n"))
    return left[1:]


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", SAMPLES)
def test_killed_at_ten_random_moments_the_files_are_those_of_a_run_that_was_not(benchmark, sample, tmp_path):
    data = sample(benchmark)
    total = len(list(load(benchmark, data)))
    left = kill_again_and_again(10, benchmark, data, tmp_path / "killed", total, seconds=0.003)
    assert left == sorted(left) and len({rows for rows in left if rows < total}) > 5  # the last may have been ready
    finish(benchmark, data, tmp_path / "killed")
    run_benchmark(benchmark, ScriptedJudge(), data, tmp_path / "whole", name="scripted", batch_size=16)
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")


@pytest.mark.slow
def test_a_model_that_is_killed_writes_the_same_texts(tiny_policy, tmp_path):
    tiny_policy.save(tmp_path / "model")
    rows = [
        {
            "prompt": f"Reverse a b {c}" * (1 + k % 3),
            "chosen": f"{c} b a",
            "rejected": "x " * k,
            "subset": "hep-go",
            "id": k,
        }
        for k, c in enumerate("cdefghijklmnopqrstuvwxyzCDEFGHIJ")
    ]
    data = write_rows(tmp_path / "filtered.jsonl", rows)
    options = {"batch_size": 8, "model": tmp_path / "model"}
    left = kill_again_and_again(3, "rewardbench", data, tmp_path / "killed", len(rows), seconds=0.1, **options)
    assert any(count % 8 for count in left) and left[-1] < len(rows)
    finish("rewardbench", data, tmp_path / "killed", **options)
    finish("rewardbench", data, tmp_path / "whole", **options)
    made = timeless(tmp_path / "whole")
    assert timeless(tmp_path / "killed") == made
    texts = [json.loads(line)["texts"][0][0] for line in made["judgements.jsonl"].splitlines()]
    assert len(set(texts)) > len(rows) // 4


# ---- the full counts ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "pairs", "items"), [("rewardbench", 2985, 2985), ("rm-bench", 9 * 1327, 1327), ("rmb", 25845, 20917)]
)
def test_the_full_counts(benchmark, pairs, items, tmp_path):
    data = made_data(benchmark, tmp_path / "data", words=5)
    counts, scores = run_benchmark(benchmark, ScriptedJudge(), data, tmp_path / "out", name="scripted")
    assert counts.pairs == pairs
    found = list(load(benchmark, data))
    assert len(found) == pairs and len({pair.meta.get("item", pair.id) for pair in found}) == items
    main = scores[BENCHMARKS[benchmark].main_scores]
    if benchmark == "rmb":
        assert list(main) == [*list(main)[:4], "Accuracy Averaged from Four Sections"] and len(main) == 5
        help_, harm = (
            scores[f"RMB/BoN_set_{goal}/score_result/Final_score.json"][0] for goal in ("Helpfulness", "Harmlessness")
        )
        assert (help_["BoN Absolute Total Numbers"], harm["BoN Absolute Total Numbers"]) == (2109, 1677)
    again, failures = score_logs(benchmark, tmp_path / "out" / "judgements.jsonl", tmp_path / "again")
    assert (again, failures) == (scores, [])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """A row takes some hundred bytes for its id and outcome, and nothing for its kilobytes of texts."""
    peaks, sizes = [], []
    for times, words in ((1, 10), (1, 100), (4, 10)):
        data = made_data("rewardbench", tmp_path / f"data{times}-{words}", times, words)
        out = tmp_path / f"out{times}-{words}"
        peaks.append(finish("rewardbench", data, out))
        sizes.append((out / "judgements.jsonl").stat().st_size / 2**20)
    assert sizes[1] > sizes[0] + 10 and sizes[2] > sizes[0] + 10
    assert peaks[1] < peaks[0] + 4
    assert peaks[2] < peaks[0] + 3 * 2985 * 1500 / 2**20


# ---- scores from logs alone ----


def test_published_logs_are_scored_without_jax(shared_data, tmp_path):
    code = (
        "import sys; from rmr1_jax.cli.main import main\n"
        f"assert main(['score', 'rm-bench', '--logs', {str(shared_data / 'rm_bench/logs')!r}, '--out', 'out']) == 0\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'pyarrow', 'optax', 'orbax', 'tensorflow', 'openai'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "45.60%  score      95% interval 27.7 to 64.8, n = 15 items" in run.stdout and "written: out" in run.stdout
    assert json.loads((tmp_path / "out/RM-Bench/final_result.json").read_text())["chat"] == pytest.approx(0.6111111111)


def test_a_malformed_log_is_named_and_the_others_count(shared_data, tmp_path, capsys):
    logs = tmp_path / "logs"
    shutil.copytree(shared_data / "rmb/logs/RM-R1-DeepSeek-Distilled-Qwen-32B", logs)
    spoilt = logs / "Pairwise_set_Helpfulness/logs.json"
    text = spoilt.read_text(encoding="utf-8")
    spoilt.write_text(text.removesuffix("\n]") + ",\n]", encoding="utf-8")  # as one released file has it
    line = spoilt.read_text(encoding="utf-8").count("\n")
    assert main(["score", "rmb", "--logs", str(logs), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert re.search(rf"{spoilt}: not JSON: .*line ({line}|{line + 1}) column", told.err)
    assert "BoN Helpfulness" in told.out and "Pairwise" not in told.out
    rows = [json.loads(line) for line in (tmp_path / "out/judgements.jsonl").read_text().splitlines()]
    assert [row["meta"]["kind"] for row in rows] == ["best-of-n"] * 2  # nothing of the file, not even its good entries
    assert json.loads((tmp_path / "out/RMB/META_RESULT.json").read_text()) == {"BoN Helpfulness": 1.0}
    assert json.loads((tmp_path / "out/summary.json").read_text())["n"] == 2


@pytest.mark.parametrize("spoilt", [1, 2, 3])
def test_a_malformed_log_of_rm_bench(shared_data, tmp_path, capsys, spoilt):
    logs = tmp_path / "logs"
    shutil.copytree(shared_data / "rm_bench/logs", logs)
    (path,) = logs.glob(f"total_dataset_{spoilt}_*.json")
    path.write_text(path.read_text(encoding="utf-8").removesuffix("\n]") + ",\n]", encoding="utf-8")
    command = ["score", "rm-bench", "--logs", str(logs), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"{path}: not JSON: " in told and f"rejected style {(spoilt - 1) % 3}" in told
    assert not (tmp_path / "out/RM-Bench").exists()
    assert main([*command, "--compat", "released"]) == 2
    assert (tmp_path / "out/RM-Bench/final_result.json").exists() == (spoilt == 2)  # which that scorer never reads


def test_a_log_that_is_not_there(tmp_path, capsys):
    for benchmark in BENCHMARKS:
        assert main(["score", benchmark, "--logs", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
        assert f"{tmp_path / 'none'}: cannot be opened" in capsys.readouterr().err
        assert main(["score", benchmark, "--logs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        assert "holds no judgements.jsonl and no" in capsys.readouterr().err
