"""What both stages take from the model they start from: its template with arguments, and the sampling it recommends."""

import functools

import numpy as np
import pytest
import yaml
from chat_models import NO_THOUGHT, with_template
from prepared import config_of, rows, write_rows
from training import small_grpo, small_sft

from rmr1_jax.data.prepare import prepare
from rmr1_jax.errors import InputError
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.train import grpo as grpo_module
from rmr1_jax.train import sft as sft_module
from rmr1_jax.train.run_directory import start_run

OFF = {"enable_thinking": False}
# The eight devices of the tests take a row each.
sft_config = functools.partial(small_sft, micro_rows=8, rows_per_step=8)
grpo_config = functools.partial(small_grpo, max_prompt_length=116)
STAGES = {"sft": (sft_module.sft, sft_config), "grpo": (grpo_module.grpo, grpo_config)}
RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.02}


class Stopped(Exception):
    """Ends a stage where its data is ready, with what it has by then."""


@pytest.fixture(scope="module")
def model(tiny_policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("model_settings")
    tiny_policy.save(path / "plain")
    return with_template(path / "plain", path / "model", generation=RECOMMENDED)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows")
    return {stage: write_rows(path / f"{stage}.jsonl", rows(6, sides=stage == "grpo", words=3)) for stage in STAGES}


@pytest.fixture
def start(monkeypatch):
    """Starts a stage, up to its first batch; returns its config and its examples or prompts."""

    def stop_sft(config, examples, *_):
        raise Stopped(config, examples)

    def stop_grpo(config, policy, prompts, *_):
        raise Stopped(config, prompts)

    monkeypatch.setattr(sft_module, "batches_of", stop_sft)
    monkeypatch.setattr(grpo_module, "roll_out", stop_grpo)

    def call(stage, config):
        with pytest.raises(Stopped) as caught:
            STAGES[stage][0](config)
        return caught.value.args

    return call


@pytest.mark.parametrize("stage", STAGES)
def test_rows_and_prepared_sets_are_rendered_with_the_arguments(start, model, data, tmp_path, stage):
    tokens = {}
    for name, arguments in (("plain", {}), ("off", OFF)):
        small = {"model": str(model), "chat_template_kwargs": arguments, "out": str(tmp_path / f"run-{name}")}
        _, from_rows = start(stage, STAGES[stage][1](data=str(data[stage]), **small))
        prepared = str(tmp_path / name)
        sources = {"model": str(model), "data": str(data[stage]), "chat_template_kwargs": arguments}
        prepare(config_of(out=prepared, stage=stage, **sources))
        _, from_set = start(stage, STAGES[stage][1](data=prepared, **small | {"out": str(tmp_path / f"set-{name}")}))
        tokens[name] = [x.tokens.tolist() for x in from_rows]
        assert tokens[name] == [x.tokens.tolist() for x in from_set]
    for plain, off in zip(tokens["plain"], tokens["off"], strict=True):
        assert len(off) > len(plain)
    refused = STAGES[stage][1](model=str(model), data=str(tmp_path / "off"), out=str(tmp_path / "refused"))
    message = r'was prepared with chat_template_kwargs=\{"enable_thinking": false\}, this is \{\}'
    with pytest.raises(InputError, match=message):
        STAGES[stage][0](refused)


def test_a_prompt_of_grpo_ends_with_the_template_s_empty_thought(start, model, data, tmp_path, tiny_policy):
    config = grpo_config(model=str(model), data=str(data["grpo"]), out=str(tmp_path), chat_template_kwargs=OFF)
    _, prompts = start("grpo", config)
    assert all(tiny_policy.tokenizer.decode(np.asarray(p.tokens)).endswith(NO_THOUGHT) for p in prompts)


def test_other_arguments_do_not_continue_a_run(start, model, data, tmp_path):
    small = {"model": str(model), "data": str(data["sft"]), "out": str(tmp_path)}
    config, _ = start("sft", sft_config(**small, chat_template_kwargs=OFF))
    start_run(config, tmp_path)  # as the stage does behind its data
    with pytest.raises(InputError, match=r"another config \(chat_template_kwargs.enable_thinking was False, is None\)"):
        sft_module.sft(sft_config(**small))
    start("sft", sft_config(**small, chat_template_kwargs=OFF))


def test_grpo_samples_as_the_model_recommends_on_request(start, model, data, tmp_path):
    small = {"model": str(model), "data": str(data["grpo"]), "out": str(tmp_path / "run")}
    for _ in range(2):  # the second call continues the first one's run
        config, _ = start("grpo", grpo_config(**small, generation_config=True))
        start_run(config, tmp_path / "run")
    drawing = {name: value for name, value in RECOMMENDED.items() if name != "do_sample"}
    assert config.sampling == SamplingConfig(n=4, max_new_tokens=12, **drawing)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert drawing.items() <= written["sampling"].items() and written["generation_config"] is False

    own = grpo_config(**small, generation_config=True, sampling=SamplingConfig(n=4, max_new_tokens=12, top_p=0.5))
    with pytest.raises(InputError, match=r"sampling.top_p=0.5 is set, and generation_config=true takes"):
        grpo_module.grpo(own)
    greedy = with_template(model, tmp_path / "greedy", generation={"do_sample": False})
    with pytest.raises(InputError, match=r"generation_config.json: asks for greedy sampling, with which the samples"):
        grpo_module.grpo(grpo_config(**small | {"model": str(greedy)}, generation_config=True))
