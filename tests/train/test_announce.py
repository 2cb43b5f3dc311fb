"""The header of a run."""

import jax
from training import small_examples, small_grpo, small_prompts, small_sft

from rmr1_jax.train.announce import header


def test_the_header_says_what_is_trained_where_and_on_what(tiny_policy):
    size = sum(x.size for x in jax.tree.leaves(tiny_policy.params))
    examples, prompts = small_examples(tiny_policy), small_prompts(tiny_policy)
    mean = sum(map(len, examples)) / 12
    assert header(small_sft(out="runs/a"), tiny_policy, examples, 1200).splitlines() == [
        f"sft: qwen2, {size:,} parameters, 1 layer, products in float32; 1 x cpu, mesh replica 1 x fsdp 1 x tensor 1",
        f"sft: 12 examples of {mean:.0f} tokens on average; 1,200 steps of 2 packed rows of 256 tokens, 2 at once",
        "sft: out runs/a",
    ]
    mean = sum(len(prompt.tokens) for prompt in prompts) / 10
    assert header(small_grpo(out="runs/b", mini_batch_prompts=2), tiny_policy, prompts, 3).splitlines()[1:] == [
        f"grpo: 10 prompts of {mean:.0f} tokens on average; 3 steps of 4 prompts with 4 texts of at most 12 tokens, "
        "and 2 updates; packed rows of 128 tokens, 16 at once",
        "grpo: out runs/b",
    ]
