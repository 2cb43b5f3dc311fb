"""The first line of a command comes before JAX is imported, which takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmr1_jax.quickstart.plan import plan_text

ROOT = Path(__file__).parents[2]
# A process in which the import of JAX says so, and ends the command as Ctrl-C does.
SCRIPT = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            print("IMPORT", file=sys.stderr, flush=True)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Watch())
from rmr1_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def lines_of(folder: Path, *words: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RMR1_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 130 and done.stdout == "", done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_training(tmp_path, stage):
    (tmp_path / "c.yaml").write_text("out: runs/first\n")
    lines = lines_of(tmp_path, stage, "c.yaml", "seed=1")
    assert lines[:2] == [f"{stage}: c.yaml seed=1: loading JAX ...", "IMPORT"]


def test_judging(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "1", "question": "q", "response_a": "a", "response_b": "b"}\n')
    lines = lines_of(tmp_path, "judge", "--model", "m", "--input", "p.jsonl", "--output", "o.jsonl")
    assert lines[:3] == ["judge: reading p.jsonl, for m ...", "loading JAX ...", "IMPORT"]
    lines = lines_of(tmp_path, "judge", "--model", "m", "q", "a", "b")
    assert lines[:3] == ["judge: one question, for m ...", "loading JAX ...", "IMPORT"]


def test_the_quickstart_says_first_what_it_will_do(tmp_path):
    lines = lines_of(tmp_path, "quickstart", "--out", "here")
    plan = plan_text(Path("here"), control=False).splitlines()
    assert lines[: len(plan) + 2] == [*plan, "loading JAX ...", "IMPORT"]
    assert "about 6 minutes" in plan[0] and "(new)" in plan[-1]
    (tmp_path / "sft").mkdir()
    again = plan_text(tmp_path, control=True)
    assert "about 8 minutes" in again and "it resumes" in again and "4. control" in again
    page = " ".join((ROOT / "README.md").read_text().split())
    assert "6 minutes on two idle cores, 8 with the control" in page
