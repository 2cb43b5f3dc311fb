"""`rmr1 data show`: print rows as the model sees them, token by token, with the trained tokens marked.

Next: `examples.py` and `store.py`, which the examples come from.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmr1_jax.data.examples import Example, load_tokenizer, make_example, read_training_rows
from rmr1_jax.data.store import PreparedExamples, is_prepared
from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import locate
from rmr1_jax.model.tokenizer import Tokenizer
from rmr1_jax.prompts.prompt import get_prompt

# Colours by (trained, the token's number is odd): neighbouring tokens differ in colour.
_COLOURS = {(False, 0): "\x1b[2m", (False, 1): "\x1b[90m", (True, 0): "\x1b[30;42m", (True, 1): "\x1b[30;102m"}
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def show(
    path: str | Path,
    *,
    model: str | None = None,
    prompt: str | None = None,
    count: int = 3,
    colour: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yield a text for each of the first `count` rows of a prepared set, of rendered rows, or of pairs.

    Args:
        model: whose tokenizer is used, with chat_template_kwargs; a prepared set names its own. prompt: renders pairs.
            colour: mark trained tokens by terminal colours; otherwise by brackets ⟦ ⟧ around each.

    Raises:
        InputError: bad input, a set that was prepared with another tokenizer, or no model where one is needed.
    """
    if count < 1:
        raise InputError(f"-n {count}: expected at least 1 row")
    examples = PreparedExamples(path) if is_prepared(path) else None
    name = model or (examples and examples.manifest["config"]["model"])
    if name is None:
        raise InputError(f"{path}: tokens depend on a model; give --model, a directory or hub id")
    if chat_template_kwargs is None and examples:
        chat_template_kwargs = examples.manifest["config"].get("chat_template_kwargs")
    tokenizer = load_tokenizer(name, chat_template_kwargs)
    if examples:
        examples.check_tokenizer(tokenizer)
    else:
        rows = read_training_rows([locate(path)], None if prompt is None else get_prompt(prompt))
        examples = (make_example(tokenizer, row, "sft" if row.trace else None) for row in rows)
    for example in itertools.islice(examples, count):
        yield show_example(example, tokenizer, colour=colour)


def show_example(example: Example, tokenizer: Tokenizer, *, colour: bool = False) -> str:
    """Format an example: a line of facts, then its text with the trained tokens marked."""
    trained = int(example.trained.sum())
    facts = f"{len(example)} tokens: {len(example) - trained} of the prompt, {trained} trained"
    facts += f"; source {example.source}" if example.source else ""
    facts += f"; better {example.better}" if example.better else ""
    shown = []
    for number, (text, is_trained) in enumerate(pieces(example, tokenizer)):
        if colour:
            shown.append(f"{_COLOURS[is_trained, number % 2]}{text}\x1b[0m")
        else:
            shown.append(f"\u27e6{text}\u27e7" if is_trained else text)
    return f"{visible(f'{example.id}  ({facts})')}\n{''.join(shown)}\n"


def pieces(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield each token's text, control tokens included, and whether it is trained. Joined, the texts are the whole row.
    A token that ends within a character is joined with the next ones up to the character's end."""
    waiting: list[int] = []
    for end, (token, trained) in enumerate(zip(example.tokens.tolist(), example.trained.tolist(), strict=True), 1):
        waiting.append(token)
        text = tokenizer.hf.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(waiting) < 4 and end < len(example):  # a character has at most four bytes
            continue
        yield visible(text), trained
        waiting = []


def visible(text: str) -> str:
    """Escape control characters and invisible characters, because rows are untrusted."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
