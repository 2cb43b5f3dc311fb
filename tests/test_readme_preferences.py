"""The README's section about your own preferences runs as it stands, only smaller.

A scripted teacher stands in for the quickstart's model, unless RMR1_QUICKSTART names the directory of a finished
`rmr1 quickstart`: then its models are teacher and student.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import PAGES, ROOT, blocks, shell_commands

from rmr1_jax.cli import main as cli
from rmr1_jax.data.chains.policy_teacher import PolicyTeacher
from rmr1_jax.prompts.prompt import save_prompt
from rmr1_jax.prompts.verdict import other_side
from rmr1_jax.quickstart import world
from rmr1_jax.reply import Answer

SMALLER = {"epochs": 1, "steps": 2, "prompts_per_step": 8, "mini_batch_prompts": 8}
ITEMS = 40


def section() -> str:
    [found] = re.findall(r"^### Train on your own preferences$.*?(?=^##)", PAGES["README.md"], re.M | re.S)
    return found


@pytest.fixture(params=["scripted", "quickstart"])
def folder(request, tiny_policy, tmp_path, monkeypatch) -> Path:
    """The current directory: a quickstart's models, and the recipes with fewer steps."""
    monkeypatch.chdir(tmp_path)
    few = world.make_items(ITEMS, split="dev")
    monkeypatch.setattr(world, "make_items", lambda n, *, split: few)
    if request.param == "quickstart":
        if not (finished := os.environ.get("RMR1_QUICKSTART")):
            pytest.skip("RMR1_QUICKSTART names no directory of a finished `rmr1 quickstart`")
        Path("runs").mkdir()
        Path("runs/quickstart").symlink_to(Path(finished).resolve())
    else:
        for stage in ("sft", "grpo"):
            tiny_policy.save(f"runs/quickstart/{stage}/model")
            save_prompt(world.world_prompt(), f"runs/quickstart/{stage}/model/prompt.yaml")
        monkeypatch.setattr(PolicyTeacher, "ask", oracle(few))
    for path in (ROOT / "configs").glob("preferences_*.yaml"):
        settings = yaml.safe_load(path.read_text())
        settings |= {key: value for key, value in SMALLER.items() if key in settings}
        Path("configs").mkdir(exist_ok=True)
        Path("configs", path.name).write_text(yaml.safe_dump(settings))
    return tmp_path


def oracle(items):
    """A teacher that judges these items rightly in both orders, and no other text."""
    traces = {}
    for item in items:
        a, b = {"response_a": item.response_a, "found_a": item.found_a}, [item.response_b, item.found_b]
        swapped = {"response_a": b[0], "found_a": b[1], "response_b": a["response_a"], "found_b": a["found_a"]}
        for shown in (item, dataclasses.replace(item, **swapped, better=other_side(item.better))):
            traces[world.render(shown)[-1]["content"]] = world.oracle_trace(shown)

    def ask(self, requests):
        for request in requests:
            yield request.key, Answer(text=traces[request.messages[-1]["content"]], finish_reason="stop")

    return ask


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def run(request, capsys):
    """Runs the words of a command and returns what it prints. With a quickstart's models it does so on one device, as a
    user's machine has: the programs of eight virtual ones compile several times as long."""

    def in_process(words: list[str]) -> str:
        assert cli.main(words) == 0, words
        return capsys.readouterr().out

    def on_one_device(words: list[str]) -> str:
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        command = [sys.executable, "-m", "rmr1_jax", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return on_one_device if request.node.callspec.params["folder"] == "quickstart" else in_process


@pytest.mark.slow
def test_from_a_preference_file_to_a_judge(folder, run):
    page = section()
    exec(compile(blocks(page, "python")[0], "README.md", "exec"), {})
    assert len(rows("preferences.jsonl")) == ITEMS
    example = shell_commands(f"```bash\n{blocks(page, 'bash')[0]}```\n")
    assert [words[:2] for words in example[:5]] == [
        *(["rmr1", "data"], ["rmr1", "data"], ["rmr1", "sft"], ["rmr1", "data"], ["rmr1", "grpo"])
    ]
    for program, *words in example:
        assert program == "rmr1"
        assert ("next:" in run(words)) == (words[0] != "compare"), words
    data, chains = "runs/preferences/data", rows("runs/preferences/chains/chains.jsonl")
    pairs, held_out = rows(f"{data}/pairs.jsonl"), rows(f"{data}/held_out.jsonl")
    assert len(pairs) + len(held_out) == ITEMS and held_out
    assert len(pairs) * 0.8 <= len(chains) <= len(pairs)
    for name in ("before", "after"):
        judged = rows(f"{name}.jsonl")
        assert [row["id"] for row in judged] == [row["id"] for row in held_out]
        assert all("correct" in row for row in judged)
    for stage in ("sft", "grpo"):
        assert Path(f"runs/preferences/{stage}/model/prompt.yaml").is_file()


def test_the_recipes_follow_one_another():
    """Each recipe reads what an earlier one writes, or the quickstart's models, or the user's file."""
    written = {"preferences.jsonl", *(f"runs/quickstart/{stage}/model" for stage in ("sft", "grpo"))}
    for step, files in {
        "mix": ("pairs.jsonl", "held_out.jsonl"),
        "chains": ("chains.jsonl",),
        "sft": ("model", "model/prompt.yaml"),
        "prompts": ("",),
        "grpo": ("model",),
    }.items():
        settings = yaml.safe_load((ROOT / "configs" / f"preferences_{step}.yaml").read_text())
        read = [settings.get(key) for key in ("model", "data", "pairs", "prompt")]
        read += [source["path"] for source in settings.get("sources", ())]
        read += [settings.get("policy", {}).get("model")]
        assert {each for each in read if each} <= written, step
        written |= {f"{settings['out']}/{name}".rstrip("/") for name in files}
