"""The rewards by name."""

import numpy as np
import pytest

from rmr1_jax.train.rollout import RlPrompt, make_reward

PROMPT = RlPrompt("a", np.zeros(1, np.int32), "B")
WHOLE = "<eval>\nB is right.\n</eval>\n\n<answer>[[{}]]</answer>"
BARE = "<answer>[[{}]]</answer>"


@pytest.mark.parametrize(
    ("kind", "text", "worth"),
    [
        ("verdict", WHOLE.format("B"), 1),
        ("verdict", BARE.format("B"), 1),
        ("verdict", BARE.format("A"), -1),
        ("verdict", "", -1),
        ("cold_start", WHOLE.format("B"), 2),
        ("cold_start", WHOLE.format("A"), 1),
        ("cold_start", BARE.format("B"), 1),
        ("cold_start", BARE.format("A"), 0),
        ("cold_start", "", 0),
    ],
)
def test_what_a_text_is_worth(kind, text, worth):
    assert make_reward(kind, "compare")(text, PROMPT) == worth


def test_the_form_is_that_of_the_structure():
    assert make_reward("cold_start", "cor")(WHOLE.format("B"), PROMPT) == 1  # no <type>
    assert make_reward("cold_start", "verdict")(BARE.format("B"), PROMPT) == 2
