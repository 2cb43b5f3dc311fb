"""Every README page is true: its examples run, and the facts, numbers and keys that it names are the code's.

Next: `test_readme_names.py`, for commands, settings, links and paths.
"""

import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from pages import PAGES, ROOT, blocks, documented, prose
from policies import ScriptedPolicy, prefers, says

from rmr1_jax.data.examples import sft_example
from rmr1_jax.judge.file import Output, judge_file
from rmr1_jax.judge.judge import Judge
from rmr1_jax.judge.judgement import Voting
from rmr1_jax.prompts.prompt import save_prompt
from rmr1_jax.prompts.verdict import strict_verdict
from rmr1_jax.quickstart import quickstart, world
from rmr1_jax.quickstart.cases import REASONING
from rmr1_jax.report.reading import STAGES
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train.config import SftConfig
from rmr1_jax.train.losses import LossInputs, PolicyLossConfig, policy_loss
from rmr1_jax.train.metrics import read_metrics
from rmr1_jax.train.sft import sft

POLICIES = ("gaotang/RM-R1-Qwen2.5-Instruct-7B", "runs/quickstart/sft/model", "runs/quickstart/grpo/model", "model")


def test_the_pages():
    rooms = {path.parent.name for path in ROOT.glob("rmr1_jax/*/__init__.py")}
    assert rooms == {Path(name).parent.name for name in PAGES if name.startswith("rmr1_jax/")}
    assert {"README.md", "configs/README.md", "scripts/README.md", "tests/README.md", "tpu/README.md"} <= set(PAGES)


# ---- examples


@pytest.fixture
def folder(tiny_policy, tmp_path, monkeypatch) -> Path:
    """The current directory of an example: policies under the names of the pages, a prompt, pairs, configs/."""
    monkeypatch.chdir(tmp_path)
    for name in POLICIES:
        tiny_policy.save(name)
        config = json.loads(Path(name, "config.json").read_text())
        # A judge's texts have half of the positions by default.
        Path(name, "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    for name in ("rm-r1.yaml", "runs/quickstart/prompt.yaml"):
        save_prompt(world.world_prompt(), name)
    with Path("pairs.jsonl").open("w") as file:
        for item in world.make_items(2, split="dev"):
            row = {k: getattr(item, k) for k in ("id", "question", "response_a", "response_b", "better")}
            file.write(json.dumps(row) + "\n")
    Path("configs").symlink_to(ROOT / "configs")
    assert dataclasses.replace(quickstart.GRPO, max_prompt_length=128)  # the real settings accept it, too
    tiny = {"row_length": 160, "micro_rows": 4, "sampling": SamplingConfig(n=2, max_new_tokens=16)}
    monkeypatch.setattr(quickstart, "GRPO", dataclasses.replace(quickstart.GRPO, **tiny))
    return tmp_path


def run(name: str) -> list[dict]:
    """The names that each Python block of a page leaves; a block sees the names of those before it."""
    names: dict = {}
    left = []
    for block in blocks(PAGES[name], "python"):
        exec(compile(block, name, "exec"), names)
        left.append(dict(names))
    return left


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page, "python")])
def test_python_examples_run(name, folder):
    run(name)


def page_with(*words: str) -> str:
    """The first page with a Python block that contains all of these words."""
    return next(n for n, page in PAGES.items() for b in blocks(page, "python") if all(w in b for w in words))


def test_the_judge_example_gets_its_votes(folder):
    [*_, names] = [names for names in run(page_with("Judge(", "votes=3, both_orders=True")) if "judgement" in names]
    assert sum(names["judgement"].votes.values()) == 6  # three votes in either order: the prompt was not too long


def test_the_research_example_is_short_and_trains(folder):
    name = page_with("grpo(", "reward=reward", "loss=loss")
    [example] = [block for block in blocks(PAGES[name], "python") if "reward=reward" in block]
    assert len(example.splitlines()) < 20
    names = next(names for names in run(name) if "trained" in names)
    assert len(names["prompts"]) == 64 and max(len(p.tokens) for p in names["prompts"]) <= 128
    rows = read_metrics("runs/mine")
    assert len(rows) == 2
    assert all(row["reward"] < -1 for row in rows)  # its own reward: the published one is never below -1
    assert all("clip_fraction" not in row for row in rows)  # its own loss
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), names["policy"].params, names["trained"].params)
    assert any(jax.tree.leaves(changed))
    x = jnp.ones((1, 4))
    given = {"old_logp": x, "ref_logp": x, "sampler_logp": x, "entropy": x, "advantages": x, "weights": x}
    config = PolicyLossConfig(importance_cap=2.0)
    inputs = LossInputs(logp=x, segment_ids=x.astype(int), max_segments=1, **given)
    metrics = policy_loss(config, inputs)[1]
    assert_documented("metrics.jsonl", "of GRPO", set(rows[0]) | set(metrics) - {"tokens"})


def assert_documented(file: str, word: str, keys: set[str]) -> None:
    """At least one page lists the keys of a file, and each that does lists exactly these."""
    found = documented(file, word)
    assert found and all(listed == keys for listed in found), (found, keys)


# ---- facts about the small world, the rules and the losses


def facts(pattern: str) -> list[re.Match]:
    """Every place, on any page, that matches; there must be one."""
    found = [match for page in PAGES.values() for match in re.finditer(pattern, prose(page), re.S)]
    assert found, pattern
    return found


def test_the_arguments_of_a_loss():
    taken = {field.name for field in dataclasses.fields(LossInputs)}
    for said in facts(r"`LossInputs`\s+with\s+the\s+fields\s+(.*?)\."):
        assert set(re.findall(r"`(\w+)`", said[1])) == taken


def test_the_numbers_of_questions():
    for said in facts(r"SFT\s+sees\s+(\d+).*?GRPO\s+draws\s+on\s+(\d+).*?over\s+(\d+)\s+more"):
        numbers = [int(n) for n in said.groups()]
        assert numbers == [quickstart.SFT_ITEMS, quickstart.GRPO_ITEMS, quickstart.TEST_ITEMS]
    assert quickstart.SFT.epochs == 1  # "once each"
    assert quickstart.GRPO.steps * quickstart.GRPO.prompts_per_step <= quickstart.GRPO_ITEMS


def test_the_tasks_of_the_small_world():
    for asked in facts(r"\*Reasoning\* questions ask to(.*?);"):
        assert [task for task in re.findall(r"\w+", asked[1]) if task in REASONING] == list(REASONING)
    assert len(REASONING) == 4


@pytest.mark.parametrize("x", ["A", "B"])
def test_the_strict_rule(x):
    answer, other = f"<answer>[[{x}]]</answer>", f"<answer>[[{'BA'['AB'.index(x)]}]]</answer>"
    assert strict_verdict(f"{other}</think> so {answer}") == x  # what follows the last </think>
    assert strict_verdict(f"{answer} </eval>\n</type>\n") == x  # stray closing tags and white space may follow
    for text in (f"{answer} so", f"{answer}<eval>", f"{answer}</quote_A>", f"{answer}{answer}", f"{other} or {answer}"):
        assert strict_verdict(text) is None, text


# ---- the files that a run leaves


def test_keys_of_sft_metrics(tiny_policy, tmp_path, monkeypatch):
    def instead_of_compiling(state, **unused):
        metrics = {"loss": 1.0, "grad_norm": 1.0}
        return lambda state, stacks: (state._replace(step=state.step + 1), metrics)

    monkeypatch.setattr(importlib.import_module("rmr1_jax.train.sft"), "compile_update", instead_of_compiling)
    row = sft_example(tiny_policy.tokenizer, "0", [{"role": "user", "content": "Reverse a b c."}], "c b a")
    config = SftConfig(out=str(tmp_path), row_length=64, rows_per_step=1, micro_rows=1, dtype="float32", remat="none")
    sft(config, policy=tiny_policy, examples=[row])
    assert_documented("metrics.jsonl", "of SFT", set(read_metrics(tmp_path)[0]))
    assert all((tmp_path / name).exists() for name in ("config.yaml", "checkpoints", "model"))


def test_keys_of_verdicts(tmp_path):
    pairs = [world.to_pair(item) for item in world.make_items(2, split="dev")]
    pairs.append(dataclasses.replace(pairs[0], id="long", better=None, conversation_a=[("assistant", "x" * 9999)]))
    judge = Judge(ScriptedPolicy(prefers("a")), max_prompt_tokens=9000)
    judge_file(judge, pairs, Output(path=tmp_path / "verdicts.jsonl"))
    rows = [set(json.loads(line)) for line in (tmp_path / "verdicts.jsonl").open()]
    assert rows[0] == rows[1]
    shown, conversations = {"question", "response_a", "response_b"}, {"conversation_a", "conversation_b"}
    known, sampled = {"correct", "better"}, {"tokens", "finish_reasons"}
    assert rows[2] == rows[0] - shown - known - sampled | conversations | {"prompt_tokens", "note"}
    undecided = Judge(ScriptedPolicy(says("--")))
    judge_file(undecided, pairs[:1], Output(path=tmp_path / "votes.jsonl"), Voting(votes=2))
    several = set(json.loads((tmp_path / "votes.jsonl").read_text()))
    assert several == rows[0] | {"texts", "verdicts", "reasons", "reason"}
    assert_documented("verdicts.jsonl", "", several | rows[2])
    assert (tmp_path / "verdicts.jsonl.run.json").is_file()


def test_keys_of_results():
    policy = ScriptedPolicy(prefers("a"))
    policy.encode = str.encode
    scores, _ = quickstart.evaluate(policy, world.make_items(16, split="dev"))
    assert_documented("results.json", "", {"seed", "n", "seconds", "notes"} | set(STAGES) | set(scores))
