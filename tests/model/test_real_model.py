"""Real models against Transformers, in float32: the rendered chat, the logits, 64 greedy tokens.

RMR1_REAL_MODEL=DIR[:DIR...] python -m pytest tests/model/test_real_model.py

Each stage holds the weights once and frees them before the next. The 0.5B takes 5.3 GB, of which 1.3 are pages of the
file that Transformers maps.

Rounding grows with the model: over 647 tokens of the 1.5B, whose hidden state holds numbers of 4,400, Transformers'
own float32 is up to 1.9e-4 from float64 arithmetic, and ours 1.6e-4. So where the two differ by more than 1e-4,
float64 decides: ours must be as close to it as theirs.
"""

import gc
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from numpy_qwen import float64_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rmr1_jax.distributed.mesh import single_device_mesh
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.policy import load
from rmr1_jax.prompts.prompt import get_prompt

MODELS = [Path(name) for name in os.environ.get("RMR1_REAL_MODEL", "").split(":") if name]
NEW = 64
# RewardBench, row 2625 (llmbar-natural).
ROW = (
    "Infer the implied meaning of the following sentence: She is not what she used to be.",
    "She has changed substantially over time.",
    "She is not as she once was.",
)


@pytest.mark.slow
@pytest.mark.skipif(not MODELS, reason="RMR1_REAL_MODEL names no directory of a real model")
@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
def test_a_real_model_is_that_of_transformers(directory):
    messages = render_pair(get_prompt("cor"), PreferencePair.from_answers("2625", *ROW))
    tokenizer = load(directory, "float32", single_device_mesh()).tokenizer
    chat = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer.render(messages)
    assert tokenizer.hf.decode(ids) == chat and 300 < len(ids) < 1500
    greedy = ours_greedy(directory, ids)
    logits, theirs = ours_logits(directory, ids + greedy), their_logits(directory, ids + greedy)
    difference, largest = np.abs(logits - theirs).max(), np.abs(theirs).max()
    print(f"{directory.name}: {len(ids)} + {len(greedy)} tokens, logits of up to {largest:.1f} within {difference:.1e}")
    assert largest > 10
    if difference > 1e-4:
        exact = float64_logits(directory, ids + greedy)
        errors = {"ours": logits - exact, "theirs": theirs - exact}
        worst = {name: np.abs(error).max() for name, error in errors.items()}
        mean = {name: np.sqrt((error**2).mean()) for name, error in errors.items()}
        print(f"from float64: at most {worst}, root mean square {mean}")
        assert worst["ours"] <= max(1e-4, 1.25 * worst["theirs"]) and mean["ours"] <= 1.1 * mean["theirs"]
    # Transformers' choice after each prefix of our text: all equal means the same greedy text.
    assert theirs[len(ids) - 1 : -1].argmax(-1).tolist() == greedy


def ours_greedy(directory: Path, ids: list[int]) -> list[int]:
    policy = load(directory, "float32", single_device_mesh())
    # No stops: each of the 64 tokens is compared, also those behind an early end.
    [[completion]] = policy.sample([ids], max_new_tokens=NEW, temperature=0.0, stop_token_ids=())
    assert len(completion.token_ids) == NEW
    return completion.token_ids


def ours_logits(directory: Path, ids: list[int]) -> np.ndarray:
    gc.collect()
    logits = np.array(load(directory, "float32", single_device_mesh()).logits(np.array([ids]))[0])
    jax.clear_caches()
    gc.collect()
    return logits


def their_logits(directory: Path, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model(torch.tensor([ids])).logits[0].numpy()


def test_the_arbiter_is_right(tmp_path):
    """`float64_logits` against Transformers in float64, which still rounds its norms and softmax to float32."""
    config = Qwen2Config(
        **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).double()
    torch.nn.init.normal_(model.lm_head.weight, std=3.0)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and the scales of the norms
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 97, 50).tolist()
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(theirs).max() > 10
    np.testing.assert_allclose(float64_logits(tmp_path, ids), theirs, rtol=0, atol=1e-5)
