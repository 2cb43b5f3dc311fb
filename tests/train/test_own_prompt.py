"""The prompt that a model was trained with is known from its data and written beside it."""

import json

from policies import tiny_policy

from rmr1_jax.data.prepare import PrepareConfig, prepare
from rmr1_jax.data.store import prompt_of
from rmr1_jax.policy import load
from rmr1_jax.prompts.prompt import get_prompt, load_prompt
from rmr1_jax.quickstart.world import world_prompt
from rmr1_jax.train.run_directory import save_model


def rendered(prompt, count=3):
    messages = [prompt.render(f"question {k}", "yes", "no") for k in range(count)]
    return [json.dumps({"context_messages": m, "winner": "model_a"}) for m in messages]


def test_rows_and_prepared_sets_tell_their_prompt(tmp_path):
    tiny_policy().tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("\n".join(rendered(world_prompt())))
    pair = {"id": "1", "question": "q", "response_a": "yes", "response_b": "no", "better": "A"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    settings = {"model": str(tmp_path / "tokenizer"), "stage": "grpo", "workers": 1}
    prepare(PrepareConfig(data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "a"), **settings))
    prepare(PrepareConfig(data=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "b"), prompt="compare", **settings))
    world = world_prompt().render("q", "a", "b")
    assert prompt_of(tmp_path / "rows.jsonl").render("q", "a", "b") == world
    assert prompt_of(tmp_path / "a").render("q", "a", "b") == world
    assert prompt_of(tmp_path / "b").identity == get_prompt("compare").identity
    (tmp_path / "rows.jsonl").write_text("\n".join([*rendered(world_prompt()), *rendered(get_prompt("compare"))]))
    assert prompt_of(tmp_path / "rows.jsonl") is None


def test_a_trained_model_has_the_prompt_of_its_data_or_of_the_model_before_it(tmp_path):
    policy = tiny_policy()
    save_model(policy, tmp_path / "none", None)
    assert not (tmp_path / "none/model/prompt.yaml").exists()
    save_model(policy, tmp_path / "sft", world_prompt())
    assert load_prompt(tmp_path / "sft/model/prompt.yaml").identity == world_prompt().identity
    distilled = load(tmp_path / "sft/model", "float32")
    save_model(distilled, tmp_path / "grpo", None)
    assert load_prompt(tmp_path / "grpo/model/prompt.yaml").identity == world_prompt().identity
    save_model(distilled, tmp_path / "other", get_prompt("compare"))
    assert load_prompt(tmp_path / "other/model/prompt.yaml").identity == get_prompt("compare").identity


def test_a_prompt_that_no_file_can_hold_is_not_told(tmp_path):
    prompt = world_prompt()
    odd = type(prompt)(
        name="odd",
        system="{question}",
        single_turn=("{question} " + prompt.single_turn[0], *prompt.single_turn[1:]),
        multi_turn=prompt.multi_turn,
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(rendered(odd)))
    assert prompt_of(tmp_path / "rows.jsonl") is None
