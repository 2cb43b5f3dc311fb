"""The folder tpu/: the doctor finds what is wrong, the scripts do what they document, and the notebook runs."""

import json
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
RESTARTED = {42, *range(127, 256)}  # preempted; killed, or another host was lost

# Lists two hosts, and runs commands for a host on this machine, with its name as HOST.
FAKE_GCLOUD = """\
#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
    *list-instances*) printf '%s\\n' $HOSTS ;;
    "compute ssh"*) last="${@: -1}"; HOST="$3" bash -c "${last#--command=}" ;;
esac
"""


def run(*words, env=None, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | (env or {})
    return subprocess.run([*map(str, words)], env=env, capture_output=True, text=True, timeout=1200, **options)


def command_line(name: str, text: str, folder: Path) -> dict[str, str]:
    """Return an environment in which the program `name` is this script."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return {"PATH": f"{path.parent}:{os.environ['PATH']}"}


# ---- the doctor


def doctor(*words, env=None) -> tuple[int, dict[str, tuple[bool, str]]]:
    """Return the exit code, and for each check whether it succeeded and its message."""
    done = run(sys.executable, TPU / "doctor.py", *words, env=env)
    lines = [re.fullmatch(r"(ok  |FAIL) (.{13}) +[\d.]+ s  (.*)", line).groups() for line in done.stdout.splitlines()]
    return done.returncode, {name.strip(): (state == "ok  ", said) for state, name, said in lines}


CHECKS = ["versions", "start up", "platform", "devices", "output", "all hosts sum"]


def test_doctor_on_a_machine_that_is_ready(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    code, found = doctor("--out", tmp_path / "new", "--platform", "cpu", "--chips", 4, "--hosts", 1, env=flags)
    assert code == 0 and list(found) == CHECKS and all(success for success, _ in found.values())
    assert "10 over 4 devices" in found["all hosts sum"][1]  # 1 + 2 + 3 + 4
    assert not list((tmp_path / "new").iterdir())


def test_doctor_on_a_machine_that_is_not_ready(tmp_path):
    """JAX runs on the CPU instead of a TPU, there are too few chips, and the output directory is below a file."""
    (tmp_path / "file").touch()
    code, found = doctor("--out", tmp_path / "file" / "runs", "--chips", 4)
    assert code == 1 and list(found) == CHECKS
    assert {name for name, (success, _) in found.items() if success} <= {"versions", "start up", "all hosts sum"}
    assert found["platform"][1].startswith("JAX runs on cpu, expected tpu")
    assert "expected 4 chips" in found["devices"][1] and "NotADirectoryError" in found["output"][1]


def test_doctor_names_the_missing_host(tmp_path):
    variables = {"RMR1_COORDINATOR": "localhost:1", "RMR1_PROCESSES": "2", "RMR1_PROCESS": "1"}
    code, found = doctor("--out", tmp_path, "--platform", "cpu", "--timeout", 1, env=variables)
    assert code == 1 and list(found) == CHECKS[:2]  # without all its hosts a slice does not respond
    assert not found["start up"][0] and "process 0" in found["start up"][1]


# ---- launching


@pytest.mark.parametrize("script", sorted([*TPU.glob("*.sh"), *TPU.glob("*.sbatch")]), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert run("bash", "-n", script).stderr == ""


def test_the_jobset_restarts_by_exit_code():
    spec = yaml.safe_load((TPU / "gke_jobset.yaml").read_text())
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [rule] = spec["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert spec["spec"]["failurePolicy"]["maxRestarts"] > 1
    [job] = spec["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    assert job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert set(rule["onExitCodes"]["values"]) == RESTARTED and len(rule["onExitCodes"]["values"]) <= 255
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"] and pod["restartPolicy"] == "Never"
    # As many hosts as the slice has.
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    [text] = container["args"]
    assert f"--chips {chips} --hosts {job['completions']} " in text
    assert re.search(r"&& exec rmr1 sft (\S+)", text) and (ROOT / re.search(r"configs/\S+", text)[0]).is_file()
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and f"out={mount['mountPath']}/" in text


def test_the_sky_task():
    task = yaml.safe_load((TPU / "skypilot.yaml").read_text())
    assert re.fullmatch(r"tpu-v6e-\d+", task["resources"]["accelerators"])
    codes = set(task["resources"]["job_recovery"]["recover_on_exit_codes"])
    assert 42 in codes and codes <= RESTARTED
    assert "setup_host.sh" in task["setup"] and all(f"${name}" in task["run"] for name in task["envs"])
    assert (ROOT / task["envs"]["CONFIG"]).is_file() and "/runs" in task["file_mounts"]


@pytest.mark.parametrize(
    "end", ["exit 0", "exit 1", "exit 2", "exit 42", "exit 134", "sleep 1; kill -USR1 $PPID; sleep 1"]
)
def test_slurm_requeues_by_exit_code(tmp_path, end):
    """The last case is the signal of Slurm before the time limit."""
    calls = tmp_path / "calls"
    env = command_line("srun", f'echo "$@" >> {calls}; {end}', tmp_path)
    command_line("scontrol", f'echo "scontrol $@" >> {calls}', tmp_path)
    done = run("bash", TPU / "slurm.sbatch", "sft", "a b.yaml", env=env | {"SLURM_JOB_ID": "7"})
    first, *rest = calls.read_text().splitlines()
    code = int(end.split()[1]) if end.startswith("exit") else 138
    assert done.returncode == code and first.endswith(".venv/bin/rmr1 sft a b.yaml")
    assert rest == (["scontrol requeue 7"] if code in RESTARTED else [])


def all_hosts(tmp_path, command: str, **env: str) -> subprocess.CompletedProcess:
    env = {"CALLS": str(tmp_path / "calls"), "HOSTS": "one two"} | command_line("gcloud", FAKE_GCLOUD, tmp_path) | env
    return run("bash", TPU / "run_all_hosts.sh", "slice", "zone-b", command, env=env)


def test_a_command_on_all_hosts(tmp_path):
    done = all_hosts(tmp_path, "echo hello from $HOST of $RMR1_PROCESSES", EXPLICIT="1")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["one: hello from one of 2", "two: hello from two of 2"]
    done = all_hosts(tmp_path, "echo $RMR1_COORDINATOR $RMR1_PROCESS", EXPLICIT="1")
    assert sorted(done.stdout.splitlines()) == ["one: one:8482 0", "two: one:8482 1"]
    assert all_hosts(tmp_path, "echo", HOSTS="").returncode == 2
    assert run("bash", TPU / "run_all_hosts.sh", "slice").returncode == 2


def test_the_exit_code_is_that_of_the_host_that_failed_first(tmp_path):
    assert all_hosts(tmp_path, "[ $HOST = two ] && exit 2; exit 134").returncode == 2
    assert all_hosts(tmp_path, "[ $HOST = two ] && exit 0; exit 134").returncode == 134


def test_all_hosts_restart_only_after_a_preemption(tmp_path):
    tried = tmp_path / "tried"
    again = {"RESTARTS": "2", "RESTART_DELAY": "0"}
    # Ends with 42 until each of the two hosts has started twice.
    done = all_hosts(tmp_path, f"echo >> {tried}; sleep 0.2; [ $(wc -l < {tried}) -ge 4 ] || exit 42", **again)
    assert done.returncode == 0 and len(tried.read_text()) == 4
    tried.unlink()
    assert all_hosts(tmp_path, f"echo >> {tried}; exit 42", **again).returncode == 42
    assert len(tried.read_text()) == 2 * 3
    tried.unlink()
    assert all_hosts(tmp_path, f"echo >> {tried}; exit 2", **again).returncode == 2
    assert len(tried.read_text()) == 2


@pytest.mark.parametrize(
    ("slice", "machine", "hosts"), [("v6e:4x4", "ct6e-standard-4t", 4), ("v5p:4x4x4", "ct5p-hightpu-4t", 16)]
)
def test_a_slice_on_compute_engine(slice, machine, hosts):
    done = run("bash", TPU / "gce_mig.sh", "create", "s", slice, "us-east5-b", env={"DRY_RUN": "1", "PROJECT": "p"})
    policy, template, group, resize = done.stdout.splitlines()
    assert f"--accelerator-topology={slice.split(':')[1]}" in policy and "--region=us-east5 " in policy
    assert f"--machine-type={machine} --provisioning-model=SPOT" in template
    assert "--target-size-policy-mode=bulk" in group and "--workload-policy=projects/p/regions/us-east5/" in group
    assert resize.endswith(f"--size={hosts}")


@pytest.mark.parametrize("slice", ["v5e:4x4", "v6e:2x1", "4x4"])
def test_an_unknown_slice(slice):
    done = run("bash", TPU / "gce_mig.sh", "create", "s", slice, "us-east5-b", env={"DRY_RUN": "1", "PROJECT": "p"})
    assert done.returncode == 2 and slice in done.stderr and not done.stdout


# ---- the page and the notebook


def test_the_page_names_the_files_of_the_folder():
    text = (TPU / "README.md").read_text()
    names = set(re.findall(r"`(?:tpu/)?([\w.]+\.(?:sh|py|yaml|sbatch|ipynb)|Dockerfile)`", text))
    assert names == {path.name for path in TPU.iterdir() if path.is_file()} - {"README.md"}
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert link.startswith("https://") or (TPU / link).exists(), link
    for config in re.findall(r"configs/[\w.]+\.yaml", text):
        assert (ROOT / config).is_file(), config
    for marker in ("begin", "end"):
        assert text.count(f"<!-- plan:{marker} -->") == 1


def notebook_cells() -> list[dict]:
    notebook = json.loads((TPU / "colab.ipynb").read_text())
    assert notebook["nbformat"] == 4 and notebook["metadata"]["accelerator"] == "TPU"
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_installs_jax_before_it_is_imported():
    install, *rest = notebook_cells()
    assert install["metadata"]["tags"] == ["install"] and "import jax" not in "".join(install["source"])
    assert 'jax[tpu]"' in "".join(install["source"])
    assert not any("install" in cell["metadata"].get("tags", []) for cell in rest)
    assert 'default_backend() == "tpu"' in "".join(rest[1]["source"])
    assert all(not cell["outputs"] for cell in (install, *rest))


RUN_CELLS = """
import json, sys
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"code cell {number}", "exec"), names)
"""


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    sources = ["".join(cell["source"]) for cell in notebook_cells()[1:]]
    env = {"RMR1_SMALL": "1", "RMR1_REPO": str(ROOT)}
    done = run(sys.executable, "-c", RUN_CELLS, env=env, cwd=tmp_path, input=json.dumps(sources))
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs"
    assert (runs / "report.html").is_file() and (runs / "quickstart/results.json").is_file()
    for stage, steps in (("sft", 4), ("grpo", 2)):
        assert len((runs / stage / "metrics.jsonl").read_text().splitlines()) == steps
        assert (runs / stage / "model/config.json").is_file()
    assert json.dumps("runs/start") not in done.stdout and "'invalid'" in done.stdout  # the judge's votes
