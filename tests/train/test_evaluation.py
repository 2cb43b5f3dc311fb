"""Held-out data: the loss is the one that Transformers computes, verdicts are counted by hand, and training does not
notice."""

import dataclasses
import re

import numpy as np
import pytest
from training import assert_same, metrics_but_timings, run, small_examples, small_grpo, small_prompts, small_sft, vowels

from rmr1_jax.data.examples import sft_example
from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.policy import load
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train.config import BestConfig
from rmr1_jax.train.evaluation import grpo_evaluation
from rmr1_jax.train.grpo import grpo
from rmr1_jax.train.metrics import read_metrics
from rmr1_jax.train.sft import sft


@pytest.fixture(scope="module")
def policy(tiny_policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("held out") / "model"
    tiny_policy.save(path)
    return load(path, "float32", single_device_mesh())


def transformers_loss(model, examples) -> float:
    """The mean over all trained tokens, each example alone and unpadded."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.tokens[None].astype(np.int64))
        labels = torch.where(torch.tensor(example.trained[None]), ids, -100)
        trained = int(example.trained[1:].sum())
        with torch.no_grad():
            total += float(theirs(ids, labels=labels).loss) * trained
        count += trained
    return total / count


@pytest.fixture(scope="module")
def measured(policy, tmp_path_factory):
    """A run with held-out data: (config, trained policy, held-out examples)."""
    out = tmp_path_factory.mktemp("measured")
    best = BestConfig(metric="eval_loss", mode="max")
    config = small_sft(out=str(out), max_steps=5, save_every=100, eval_every=2, keep=1, best=best)
    held_out = small_examples(policy, 20)[12:]
    return config, sft(config, policy=policy, examples=small_examples(policy), eval_examples=held_out), held_out


def test_the_loss_is_that_of_transformers(measured):
    config, _, held_out = measured
    losses = {row["step"]: row["eval_loss"] for row in read_metrics(config.out) if "eval_loss" in row}
    assert list(losses) == [1, 3, 4]
    assert losses[4] == pytest.approx(transformers_loss(f"{config.out}/model", held_out), rel=1e-5)
    assert losses[1] > losses[3] > losses[4]


def test_training_does_not_notice(policy, measured, tmp_path):
    config, trained, _ = measured
    plain = run("sft", dataclasses.replace(config, out=str(tmp_path), best=None), policy)
    assert_same(plain.params, trained.params)
    with_eval = [{k: v for k, v in row.items() if k != "eval_loss"} for row in metrics_but_timings(config.out)]
    assert metrics_but_timings(tmp_path) == with_eval


def test_the_best_checkpoint_is_chosen_where_the_metric_was_measured(measured, tmp_path):
    from pathlib import Path

    config = measured[0]
    kept = sorted(path.name for path in Path(config.out, "checkpoints").iterdir())
    assert kept == ["2", "5"]  # step 1 has the largest loss of those that were measured; and the newest


def test_best_needs_held_out_data_and_a_metric_of_it(policy, tmp_path):
    examples = small_examples(policy)
    config = small_sft(out=str(tmp_path / "a"), max_steps=1, best=BestConfig(metric="eval_loss"))
    with pytest.raises(
        InputError, match=r"best.metric='eval_loss' is measured on held-out data, and eval_data is empty"
    ):
        sft(config, policy=policy, examples=examples)
    assert not (tmp_path / "a").exists()
    config = small_sft(out=str(tmp_path / "b"), max_steps=1, best=BestConfig(metric="eval_los"))
    with pytest.raises(
        InputError, match=r"best.metric='eval_los' is not a metric of this stage, which has .*eval_loss"
    ):
        sft(config, policy=policy, examples=examples, eval_examples=examples)


def test_held_out_rows_that_do_not_fit(policy, tmp_path):
    examples = small_examples(policy)
    longest = max(examples, key=len)
    shorter = [each for each in examples if len(each) < len(longest)]
    config = small_sft(out=str(tmp_path / "run"), row_length=len(longest) - 1)
    with pytest.raises(InputError, match=rf"eval_data: 1 examples are longer than row_length={len(longest) - 1}"):
        sft(config, policy=policy, examples=shorter, eval_examples=[longest])
    dropping = dataclasses.replace(config, on_too_long="drop")
    with pytest.raises(InputError, match="eval_data has 0 rows that are short enough; expected at least 1"):
        sft(dropping, policy=policy, examples=shorter, eval_examples=[longest])
    short = small_grpo(out=str(tmp_path / "run"), max_prompt_length=5)
    with pytest.raises(InputError, match="eval_data has 0 rows that are short enough"):
        grpo_evaluation(short, policy, small_prompts(policy), vowels)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_greedy_verdicts_are_counted(policy, tmp_path):
    """A policy that has learned to answer A or B by its prompt, not always rightly."""
    prompts = small_prompts(policy, 24)
    messages = [{"role": "user", "content": "unused"}]
    examples = []
    for k, prompt in enumerate(prompts):
        made = sft_example(policy.tokenizer, prompt.id, messages, f"<answer>[[{'AAB'[k % 3]}]]</answer>")
        target = made.tokens[made.trained]
        tokens = np.concatenate([prompt.tokens, target]).astype(np.int32)
        trained = np.arange(len(tokens)) >= len(prompt.tokens)
        examples.append(dataclasses.replace(made, tokens=tokens, trained=trained))
    taught = sft(small_sft(out=str(tmp_path / "sft"), max_steps=60), policy=policy, examples=examples)
    sampling = SamplingConfig(n=4, max_new_tokens=24, temperature=0.7)
    config = small_grpo(out=str(tmp_path / "grpo"), steps=3, eval_every=2, sampling=sampling, structure="verdict")
    trained = grpo(config, policy=taught, prompts=prompts[:8], reward=vowels, eval_prompts=prompts[8:])
    rows = read_metrics(config.out)
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [1, 2]
    samples = trained.sample([p.tokens.tolist() for p in prompts[8:]], max_new_tokens=24, temperature=0)
    texts = [policy.tokenizer.decode(group[0].token_ids) for group in samples]
    named = [re.findall(r"\[\[(A|B)\]\]", text) for text in texts]
    right = [set(names) == {prompt.better} for names, prompt in zip(named, prompts[8:], strict=True)]
    assert 0 < sum(right) < len(right)
    assert rows[-1]["eval_accuracy"] == sum(right) / 16
    assert rows[-1]["eval_reward"] == pytest.approx(np.mean([sum(c in "aeiou" for c in text) for text in texts]))
    assert rows[-1]["eval_response_length"] == np.mean([len(group[0].token_ids) for group in samples])
    complete = [re.fullmatch(r"\s*<answer>\[\[[AB]\]\]</answer>\s*", text) is not None for text in texts]
    assert rows[-1]["eval_valid"] == sum(complete) / 16

    plain = grpo(
        dataclasses.replace(config, out=str(tmp_path / "plain")), policy=taught, prompts=prompts[:8], reward=vowels
    )
    assert_same(plain.params, trained.params)
