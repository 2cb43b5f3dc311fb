"""The tokenizer: chat messages to token ids and back, and the files beside the weights.

Two promises. Text from users never becomes a special token: an answer that contains `<|im_end|>` is encoded as those
ten characters. And a trained trace survives rendering: its ids are appended to the rendered prompt, not passed through
a chat template, because some templates cut what stands before `</think>`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from rmr1_jax.errors import InputError
from rmr1_jax.files.untrusted import own_file, read_object

CONTROL_TOKEN = re.compile(r"<[|\uff5c].+[|\uff5c]>")  # <|im_start|>, and the same with full-width bars
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
TOKENIZER_FILES = (*VOCABULARY_FILES, "*config.json", "added_tokens.json", "special_tokens_map.json", "*.jinja")
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Tokenizer:
    """A Hugging Face tokenizer with a chat template, and the ids that end a turn.

    Args:
        directory: holds `tokenizer.json` (or a slow tokenizer's files) and `tokenizer_config.json`; stop ids come from
            `generation_config.json` where there is one, else from the tokenizer's own end of sequence.

    Raises:
        InputError: no tokenizer there, no chat template, or no stop id.
    """

    def __init__(self, directory: str | Path):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # take seconds to import

        self.directory = Path(directory)
        # Where tokenizer.json lies there it is the truth. AutoTokenizer would look at config.json beside it and rebuild
        # the splitting rules of that model family: other ids from the same file.
        reader = PreTrainedTokenizerFast if (self.directory / "tokenizer.json").is_file() else AutoTokenizer
        for file in self.directory.glob("*"):
            if any(file.match(name) for name in TOKENIZER_FILES):
                own_file(file)
        try:
            self.hf = reader.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        except BaseException as e:  # of a broken file the libraries raise anything; a panic in Rust is no Exception
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise InputError(f"{directory}: no tokenizer could be read ({e}); expected tokenizer.json beside it") from e
        if not self.hf.chat_template or not isinstance(self.hf.chat_template, str | dict):
            raise InputError(
                f"{directory}: the tokenizer has no chat template; add chat_template.jinja from the model's own page"
            )
        self.hf.model_max_length = 10**30  # our own limit is the model's; theirs only warns, and may be of any type
        self.stop_ids = self._read_stop_ids()
        self.specials = self._flag_control_tokens()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens in it are plain text too."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=self._has_special(text))

    def decode(self, ids: Iterable[Any]) -> str:
        """Text without special tokens. Ids beyond the tokenizer (a padded vocabulary) decode to nothing."""
        limit = len(self.hf)
        return self.hf.decode([i for i in ids if 0 <= i < limit], skip_special_tokens=True)

    def render(self, messages: Sequence[Mapping[str, str]], answered: bool = False) -> list[int]:
        """Messages (role, content) -> the ids of a prompt that ends where the assistant begins; `answered`: of a
        conversation that ends with the assistant's turn, as a reward model scores it.

        Raises:
            InputError: the template refuses the messages (a system turn it does not know, say).
        """
        if not any(self._has_special(m["content"]) for m in messages):
            text = self._template(messages, answered)
            for m in messages:
                # What an earlier assistant turn thought may be cut; what was asked may not.
                if m["role"] != "assistant" and m["content"].strip() not in text:
                    raise InputError(f"{self.directory}: the chat template drops a {m['role']} turn")
            return self.hf.encode(text, add_special_tokens=False)
        # Give the template placeholders, and put the texts back piece by piece as plain text.
        placeholders = [f"\ue000{i}\ue001" for i in range(len(messages))]
        text = self._template([{**m, "content": s} for m, s in zip(messages, placeholders, strict=True)], answered)
        ids: list[int] = []
        for message, placeholder in zip(messages, placeholders, strict=True):
            before, found, text = text.partition(placeholder)
            if not found:
                raise InputError(f"{self.directory}: the chat template drops a {message['role']} turn")
            ids += self.hf.encode(before, add_special_tokens=False) + self.encode(message["content"])
        return ids + self.hf.encode(text, add_special_tokens=False)

    @functools.cached_property
    def fingerprint(self) -> dict[str, str]:
        """Digests of all that decides the ids of a row, by name; rows made under another fingerprint may differ."""
        files = [self.directory / name for name in VOCABULARY_FILES]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file()))
        added = {id: (token.content, token.special) for id, token in self.hf.added_tokens_decoder.items()}
        digest.update(repr(sorted(added.items())).encode())
        template = hashlib.sha256(repr(self.hf.chat_template).encode())
        found = {"tokenizer": digest.hexdigest(), "chat template": template.hexdigest()}
        return {name: value[:16] for name, value in found.items()} | {"end of turn": str(self.stop_ids[0])}

    def _template(self, messages: Sequence[Mapping[str, str]], answered: bool) -> str:
        try:
            return self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=not answered)
        except Exception as e:  # a template is a program of whoever made the model, and may fail in any way
            roles = [m["role"] for m in messages]
            raise InputError(f"{self.directory}: the chat template refuses turns {roles}: {e}") from e

    def _has_special(self, text: str) -> bool:
        """Whether a control token stands in the text, or in what the tokenizer normalises it to (NFKC, lower case)."""
        normalizer = getattr(getattr(self.hf, "backend_tokenizer", None), "normalizer", None)
        texts = [text] if normalizer is None else [text, normalizer.normalize_str(text)]
        return any(token in each for each in texts for token in self.specials)

    def _flag_control_tokens(self) -> list[str]:
        """All control tokens, by their flag or by their form: DeepSeek's distilled Qwens do not flag role markers."""
        added = [(t.content, t.special) for t in self.hf.added_tokens_decoder.values()]
        unflagged = [text for text, special in added if not special and CONTROL_TOKEN.fullmatch(text)]
        flagged = [AddedToken(text, special=True, normalized=False) for text in unflagged]
        self.hf.add_tokens(flagged, special_tokens=True)
        return unflagged + [text for text, special in added if special]

    def _read_stop_ids(self) -> list[int]:
        ids: list[Any] = []
        path = self.directory / "generation_config.json"
        if path.is_file():
            given = read_object(path).get("eos_token_id")
            ids = given if isinstance(given, list) else [given]
        ids = [i for i in ids if i is not None] or [i for i in [self.hf.eos_token_id] if i is not None]
        if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise InputError(f"{self.directory}: no end of turn is named; set eos_token_id in generation_config.json")
        # The turn's own end first: it is the one that SFT trains.
        return sorted(ids, key=lambda i: i != self.hf.eos_token_id)


def completion_text(tokenizer: Any, prompt: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of a completion `token_ids` of `prompt`, with the `<think>` that the chat template opens for it."""
    text = tokenizer.decode(token_ids)
    # A thought that the chat template opens belongs to the text: one that never ends must not pass for a judgement.
    opened = tokenizer.decode(prompt[-16:]).rstrip().endswith("<think>")
    return f"<think>\n{text}" if opened else text


def copy_side_files(source: str | Path, target: str | Path) -> list[str]:
    """Copies the tokenizer's files, the chat template and the generation config; returns the names that were there."""
    source, target = Path(source), Path(target)
    names = [name for name in SIDE_FILES if (source / name).is_file()]
    for name in names:
        own_file(source / name)  # a link to a private file must not go where an export goes
    if source.resolve() == target.resolve():
        return names
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=target) as temporary:
        for name in names:
            shutil.copyfile(source / name, Path(temporary) / name)
            os.replace(Path(temporary) / name, target / name)
    return names
