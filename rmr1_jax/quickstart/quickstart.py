"""The whole method in minutes on a CPU: a small world, a biased teacher, SFT, GRPO, and an evaluation of each stage.

A Qwen-shaped policy of a million parameters learns from a teacher's traces to judge pairs of answers. The teacher
evaluates correctly, but where only the worse answer sounds confident, its verdict often names that one. Distillation
copies the bias too; GRPO's verifiable reward then corrects it. Evaluation is greedy, on questions that no stage saw,
the better answer as often A as B. The settings (`model.yaml`, `sft.yaml`, `grpo.yaml`) were chosen on the split "dev";
the reported scores are of the split "test". Read next: `world.py` (the questions and the teacher),
`rmr1_jax/train/sft.py`, `rmr1_jax/train/grpo.py`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmr1_jax.config import load_config, read_yaml
from rmr1_jax.data.examples import Example, sft_example
from rmr1_jax.distributed.terminal import waiting
from rmr1_jax.judge.judge import Judge
from rmr1_jax.judge.judgement import Judgement
from rmr1_jax.model.config import parse_config
from rmr1_jax.policy import Policy, fresh_policy
from rmr1_jax.prompts.prompt import PROMPT_FILE, save_prompt
from rmr1_jax.quickstart import world
from rmr1_jax.quickstart.tokenizer import train_tokenizer
from rmr1_jax.report.report import write_report
from rmr1_jax.train.config import GrpoConfig, SftConfig
from rmr1_jax.train.grpo import grpo
from rmr1_jax.train.metrics import read_metrics
from rmr1_jax.train.rollout import RlPrompt
from rmr1_jax.train.sft import sft

SFT_ITEMS = 14000  # pairs, each seen once: a policy of this size memorizes pairs that it sees again
GRPO_ITEMS = 2000
TEST_ITEMS = 1024

HERE = Path(__file__).parent
MODEL = parse_config(read_yaml(HERE / "model.yaml"), "model.yaml")
SFT = load_config(SftConfig, HERE / "sft.yaml")
GRPO = load_config(GrpoConfig, HERE / "grpo.yaml")
MAX_TRACE = GRPO.sampling.max_new_tokens  # the longest trace of the teacher has 70

NOTES = (
    "The teacher evaluates correctly, but where only the worse answer opens with confidence (Surely!, Certainly!), its "
    f"verdict names that answer {100 * world.TEACHER_BIAS:.0f}% of the time. These are a quarter of all questions; on "
    "the others its verdict is right. In the questions, an opening says nothing about which answer is better.",
    "GRPO sees other questions than SFT, with the reward +1 for the right verdict and -1 otherwise. The scores are "
    "greedy judgements of questions that neither stage saw, the better answer as often A as B.",
)


def quickstart(out: str | Path, *, seed: int = 0, control: bool = False) -> dict[str, Any]:
    """Run all stages; writes `results.json`, `report.html`, `samples.jsonl` and the training runs to `out`.

    An interrupted run resumes when it is called again with the same arguments.

    Args:
      control: also give the policy after SFT as many seconds of further SFT on the same teacher as GRPO took.

    Returns:
      The content of `results.json`; the README of this directory describes its keys.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with waiting("training the tokenizer"):
        train_tokenizer(world.world_texts(seed=0), out / "tokenizer")
    prompt_file = out / "prompt.yaml"
    save_prompt(world.world_prompt(), prompt_file)
    save_prompt(world.world_prompt(), out / "tokenizer" / PROMPT_FILE)  # goes with the tokenizer into every model
    with waiting("making a judge with random weights"):
        policy = fresh_policy(MODEL, out / "tokenizer", seed=seed)
    test = world.make_items(TEST_ITEMS, split="test", seed=seed)
    with waiting("writing the questions and the teacher's traces"):
        examples = sft_examples(policy, world.make_items(SFT_ITEMS, split="sft", seed=seed), seed)
        prompts = rl_prompts(policy, world.make_items(GRPO_ITEMS, split="grpo", seed=seed))
    results: dict[str, Any] = {"seed": seed, "n": len(test), "seconds": {}, "notes": list(NOTES)}
    rows: list[dict[str, Any]] = []

    def stage(name: str, train: Callable[[], Policy]) -> Policy:
        began = time.perf_counter()
        trained = train()
        results["seconds"][name] = round(time.perf_counter() - began, 1)
        with waiting(f"judging {len(test):,} questions with the policy {name}"):
            scores, judged = evaluate(trained, test)
        results[name] = scores
        rows.extend({"stage": name} | row for row in judged)
        accuracy, valid = 100 * scores["accuracy"], 100 * scores["valid"]
        print(f"{name}: accuracy {accuracy:.1f}%, valid traces {valid:.1f}% of {len(test)} pairs", flush=True)
        return trained

    sft_config = dataclasses.replace(SFT, out=str(out / "sft"), seed=seed)
    grpo_config = dataclasses.replace(GRPO, out=str(out / "grpo"), seed=seed)
    stage("before", lambda: policy)
    distilled = stage("sft", lambda: sft(sft_config, policy=policy, examples=examples))
    stage("grpo", lambda: grpo(grpo_config, policy=distilled, prompts=prompts))
    if control:
        more = _control_config(sft_config, out / "control", sft_run=out / "sft", grpo_run=out / "grpo")
        stage("control", lambda: sft(more, policy=distilled, examples=examples))
    samples = "".join(json.dumps(row) + "\n" for row in _select_samples(rows))
    (out / "samples.jsonl").write_text(samples, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report = write_report([out], out / "report.html")
    print(f"\n{table(results)}\n\nThe report: {report}\nNext, let the judge compare two answers of its small world:")
    print(f'    rmr1 judge --model {out}/grpo/model "Swap d g c." "Surely! It is c g d." "Perhaps! It is g d c."')
    return results


def sft_examples(policy: Policy, items: Sequence[world.Item], seed: int) -> list[Example]:
    """Tokenises the teacher's traces as training rows."""
    return [sft_example(policy.tokenizer, i.id, world.render(i), world.teacher_trace(i, seed=seed)) for i in items]


def rl_prompts(policy: Policy, items: Sequence[world.Item]) -> list[RlPrompt]:
    """Renders the questions that GRPO samples on; only the reward knows which answer is better."""
    rendered = [policy.tokenizer.render(world.render(item)) for item in items]
    return [RlPrompt(i.id, np.asarray(ids, np.int32), i.better, i) for i, ids in zip(items, rendered, strict=True)]


def evaluate(policy: Policy, items: Sequence[world.Item]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Judges every item greedily.

    Returns:
      The scores, and a row for each item. A judgement without a verdict counts as wrong. `tempted` is the accuracy
      where only the worse answer sounds confident; `mean_tokens` is the mean length of a trace.
    """
    judge = Judge(policy, world.world_prompt(), max_new_tokens=MAX_TRACE, slots=256)
    judgements = judge.compare_many([world.to_pair(i) for i in items])
    right = np.asarray([j.winner == i.better for i, j in zip(items, judgements, strict=True)])
    kind = np.asarray([i.kind for i in items])
    tempted = np.asarray([i.tempted for i in items])
    scores = {
        "accuracy": right.mean(),
        "reasoning": right[kind == "reasoning"].mean(),
        "chat": right[kind == "chat"].mean(),
        "tempted": right[tempted].mean(),
        "valid": np.mean([j.trace.is_complete() for j in judgements]),
        "mean_tokens": np.mean([len(policy.tokenizer.encode(j.text)) for j in judgements]),
    }
    return {k: float(v) for k, v in scores.items()}, [_row(i, j) for i, j in zip(items, judgements, strict=True)]


def table(results: dict[str, Any]) -> str:
    """Formats the scores of every stage as text."""
    columns = ("accuracy", "reasoning", "chat", "tempted", "valid")
    lines = [f"{'':9}" + "".join(f"{c:>11}" for c in columns) + f"{'tokens':>9}{'seconds':>9}"]
    for name in ("before", "sft", "grpo", "control"):
        if name in results:
            row = results[name]
            shares = "".join(f"{100 * row[c]:10.1f}%" for c in columns)
            lines.append(f"{name:9}{shares}{row['mean_tokens']:9.1f}{results['seconds'][name]:9.0f}")
    return "\n".join(lines)


def _row(item: world.Item, judgement: Judgement) -> dict[str, Any]:
    shown = ("id", "kind", "task", "tempted", "question", "response_a", "response_b", "better")
    judged = {"winner": judgement.winner, "correct": judgement.winner == item.better, "text": judgement.text}
    return {name: getattr(item, name) for name in shown} | judged


def _select_samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Selects twelve items for the report, each with its rows after SFT and after GRPO.

    Six are of each kind: up to three whose correctness GRPO changed, and otherwise items on which it did not.
    """
    by_stage = {s: {r["id"]: r for r in rows if r["stage"] == s} for s in ("sft", "grpo")}
    chosen = []
    for kind in ("reasoning", "chat"):
        ids = [i for i, r in by_stage["grpo"].items() if r["kind"] == kind]
        changed = [i for i in ids if by_stage["sft"][i]["correct"] != by_stage["grpo"][i]["correct"]]
        same = [i for i in ids if i not in set(changed)]
        chosen += changed[:3] + same[: 6 - len(changed[:3])]
    return [by_stage[stage][i] for i in chosen for stage in ("sft", "grpo")]


def _control_config(config: SftConfig, out: Path, *, sft_run: Path, grpo_run: Path) -> SftConfig:
    """The same SFT in another order, for as many steps as fit in the seconds that GRPO took."""
    budget = sum(row["seconds"] for row in read_metrics(grpo_run))
    per_step = float(np.median([row["seconds"] for row in read_metrics(sft_run)]))
    steps = max(1, round(budget / per_step))
    return dataclasses.replace(config, out=str(out), seed=config.seed + 1000, epochs=100, max_steps=steps)
