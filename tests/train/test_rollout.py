"""Rollouts on the host: which prompts, which advantages, and what lies where in a packed mini-batch."""

from collections import Counter

import numpy as np
import pytest
from chat_models import deepseek_distill

from rmr1_jax.errors import InputError
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.quickstart.world import make_items, oracle_trace
from rmr1_jax.sampler.sample import Sample, SamplingConfig
from rmr1_jax.train.config import GrpoConfig
from rmr1_jax.train.micro_batches import mini_batch
from rmr1_jax.train.rewards import make_reward
from rmr1_jax.train.rollout import Group, RlPrompt, next_prompts, rollout_metrics, score

PROMPTS = [RlPrompt(str(i), np.full(3 + i, 50 + i, np.int32), "AB"[i % 2]) for i in range(5)]


class IdsAsText(Tokenizer):
    """Decodes ids to their numbers."""

    def __init__(self):
        pass

    def decode(self, ids) -> str:
        return "".join(map(str, ids))


def sample(tokens: list[int], reason: str = "stop") -> Sample:
    logp = -np.asarray(tokens, np.float32)
    return Sample(tokens, logp / 2, logp, reason)


def group(prompt: RlPrompt, *responses: tuple[int, float]) -> Group:
    """Responses as (length, advantage); the tokens of response i are 1, 2, ... + 10 i."""
    samples = [sample([10 * i + t + 1 for t in range(n)]) for i, (n, _) in enumerate(responses)]
    advantages = np.asarray([a for _, a in responses], np.float32)
    return Group(prompt, samples, [""] * len(samples), advantages, advantages)


# ---- prompts


def ids(prompts) -> list[str]:
    return [p.id for p in prompts]


def test_prompts_come_in_epochs_of_their_own_order():
    drawn = ids(next_prompts(PROMPTS, 20, 0, seed=1))
    epochs = [drawn[i : i + 5] for i in range(0, 20, 5)]
    assert all(Counter(epoch) == Counter("01234") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert drawn != ids(next_prompts(PROMPTS, 20, 0, seed=2))


def test_the_cursor_is_all_there_is():
    whole = ids(next_prompts(PROMPTS, 23, 0, seed=1))
    for cut in range(24):
        assert ids(next_prompts(PROMPTS, 23 - cut, cut, seed=1)) == whole[cut:]


# ---- rewards


def test_score():
    seen = []

    def reward(text: str, prompt: RlPrompt) -> float:
        seen.append((text, prompt.id))
        return len(text)

    groups = score(
        PROMPTS[:2],
        [[sample([1, 2, 3]), sample([4])], [sample([5, 6]), sample([7, 8])]],
        IdsAsText(),
        reward,
        normalize_std=True,
    )
    assert seen == [("123", "0"), ("4", "0"), ("56", "1"), ("78", "1")]
    assert [g.texts for g in groups] == [["123", "4"], ["56", "78"]]
    np.testing.assert_array_equal([g.rewards for g in groups], [[3, 1], [2, 2]])
    np.testing.assert_allclose([g.advantages for g in groups], [[2**-0.5, -(2**-0.5)], [0, 0]], atol=1e-5)
    assert [g.mixed for g in groups] == [True, False]


def test_a_thought_that_the_template_opens_is_part_of_the_text(world_tokenizer, tmp_path):
    """One that never ends is no complete trace, whatever is in it; where nothing is opened, the text is as decoded."""
    verdict = "<eval>A is right.</eval><answer>[[A]]</answer>"
    written = (verdict, f"x</think>{verdict}", "x")
    expected = {True: [1, 2, 0], False: [2, 2, 0]}
    distill = Tokenizer(deepseek_distill(world_tokenizer, tmp_path / "distill"))
    for opens, tokenizer in ((True, distill), (False, Tokenizer(world_tokenizer))):
        rendered = tokenizer.render([{"role": "user", "content": "Which is it?"}])
        prompt = RlPrompt("p", np.asarray(rendered, np.int32), "A")
        samples = [sample(tokenizer.encode_trace(text)) for text in written]
        reward = make_reward("cold_start", "compare")
        [found] = score([prompt], [samples], tokenizer, reward, normalize_std=False)
        assert found.rewards.tolist() == expected[opens]
        assert found.texts == [("<think>\n" if opens else "") + text for text in written]
        assert rollout_metrics([found], "compare")["valid"] == pytest.approx(1 / 3 if opens else 2 / 3)


def test_a_reward_must_be_finite():
    with pytest.raises(InputError, match=r"a reward is nan; .* must return one finite number"):
        score(PROMPTS[:1], [[sample([1])]], IdsAsText(), lambda text, prompt: float("nan"), normalize_std=True)


# ---- packing

GROUPS = [group(PROMPTS[0], (2, 1.0), (4, -1.0)), group(PROMPTS[1], (3, 0.0), (3, 0.0)), group(PROMPTS[2], (5, 0.5))]
SIZES = {"row_length": 16, "micro_rows": 2, "max_prompt_length": 8, "max_segments": 9, "share_prompts": False}
SAMPLING = SamplingConfig(max_new_tokens=8)


def make(groups=GROUPS, *, skip_unmixed=False, own=None, **options):
    config = GrpoConfig(out="", sampling=SAMPLING, **SIZES | options)
    ((batch, count),), lengths, _ = mini_batch(groups, config, skip_unmixed=skip_unmixed, own=own)
    if own is None:
        assert sum(lengths) == (batch["segment_ids"] > 0).sum()
    places = batch.pop("trained_at", np.zeros(0))
    for row in np.ndindex(places.shape[:-1]):  # of the head: the trained tokens, then nothing
        assert places[row][places[row] < config.row_length].tolist() == batch["weights"][row].nonzero()[0].tolist()
    return batch, count


def test_a_process_assembles_its_own_rows():
    whole, count = make(max_segments=1)
    assert count == 3
    for own in ([0], [1]):
        part, same = make(max_segments=1, own=own)
        assert same == count
        for name, array in whole.items():
            np.testing.assert_array_equal(part[name], array[:, own])


def by_sequence(batch) -> list[dict[str, np.ndarray]]:
    """Each segment's arrays, with its micro-batch."""
    found = []
    for a, b in np.ndindex(batch["tokens"].shape[:2]):
        segments = batch["segment_ids"][a, b]
        for s in range(1, segments.max() + 1):
            found.append({"micro": a} | {k: v[a, b][segments == s] for k, v in batch.items()})
    return found


def test_what_a_mini_batch_holds():
    batch, count = make()
    assert count == 2 and {v.shape for v in batch.values()} == {(2, 2, 16)}
    sequences = sorted(by_sequence(batch), key=lambda s: (s["tokens"][0], s["tokens"][-1]))
    assert len(sequences) == 5
    members = [(g, i) for g in GROUPS for i in range(len(g.samples))]
    for s, (g, i) in zip(sequences, members, strict=True):
        n, drawn = len(g.prompt.tokens), g.samples[i]
        assert s["tokens"].tolist() == [*g.prompt.tokens, *drawn.token_ids]
        assert s["positions"].tolist() == list(range(len(s["tokens"])))
        assert not s["weights"][:n].any() and (s["weights"][n:] > 0).all()
        np.testing.assert_array_equal(s["advantages"], [0] * n + [g.advantages[i]] * len(drawn.token_ids))
        np.testing.assert_array_equal(s["sampler_logp"], [0] * n + drawn.sampled_logprobs.tolist())
    padding = batch["segment_ids"] == 0
    assert not any(v[padding].any() for v in batch.values())


def test_what_a_row_with_shared_prompts_holds():
    """Each prompt without its last token, then each of its responses behind a copy of that token."""
    groups = [group(RlPrompt("one", np.array([7], np.int32), "A"), (2, 1.0)), *GROUPS[::2]]
    batch, count = make(groups, row_length=32, share_prompts=True)
    segments = by_sequence(batch)
    assert count == 1 and {s["micro"] for s in segments} == {0} and not batch["tokens"][0, 1].any()
    names = ("tokens", "positions", "parents", "advantages", "sampler_logp")
    assert [[s[name].tolist() for name in names] for s in segments] == [
        [[50] * 2, [0, 1], [0] * 2, [0] * 2, [0] * 2],
        [[50, 1, 2], [2, 3, 4], [1] * 3, [0, 1, 1], [0, -1, -2]],
        [[50, 11, 12, 13, 14], [2, 3, 4, 5, 6], [1] * 5, [0] + [-1] * 4, [0, -11, -12, -13, -14]],
        [[52] * 4, [0, 1, 2, 3], [0] * 4, [0] * 4, [0] * 4],
        [[52, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [4] * 6, [0] + [0.5] * 5, [0, -1, -2, -3, -4, -5]],
        [[7, 1, 2], [0, 1, 2], [0] * 3, [0, 1, 1], [0, -1, -2]],  # nothing is left of its prompt
    ]
    prompts = (3, 3, 3, 5, 5, 1)
    for s, n in zip(segments, prompts, strict=True):
        np.testing.assert_array_equal(s["weights"] > 0, s["positions"] >= n)
    padding = batch["segment_ids"] == 0
    assert not any(v[padding].any() for v in batch.values())


@pytest.mark.parametrize(
    ("aggregation", "weight"),
    [
        ("sequence", lambda length, tokens_in_micro: 1 / 5 / length),
        ("token", lambda length, tokens_in_micro: 1 / 17),
        ("constant", lambda length, tokens_in_micro: 1 / 5 / 8),
        ("micro_batch", lambda length, tokens_in_micro: 1 / 2 / tokens_in_micro),
    ],
)
def test_the_weights_of_each_aggregation(aggregation, weight):
    batch, _ = make(aggregation=aggregation)
    tokens = Counter()
    for s in by_sequence(batch):
        tokens[s["micro"]] += (s["weights"] > 0).sum()
    for s in by_sequence(batch):
        trained = s["weights"][s["weights"] > 0]
        np.testing.assert_allclose(trained, weight(len(trained), tokens[s["micro"]]), rtol=1e-6)
    if aggregation != "constant":
        assert batch["weights"].sum() == pytest.approx(1)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_skipping_leaves_out_what_has_no_advantage_and_keeps_the_weights_of_the_rest(aggregation):
    whole, _ = make(aggregation=aggregation)
    batch, count = make(aggregation=aggregation, skip_unmixed=True)
    kept = sorted((s["tokens"].tolist(), s["weights"].tolist()) for s in by_sequence(batch))
    wanted = [s for s in by_sequence(whole) if s["advantages"].any()]
    assert kept == sorted((s["tokens"].tolist(), s["weights"].tolist()) for s in wanted) and len(kept) == 3
    assert count == 1


def test_nothing_is_skipped_where_the_average_is_over_the_micro_batch():
    batches = [make(aggregation="micro_batch", skip_unmixed=skip)[0] for skip in (True, False)]
    for name in batches[0]:
        np.testing.assert_array_equal(batches[0][name], batches[1][name])


def test_a_batch_without_any_advantage_is_one_empty_micro_batch():
    batch, count = make(GROUPS[1:2], skip_unmixed=True)
    assert count == 1 and batch["tokens"].shape == (1, 2, 16)
    assert not any(v.any() for v in batch.values())


def test_shapes_are_few():
    """The number of micro-batches is a power of two, whatever it takes."""
    for n, room in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        batch, count = make([group(PROMPTS[0], (12, 1.0))] * 2 * n)
        assert (count, len(batch["tokens"])) == (n, room)


def test_a_row_holds_no_more_than_its_segments():
    batch, _ = make([group(PROMPTS[0], (1, 1.0))] * 7, max_segments=2)
    assert batch["segment_ids"].max() == 2 and len(by_sequence(batch)) == 7


# ---- metrics


def test_metrics_of_made_groups():
    item = next(i for i in make_items(8, split="dev") if i.better == "A")
    trace = oracle_trace(item)
    wrong = trace.replace("[[A]]", "[[B]]")
    texts = [[trace, wrong], ["<answer>[[A]]</answer>", "no verdict"]]
    rewards = np.asarray([[1, -1], [-1, -1]], np.float32)
    prompts = [RlPrompt("a", np.zeros(3, np.int32), "A"), RlPrompt("b", np.zeros(3, np.int32), "B")]
    samples = [[sample([1, 2]), sample([1], "length")], [sample([1, 2, 3]), sample([1, 2])]]
    groups = [Group(*x) for x in zip(prompts, samples, texts, rewards, rewards, strict=True)]
    assert rollout_metrics(groups, "cor") == pytest.approx(
        {
            "reward": -0.5,
            "accuracy": 0.25,
            "valid": 0.5,
            "verdict_a": 2 / 3,  # of the three that name a side
            "response_length": 2.0,
            "truncated": 0.25,
            "mixed_groups": 0.5,
        }
    )
    silent = [Group(prompts[0], samples[0], ["x", "y"], rewards[0], rewards[0])]
    assert rollout_metrics(silent, "cor")["verdict_a"] == 0.5
