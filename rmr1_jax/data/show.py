"""`rmr1 data show`: rows as the model will see them, token by token, and which of them are trained.

Next: `data/store.py`, where the examples come from.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from rmr1_jax.data.examples import Example, make_example
from rmr1_jax.data.store import PreparedExamples, is_prepared, read_manifest, refuse_other_tokenizer
from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import locate
from rmr1_jax.model.tokenizer import TOKENIZER_FILES, Tokenizer
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.pairs.rows import Row, read_rows
from rmr1_jax.pairs.training_sets import read_published
from rmr1_jax.prompts.cor import get_prompt

# Colours by (trained, number of the token is odd): neighbours differ, so that the cuts between tokens show.
_COLOURS = {(False, 0): "\x1b[2m", (False, 1): "\x1b[90m", (True, 0): "\x1b[30;42m", (True, 1): "\x1b[30;102m"}


_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def show(
    path: str | Path, *, model: str | None = None, prompt: str | None = None, count: int = 3, colour: bool = False
) -> Iterator[str]:
    """A text for each of the first `count` rows of a prepared set, of rendered rows, or of pairs.

    Args:
        model: whose tokenizer; a prepared set knows its own. prompt: renders pairs. colour: mark trained tokens by
            terminal colours, else by brackets ⟦ ⟧ around each.

    Raises:
        InputError: bad input, a prepared set of another tokenizer, or no model given where one is needed.
    """
    if count < 1:
        raise InputError(f"-n {count}: expected at least 1 row")
    prepared = is_prepared(path)
    name = model or (read_manifest(path)["config"]["model"] if prepared else None)
    if name is None:
        raise InputError(f"{path}: tokens are a model's; give --model, a directory or hub id")
    tokenizer = Tokenizer(locate(name, kind="model", patterns=TOKENIZER_FILES))
    if prepared:
        examples = PreparedExamples(path)
        refuse_other_tokenizer(examples, tokenizer)
    else:
        examples = _made(locate(path), tokenizer, prompt)
    for example in itertools.islice(examples, count):
        yield show_example(example, tokenizer, colour=colour)


def show_example(example: Example, tokenizer: Tokenizer, *, colour: bool = False) -> str:
    """A line of facts, and the example's text with its trained tokens marked."""
    trained = int(example.trained.sum())
    facts = [f"{len(example)} tokens: {len(example) - trained} of the prompt, {trained} trained"]
    facts += [f"source {example.source}"] if example.source else []
    facts += [f"better {example.better}"] if example.better else []
    head = f"{example.id}  ({'; '.join(facts)})"
    shown = []
    for number, (text, is_trained) in enumerate(pieces(example, tokenizer)):
        if colour:
            shown.append(f"{_COLOURS[is_trained, number % 2]}{text}\x1b[0m")
        else:
            shown.append(f"\u27e6{text}\u27e7" if is_trained else text)
    return f"{visible(head)}\n{''.join(shown)}\n"


def pieces(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Each token's text, control tokens included, and whether it is trained; joined, the texts are the whole row.

    Tokens that end within a character go together with the next ones, up to its end.
    """
    waiting: list[int] = []
    for token, trained in zip(example.tokens.tolist(), example.trained.tolist(), strict=True):
        waiting.append(token)
        text = tokenizer.hf.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(waiting) < 4:  # a character has four bytes at most
            continue
        yield visible(text), trained
        waiting = []
    if waiting:
        yield visible(tokenizer.hf.decode(waiting, skip_special_tokens=False)), trained


def visible(text: str) -> str:
    """The text with what a terminal would obey or hide written out: rows are not trusted."""
    return _UNSEEN.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", text
    )


def _made(path: Path, tokenizer: Tokenizer, prompt: str | None) -> Iterator[Example]:
    first = next((row for row in read_rows(path) if isinstance(row, Row)), None)
    if first is not None and "context_messages" in first.value:
        for row in read_published(path):
            yield make_example(tokenizer, row, None if row.trace is None else "sft")
        return
    if prompt is None:
        raise InputError(f"{path}: pairs are shown as a prompt renders them; give --prompt (cor, reasoning, a file)")
    template = get_prompt(prompt)
    for pair in read_pairs(path):
        yield make_example(tokenizer, pair, None, prompt=template)
