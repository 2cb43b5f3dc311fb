"""The sampling of a model's generation_config.json: what is taken from it, and what is refused."""

import json

import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.sampler.generation_config import recommended_sampling, with_recommended_sampling
from rmr1_jax.sampler.sample import SamplingConfig

QWEN3 = {"do_sample": True, "eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def write(path, content):
    (path / "generation_config.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (QWEN3, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        # Qwen2.5's, whose penalty is not applied
        (
            {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        ),
        ({"min_p": 0.1, "top_p": None}, {"temperature": 1.0, "min_p": 0.1}),
        ({"temperature": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"temperature": 0.5}),
        ({"temperature": 0.5, "top_k": -1}, {"temperature": 0.5}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"temperature": 0.0, "top_p": 0.9}, {"temperature": 0.0}),
    ],
)
def test_what_is_taken(tmp_path, content, expected):
    assert recommended_sampling(write(tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0 (got -1)"),
        ({"top_p": 1.5}, "top_p: Input should be less than or equal to 1 (got 1.5)"),
        ({"top_k": "many"}, "top_k: Input should be a valid integer"),
        ({"min_p": 1.0}, "min_p: Input should be less than 1 (got 1.0)"),
        ({"do_sample": "yes"}, "do_sample: expected true or false (got 'yes')"),
        ({"do_sample": True, "eos_token_id": 3}, "sets none of temperature, top_p, top_k, min_p; set the temperature,"),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    with pytest.raises(InputError) as caught:
        recommended_sampling(write(tmp_path, content))
    assert str(caught.value).startswith(f"{tmp_path}/generation_config.json: {message}")


def test_without_the_file(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}/generation_config.json: there is no such file"):
        recommended_sampling(tmp_path)


def test_own_values_and_the_model_s_are_not_mixed(tmp_path):
    plain = SamplingConfig(n=7, max_new_tokens=9)
    found = with_recommended_sampling(plain, write(tmp_path, QWEN3))
    assert found == SamplingConfig(n=7, max_new_tokens=9, temperature=0.6, top_p=0.95, top_k=20)
    with pytest.raises(InputError, match=r"sampling.min_p=0.2 is set, and generation_config=true takes temperature"):
        with_recommended_sampling(SamplingConfig(min_p=0.2), tmp_path)
