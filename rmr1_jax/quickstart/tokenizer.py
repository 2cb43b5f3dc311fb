"""A tokenizer trained on the spot: byte-level BPE with a ChatML template, saved as a Hugging Face directory.

A policy of a million parameters needs short traces, and every word in one form wherever it stands. So digits are split,
words carry their leading space, and the tags of a trace and the delimiters of the prompt, with the line breaks around
them, are single tokens. Those tokens are *added* but not *special*: decoding keeps them, and `decode(encode(text)) ==
text` holds for any text. Read next: `world.py` (the texts), `rmr1_jax/model/tokenizer.py` (chat rendering).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rmr1_jax.prompts.prompt import QUESTION, RESPONSES

END, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", END)
DELIMITERS = (QUESTION, *RESPONSES[:2], f"\n\n{RESPONSES[2]}", RESPONSES[3])
TAGS = (
    *("<type>", "</type>\n", "<solution>", "</solution>\n", "<rubric>", "</rubric>\n", "<justify>", "</justify>"),
    *("<eval>", "</eval>\n", "<answer>[[", "]]</answer>"),
    *(f"<{slash}{part}_{side}>" for part in ("quote", "summary") for side in "AB" for slash in ("", "/")),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROLES = ("system\n", "user\n", "assistant\n")
# A word with the space before it and the line break after it ("user\n" is one token); one digit; one sign; white space.
PIECES = r" ?\p{L}+\n?| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"


def train_tokenizer(texts: Iterable[str], out_dir: str | Path, *, vocab_size: int = 640) -> Path:
    """Train a byte-level BPE on `texts` and save it as `tokenizer.json` and `tokenizer_config.json`.

    The result depends on the texts alone and loads with `transformers.AutoTokenizer`: end of turn `<|im_end|>`, padding
    `<|endoftext|>`, a ChatML template.

    Args:
      vocab_size: upper bound; training stops earlier when every piece of the texts is one token.

    Returns:
      `out_dir`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(text, special=False, normalized=False) for text in DELIMITERS + TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Encoding splits at the added tokens first, so the trainer gets only the text between them.
    pieces = (piece for text in (*ROLES, *ROLES, *texts) for piece in _between_added_tokens(text))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_tokens(added)

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def _between_added_tokens(text: str) -> list[str]:
    for token in sorted(SPECIAL + DELIMITERS + TAGS, key=len, reverse=True):
        text = text.replace(token, "\0")
    return [piece for piece in text.split("\0") if piece]
