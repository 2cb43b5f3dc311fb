"""Makes a small random Qwen2 with a tokenizer trained on published rows: a Hugging Face directory to try commands on.

python scripts/make_small_model.py --rows rows.jsonl --out runs/small/start
"""

from pathlib import Path

import tyro

from rmr1_jax.model.config import QwenConfig
from rmr1_jax.pairs.training_sets import read_published
from rmr1_jax.policy import fresh_policy
from rmr1_jax.quickstart.tokenizer import train_tokenizer


def main(
    rows: tuple[Path, ...],
    out: Path,
    vocab: int = 4096,
    width: int = 128,
    layers: int = 2,
    positions: int = 8192,
    seed: int = 0,
) -> None:
    """Train a tokenizer on published rows and write it with random weights as a Hugging Face directory.

    Args:
        rows: Published training rows to train the tokenizer on.
        out: Directory to write.
        vocab: Size of the vocabulary.
        width: Size of the residual stream; the MLP is three times as wide.
        layers: Number of layers.
        positions: Longest sequence in tokens.
        seed: Seed of the weights.
    """
    published = [row for path in rows for row in read_published(path)]
    texts = [text for row in published for text in (*(m["content"] for m in row.messages), row.winner)]
    tokenizer = train_tokenizer(texts, out / "tokenizer", vocab_size=vocab)
    config = QwenConfig(
        model_type="qwen2",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        qkv_bias=True,
        qk_norm=False,
        max_position_embeddings=positions,
    )
    fresh_policy(config, tokenizer, seed=seed).save(out)


if __name__ == "__main__":
    tyro.cli(main)
