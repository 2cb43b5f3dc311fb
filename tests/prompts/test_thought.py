"""A trace continues the thought that its prompt begins: one thought, which ends."""

import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.prompts.thought import after_thinking, continue_thought, opened_thought
from rmr1_jax.prompts.verdict import strict_verdict

VERDICT = "<answer>[[A]]</answer>"
PLAIN, OPEN, TIGHT, EMPTY = (
    "assistant\n",
    "assistant\n<think>\n",
    "assistant<think>",
    "assistant\n<think>\n\n</think>\n\n",
)
THOUGHT = f"<think>\nhm\n</think>\n\n{VERDICT}"


@pytest.mark.parametrize(
    ("prompt", "trace", "written"),
    [
        (PLAIN, THOUGHT, THOUGHT),
        (PLAIN, VERDICT, VERDICT),
        (OPEN, THOUGHT, f"hm\n</think>\n\n{VERDICT}"),
        (OPEN, f"<think>hm</think>{VERDICT}", f"hm</think>{VERDICT}"),
        (OPEN, f"\n <think>\n\nhm</think>{VERDICT}", f"\nhm</think>{VERDICT}"),
        (OPEN, f"hm</think>{VERDICT}", f"hm</think>{VERDICT}"),  # it continues the prompt's thought already
        (TIGHT, THOUGHT, f"\nhm\n</think>\n\n{VERDICT}"),
        (OPEN, VERDICT, f"\n</think>\n\n{VERDICT}"),
        (TIGHT, VERDICT, f"\n\n</think>\n\n{VERDICT}"),
        (EMPTY, VERDICT, VERDICT),
        (EMPTY, f"<think>\n\n</think>\n\n{VERDICT}", VERDICT),
        (EMPTY, f"They wrote <think>. {VERDICT}", f"They wrote <think>. {VERDICT}"),
    ],
)
def test_what_the_model_writes_after_a_prompt(prompt, trace, written):
    assert continue_thought(prompt, trace) == written
    whole = opened_thought(prompt) + written
    if prompt in (OPEN, TIGHT):
        assert whole.count("<think>") == whole.count("</think>") == 1
    assert strict_verdict(whole) == "A"


@pytest.mark.parametrize("prompt", [PLAIN, OPEN, TIGHT, EMPTY])
@pytest.mark.parametrize("trace", [f"<think>hm {VERDICT}", f"<think>hm</think>\n<think>again {VERDICT}"])
def test_a_thought_that_never_ends_is_refused(prompt, trace):
    with pytest.raises(InputError, match="thought in its trace never ends"):
        continue_thought(prompt, trace)


@pytest.mark.parametrize("trace", [THOUGHT, f"hm</think>{VERDICT}", f"<think></think>hm</think>{VERDICT}"])
def test_a_thought_after_an_empty_one_is_refused(trace):
    with pytest.raises(InputError, match="ends each prompt with an empty thought"):
        continue_thought(EMPTY, trace)


def test_where_the_judgement_begins():
    for text, judgement in (
        ("a", "a"),
        ("<think>a", ""),
        ("<think>a</think>b", "b"),
        ("a</think>b</think>c", "c"),
        ("<think>a</think>\n<think>b", ""),
        ('it says "<think>". a', 'it says "<think>". a'),
    ):
        assert text[after_thinking(text) :] == judgement
