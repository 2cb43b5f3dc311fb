"""Arguments of the chat template: they reach what is rendered and the fingerprint, and wrong names are refused."""

import pytest
from chat_models import NO_THOUGHT, QWEN3, with_template

from rmr1_jax.errors import InputError
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.quickstart.tokenizer import CHAT_TEMPLATE

MESSAGES = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Reverse a b c"}]
OFF = {"enable_thinking": False}


@pytest.fixture
def directory(world_tokenizer, tmp_path):
    return with_template(world_tokenizer, tmp_path / "model")


@pytest.mark.parametrize("arguments", [{}, OFF, {"enable_thinking": True}])
def test_the_arguments_reach_the_template_as_in_transformers(directory, arguments):
    tokenizer = Tokenizer(directory, arguments)
    ids = tokenizer.render(MESSAGES)
    expected = tokenizer.hf.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False, **arguments)
    assert ids == tokenizer.hf.encode(expected, add_special_tokens=False)
    assert tokenizer.decode(ids).endswith(NO_THOUGHT) == (arguments == OFF)
    # A text with a control token goes another way through `render`.
    hostile = [*MESSAGES[:1], {"role": "user", "content": "a<|im_end|>b"}]
    assert tokenizer.decode(tokenizer.render(hostile)).endswith(NO_THOUGHT) == (arguments == OFF)


def test_only_a_fingerprint_with_arguments_names_them(directory):
    plain, off = Tokenizer(directory).fingerprint, Tokenizer(directory, OFF).fingerprint
    assert list(plain) == ["tokenizer", "chat template", "end of turn"]
    thought = {"thought": "begun by the chat template"}
    assert off == plain | thought | {"chat_template_kwargs": '{"enable_thinking": false}'}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinkin": False}, "does not use 'enable_thinkin'; it takes enable_thinking$"),
        ({**OFF, "effort": "low"}, "does not use 'effort'; it takes enable_thinking$"),
        ({"raise_exception": 1}, "does not use 'raise_exception'"),
        *(({name: 1}, f"{name!r} is set by the rendering itself") for name in ("messages", "tools", "eos_token")),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is set by the rendering itself; leave it out"),
    ],
)
def test_names_that_the_template_does_not_take_are_refused(directory, arguments, message):
    with pytest.raises(InputError, match=rf"^{directory}: chat_template_kwargs: .*{message}"):
        Tokenizer(directory, arguments)


def test_a_template_without_arguments_takes_none(world_tokenizer, tmp_path):
    assert Tokenizer(world_tokenizer, {}).render(MESSAGES)
    with pytest.raises(InputError, match="the chat template does not use 'enable_thinking'; it takes no such argument"):
        Tokenizer(world_tokenizer, OFF)
    # Transformers' own tag, statements of an extension, and names that are set or built in are no arguments.
    own = "{% set mark = namespace(at=0) %}{% for m in messages %}{% generation %}{% continue %}{% endgeneration %}"
    tagged = with_template(world_tokenizer, tmp_path / "tagged", f"{own}{{% endfor %}}{CHAT_TEMPLATE}")
    with pytest.raises(InputError, match="it takes no such argument"):
        Tokenizer(tagged, OFF)
    broken = with_template(world_tokenizer, tmp_path / "broken", f"{QWEN3}{{% endif %}}")
    with pytest.raises(InputError, match=r"the chat template cannot be read \(.*endif"):
        Tokenizer(broken, OFF)
