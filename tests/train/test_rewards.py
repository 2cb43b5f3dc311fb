"""The rewards by name, of a whole batch, several with weights, and those that abstain."""

import numpy as np
import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.train.functions import differences, record_of
from rmr1_jax.train.losses import group_advantages
from rmr1_jax.train.rewards import make_reward, rewards_of, weighted
from rmr1_jax.train.rollout import RlPrompt

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


TEXTS, PROMPTS = ["a", "bb", "ccc"], [PROMPT] * 3


def length(text, prompt):
    return len(text)


def lengths(texts, prompts):
    assert len(texts) == len(prompts) == 3
    return [len(text) for text in texts]


def only_long(text, prompt):
    return 10.0 if len(text) > 1 else None


def test_a_function_of_all_texts_is_called_once():
    np.testing.assert_array_equal(rewards_of(lengths, TEXTS, PROMPTS), [1, 2, 3])
    np.testing.assert_array_equal(rewards_of(length, TEXTS, PROMPTS), [1, 2, 3])
    np.testing.assert_array_equal(rewards_of(lambda texts, prompts: np.arange(3.0), TEXTS, PROMPTS), [0, 1, 2])
    np.testing.assert_array_equal(rewards_of(only_long, TEXTS, PROMPTS), [np.nan, 10, 10])


def test_several_rewards_are_summed_with_their_weights():
    both = weighted(lengths, only_long, weights=(2.0, 0.5))
    np.testing.assert_array_equal(rewards_of(both, TEXTS, PROMPTS), [2, 4 + 5, 6 + 5])
    only = weighted(only_long, weights=[3])
    np.testing.assert_array_equal(rewards_of(only, TEXTS, PROMPTS), [np.nan, 30, 30])
    with pytest.raises(InputError, match="2 rewards have 1 weights"):
        weighted(length, lengths, weights=(1.0,))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda texts, prompts: [1.0], r"returned \[1.0\] for 3 texts"),
        (lambda texts, prompts: 1.0, r"returned 1.0 for 3 texts"),
        (lambda texts, prompts: [1.0, "x", None], "a reward is 'x'"),
        (lambda text, prompt: [1.0], r"a reward is \[1.0\]; .* reward\(texts, prompts\) to get all texts"),
        (lambda text, prompt: float("nan"), "a reward is nan"),
    ],
)
def test_what_is_no_reward_is_refused(reward, message):
    with pytest.raises(InputError, match=message):
        rewards_of(reward, TEXTS, PROMPTS)


def test_a_text_without_a_reward_has_no_advantage_and_counts_in_no_mean():
    rewards = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan], [np.nan, 2.0, np.nan]])
    ours = group_advantages(rewards)
    np.testing.assert_array_equal(ours[0, [0, 2]], group_advantages(np.array([[1.0, 3.0]]))[0])
    assert ours[0, 1] == 0 and (ours[1] == 0).all()
    assert ours[2, 1] == group_advantages(np.array([[2.0]]))[0, 0]


def test_the_record_of_a_sum_holds_its_parts():
    first = record_of(weighted(length, only_long, weights=(1.0, 2.0)))
    assert not differences("reward", first, record_of(weighted(length, only_long, weights=(1.0, 2.0))))
    assert differences("reward", first, record_of(weighted(length, only_long, weights=(1.0, 3.0))))
    assert differences("reward", first, record_of(weighted(length, lengths, weights=(1.0, 2.0))))
