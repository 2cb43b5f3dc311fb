"""The README is true: its examples run, its settings load, its commands parse; paths, links and keys are there."""

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from policies import ScriptedPolicy, prefers

from rmr1_jax.cli import main as cli
from rmr1_jax.cli.data import Data
from rmr1_jax.cli.eval import Compare, Eval, Score
from rmr1_jax.cli.judge import JudgePairs
from rmr1_jax.cli.train import Export, Plan
from rmr1_jax.data.examples import sft_example
from rmr1_jax.judge.file import Output, judge_file
from rmr1_jax.judge.judge import Judge
from rmr1_jax.prompts.prompt import save_prompt
from rmr1_jax.prompts.verdict import strict_verdict
from rmr1_jax.quickstart import quickstart, world
from rmr1_jax.quickstart.cases import REASONING
from rmr1_jax.report.training import STAGES
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train.config import GrpoConfig, SftConfig
from rmr1_jax.train.losses import PolicyLossConfig, policy_loss
from rmr1_jax.train.metrics import read_metrics
from rmr1_jax.train.sft import sft

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = r"^```{}\n(.*?)^```$"
PROSE = re.sub(FENCE.format(r"\w*"), "", README, flags=re.M | re.S)


def blocks(language: str) -> list[str]:
    return re.findall(FENCE.format(language), README, re.M | re.S)


def example(word: str) -> str:
    """The one Python block with this word in it."""
    [block] = [block for block in blocks("python") if word in block]
    return block


def run(block: str) -> dict:
    """The names that a block leaves, run in the current directory as it stands."""
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def documented(file: str, word: str = "") -> set[str]:
    """The keys in backticks of the one bullet that begins with this file and has this word in it."""
    bullets = [b for b in re.findall(r"^- (.*(?:\n  .*)*)", PROSE, re.M) if b.startswith(f"`{file}`") and word in b]
    assert len(bullets) == 1, bullets
    return set(re.findall(r"`(\w+)`", bullets[0]))


# ---- the examples


def test_every_python_block_is_run_below():
    assert set(blocks("python")) == {example("Judge("), example("grpo(")}


def test_the_judge_example(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = dataclasses.replace(tiny_policy.config, max_position_embeddings=128)  # so it may write 64 tokens
    dataclasses.replace(tiny_policy, config=shape).save("gaotang/RM-R1-Qwen2.5-Instruct-7B")
    save_prompt(world.world_prompt(), "rm-r1.yaml")
    judgement = run(example("Judge("))["judgement"]
    assert sum(judgement.votes.values()) == 6  # three votes in either order: the prompt was not too long


def test_the_research_example_is_short_and_trains(tiny_policy, tmp_path, monkeypatch):
    assert len(example("grpo(").splitlines()) < 20
    monkeypatch.chdir(tmp_path)
    tiny_policy.save("runs/quickstart/sft/model")
    dataclasses.replace(quickstart.GRPO, max_prompt_length=128)  # fits with the quickstart's own sizes, too
    tiny = {"row_length": 160, "micro_rows": 4, "sampling": SamplingConfig(n=2, max_new_tokens=16)}
    monkeypatch.setattr(quickstart, "GRPO", dataclasses.replace(quickstart.GRPO, **tiny))
    names = run(example("grpo("))
    assert len(names["prompts"]) == 64 and max(len(p.tokens) for p in names["prompts"]) <= 128
    rows = read_metrics("runs/mine")
    assert len(rows) == 2
    assert all(row["reward"] < -1 for row in rows)  # its own reward: the published one is never below -1
    assert all("clip_fraction" not in row for row in rows)  # its own loss
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), names["policy"].params, names["trained"].params)
    assert any(jax.tree.leaves(changed))
    assert documented("metrics.jsonl", "of GRPO") == set(rows[0]) | metrics_of_the_loss()


def metrics_of_the_loss() -> set[str]:
    x = jnp.ones((1, 4))
    given = {"old_logp": x, "ref_logp": x, "sampler_logp": x, "entropy": x, "advantages": x, "weights": x}
    config = PolicyLossConfig(importance_cap=2.0)
    return set(policy_loss(config, logp=x, segment_ids=x.astype(int), max_segments=1, **given)[1]) - {"tokens"}


def test_what_is_handed_to_a_loss_is_named():
    said = re.search(r"A loss gets the keyword arguments of `losses.policy_loss`: (.*?)\.", PROSE, re.S)[1]
    taken = policy_loss.__kwdefaults__.keys() | set(policy_loss.__annotations__) - {"config", "return"}
    assert set(re.findall(r"`(\w+)`", said)) == taken


# ---- what is said of the small world and of the rules


def test_the_numbers_of_questions():
    said = re.search(r"SFT\s+sees\s+(\d+).*?GRPO\s+draws\s+on\s+(\d+).*?over\s+(\d+)\s+more", PROSE, re.S)
    assert [int(n) for n in said.groups()] == [quickstart.SFT_ITEMS, quickstart.GRPO_ITEMS, quickstart.TEST_ITEMS]
    assert quickstart.SFT.epochs == 1  # "once each"
    assert quickstart.GRPO.steps * quickstart.GRPO.prompts_per_step <= quickstart.GRPO_ITEMS


def test_the_tasks_of_the_small_world():
    asked = re.search(r"\*Reasoning\* questions ask to(.*?);", PROSE, re.S)[1]
    assert [task for task in re.findall(r"\w+", asked) if task in REASONING] == list(REASONING)
    assert len(REASONING) == 4


@pytest.mark.parametrize("x", ["A", "B"])
def test_the_strict_rule(x):
    answer, other = f"<answer>[[{x}]]</answer>", f"<answer>[[{'BA'['AB'.index(x)]}]]</answer>"
    assert strict_verdict(f"{other}</think> so {answer}") == x  # what follows the last </think>
    assert strict_verdict(f"{answer} </eval>\n</type>\n") == x  # stray closing tags and white space may follow
    for text in (f"{answer}.", f"{answer}<eval>", f"{answer}</quote_A>", f"{answer}{answer}", f"{other} or {answer}"):
        assert strict_verdict(text) is None, text


# ---- the files that a run leaves


def test_keys_of_sft_metrics(tiny_policy, tmp_path, monkeypatch):
    def instead_of_compiling(state, **unused):
        metrics = {"loss": 1.0, "grad_norm": 1.0}
        return lambda state, batch, count: (state._replace(step=state.step + 1), metrics)

    monkeypatch.setattr(importlib.import_module("rmr1_jax.train.sft"), "compile_update", instead_of_compiling)
    row = sft_example(tiny_policy.tokenizer, "0", [{"role": "user", "content": "Reverse a b c."}], "c b a")
    config = SftConfig(out=str(tmp_path), row_length=64, rows_per_step=1, micro_rows=1, dtype="float32", remat="none")
    sft(config, policy=tiny_policy, examples=[row])
    assert documented("metrics.jsonl", "of SFT") == set(read_metrics(tmp_path)[0])
    assert all((tmp_path / name).exists() for name in ("config.yaml", "checkpoints", "model"))


def test_keys_of_verdicts(tmp_path):
    pairs = [world.to_pair(item) for item in world.make_items(2, split="dev")]
    pairs.append(dataclasses.replace(pairs[0], id="long", better=None, conversation_a=[("assistant", "x" * 9999)]))
    judge = Judge(ScriptedPolicy(prefers("a")), max_prompt_tokens=9000)
    judge_file(judge, pairs, Output(path=tmp_path / "verdicts.jsonl"))
    rows = [set(json.loads(line)) for line in (tmp_path / "verdicts.jsonl").open()]
    assert rows[0] == rows[1] == documented("verdicts.jsonl") - {"note"}
    assert rows[2] == documented("verdicts.jsonl") - {"correct"}
    assert (tmp_path / "verdicts.jsonl.run.json").is_file()


def test_keys_of_results():
    policy = ScriptedPolicy(prefers("a"))
    policy.encode = str.encode
    scores, _ = quickstart.evaluate(policy, world.make_items(16, split="dev"))
    assert documented("results.json") == {"seed", "n", "seconds", "notes"} | set(STAGES) | set(scores)


# ---- commands and settings


def command_lines() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    inline = [shlex.split(code) for code in re.findall(r"`(bash scripts/[^`]*)`", PROSE)]
    return [words for words in (*lines, *inline) if words]


@pytest.fixture
def settings(tmp_path, monkeypatch) -> dict:
    """A directory with the YAML blocks under the names in their first lines, and what the stages are called with."""
    monkeypatch.chdir(tmp_path)
    for block in blocks("yaml"):
        Path(re.match(r"# (\S+\.yaml)\n", block)[1]).write_text(block)
    seen: dict = {}
    for stage in ("sft", "grpo"):
        module = importlib.import_module(f"rmr1_jax.train.{stage}")
        monkeypatch.setattr(module, stage, lambda config: seen.update({config.out: config}))
    commands = (
        cli.Quickstart,
        Plan,
        JudgePairs,
        Data,
        Eval,
        Score,
        Compare,
        Export,
        cli.Report,
    )
    for command in commands:
        monkeypatch.setattr(command, "run", lambda self: None)
    return seen


@pytest.fixture
def bench(monkeypatch):
    """scripts/bench.py as a module whose commands are read but not run."""
    spec = importlib.util.spec_from_file_location("readme_bench", ROOT / "scripts" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "readme_bench", module)
    spec.loader.exec_module(module)
    for command in (module.Sample, module.Steps, module.Train):
        monkeypatch.setattr(command, "run", lambda self: None)
    return module


def test_commands_are_taken_as_they_stand(settings, bench):
    for program, *words in command_lines():
        if program == "bash":
            assert (ROOT / words[0]).is_file(), words
            if words[0] == "scripts/quickstart":
                assert cli.main(["quickstart", *words[1:]]) == 0
        elif program == "rmr1":
            assert cli.main(words) == 0, words
        elif program == "python":
            assert words[0] == "scripts/bench.py" and bench.main(words[1:]) == 0, words
        else:
            assert program in ("hf", "source")
    recipe = settings["runs/grpo-7b"]
    assert recipe == GrpoConfig(model="runs/sft-7b/model", data="rlvr", out="runs/grpo-7b")  # "the defaults"
    assert settings["runs/sft-7b"].optimizer.lr == 5e-6 and settings["runs/sft-7b"].row_length == 12288
    assert settings["runs/dapo-7b"].loss.clip_high == 0.28
    assert {Path(block.split()[1]).stem for block in blocks("yaml")} == {"sft_7b", "grpo_7b"}


def test_commands_named_in_the_text_exist(capsys):
    named = set(re.findall(r"`rmr1 ([a-z ]+)`", PROSE))
    assert {"judge", "data prompt"} <= named
    for words in named:
        with pytest.raises(SystemExit) as left:
            cli.main([*words.split(), "--help"])
        assert left.value.code == 0, words


def test_the_judge_s_options_are_all_there():
    table = "\n".join(line for line in README.splitlines() if line.startswith("| `--"))
    shown = set(re.findall(r"--[a-z-]+", table)) | {
        word for _, *words in command_lines() if words[0] == "judge" for word in words if word.startswith("--")
    }
    assert shown == {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(JudgePairs)}


# ---- paths and links


def tree() -> set[str]:
    """The paths that the annotated tree names. A line is names, two or more spaces, and what they are."""
    paths, folders = set(), {}
    [block] = blocks("tree")
    for line in block.splitlines():
        indent, names = re.match(r"( *)(\S+(?: \S+)*)", line).groups()
        for name in names.split(", "):
            path = folders.get(len(indent) - 2, "") + name
            paths.add(path)
            if name.endswith("/"):
                folders[len(indent)] = path
    return paths


def test_the_tree_is_the_tree():
    named = {found.relative_to(ROOT).as_posix() for path in tree() for found in ROOT.glob(path.rstrip("/"))}
    gone = [path for path in tree() if not list(ROOT.glob(path.rstrip("/")))]
    assert not gone
    files = [*ROOT.glob("rmr1_jax/**/*.*"), *ROOT.glob("configs/*"), *ROOT.glob("scripts/*"), *ROOT.glob("tpu/*")]
    there = {file.relative_to(ROOT).as_posix() for file in files if file.is_file() and file.suffix != ".pyc"}
    rooms = {f"{path}__init__.py" for path in tree() if path.endswith("/")} - {"rmr1_jax/__init__.py"}
    assert there - rooms == {path for path in named if not path.startswith("tests")} - {
        path for path in named if (ROOT / path).is_dir()
    }


def test_links_lead_somewhere():
    titles = [re.sub(r"[^\w -]", "", title) for title in re.findall(r"^#+ (.*)", PROSE, re.M)]
    anchors = {title.lower().replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 5
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).is_file(), link


def test_files_named_in_the_text_exist():
    """`engine.py` and the like, wherever in the repository they are."""
    for name in set(re.findall(r"`(\w+\.(?:py|j2))`", PROSE)):
        assert list(ROOT.glob(f"rmr1_jax/**/{name}")), name
