"""The tokenizer: chat messages to token ids and back, and the files beside the weights.

Two promises. Text from users never becomes a special token: an answer that contains `<|im_end|>` is encoded as those
ten characters. And a trained trace survives rendering: its ids are appended to the rendered prompt, not passed through
a chat template, because some templates cut what stands before `</think>`.

Some models have tags of their traces, such as `<answer>`, among their special tokens. Such a tag is one token where the
model writes it and where the system turn speaks of it, stays in decoded text, and is plain text in all other turns, so
that an answer cannot show the judge the token of a verdict.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken

from rmr1_jax.errors import InputError
from rmr1_jax.files.untrusted import own_file, read_object
from rmr1_jax.files.write import write_whole
from rmr1_jax.model.template import check_template_arguments
from rmr1_jax.prompts.prompt import PROMPT_FILE
from rmr1_jax.prompts.thought import opened_thought

ANSWER = "\ue000\ue001"  # a text that no chat template contains
THOUGHT = "thought"  # the entry of a fingerprint that matters to traces only
TEMPLATE_ARGUMENTS = "chat_template_kwargs"  # in a fingerprint, only where there are any
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
    PROMPT_FILE,
)


class Tokenizer:
    """A Hugging Face tokenizer with a chat template, and the ids that end a turn.

    Args:
        directory: holds `tokenizer.json` (or a slow tokenizer's files) and `tokenizer_config.json`.
        chat_template_kwargs: arguments of the chat template beside the messages, for everything that is rendered.

    Attributes:
        stop_ids: first the id that ends a turn in training, which is the one that the chat template writes after an
            answer; then those of `generation_config.json` and the tokenizer's end of sequence.
        specials: all special tokens. tags: those of them that belong to the model's text, as `<answer>` does.

    Raises:
        InputError: no tokenizer there, no chat template, no stop id, or arguments that the template does not take.
    """

    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, directory: str | Path, chat_template_kwargs: Mapping[str, Any] | None = None):
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
        if chat_template_kwargs:
            check_template_arguments(chat_template_kwargs, self.hf, self.directory)
            self.chat_template_kwargs = dict(chat_template_kwargs)
        self.hf.model_max_length = 10**30  # our own limit is the model's; theirs only warns, and may be of any type
        self.specials = self._flag_control_tokens()
        self.stop_ids = self._read_stop_ids()
        self.tags = self._find_tags()
        self.controls = [text for text in self.specials if text not in self.tags]
        self._control_ids = frozenset(self.hf.convert_tokens_to_ids(self.controls))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens in it are plain text too."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=self._has(self.specials, text))

    def encode_trace(self, text: str) -> list[int]:
        """Ids of text as the model writes it: its tags are its own tokens, control tokens in it are plain text."""
        if not self.tags or not self._has(self.controls, text):
            return self.hf.encode(text, add_special_tokens=False, split_special_tokens=self._has(self.controls, text))
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, sorted(self.controls, key=len, reverse=True)))})", text):
            plain = self._has(self.controls, piece)
            ids += self.hf.encode(piece, add_special_tokens=False, split_special_tokens=plain)
        return ids

    def decode(self, ids: Iterable[Any]) -> str:
        """Text without control tokens. Ids beyond the tokenizer (a padded vocabulary) decode to nothing."""
        limit = len(self.hf)
        return self.hf.decode([i for i in ids if 0 <= i < limit and i not in self._control_ids])

    def render(self, messages: Sequence[Mapping[str, str]], answered: bool = False) -> list[int]:
        """Messages (role, content) -> the ids of a prompt that ends where the assistant begins; `answered`: of a
        conversation that ends with the assistant's turn, as a reward model scores it.

        Raises:
            InputError: the template refuses the messages (a system turn it does not know, say).
        """
        # The system turn is the judge's own, and may speak of the model's tags.
        plain = {m["role"]: self.controls if m["role"] == "system" else self.specials for m in messages}
        if not any(self._has(plain[m["role"]], m["content"]) for m in messages):
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
            encode = self.encode_trace if message["role"] == "system" else self.encode
            ids += self.hf.encode(before, add_special_tokens=False) + encode(message["content"])
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
        found = {name: value[:16] for name, value in found.items()} | {"end of turn": str(self.stop_ids[0])}
        # Entries for a few models only: the sets of all others stay valid.
        if self.tags:
            found["special tags"] = ", ".join(self.tags)
        if "<think>" in self._after("user"):
            found[THOUGHT] = "begun by the chat template"
        if self.chat_template_kwargs:
            found[TEMPLATE_ARGUMENTS] = json.dumps(dict(self.chat_template_kwargs), sort_keys=True)
        return found

    def _template(self, messages: Sequence[Mapping[str, str]], answered: bool) -> str:
        try:
            options = {"tokenize": False, "add_generation_prompt": not answered, **self.chat_template_kwargs}
            return self.hf.apply_chat_template(list(messages), **options)
        except Exception as e:  # a template is a program of whoever made the model, and may fail in any way
            roles = [m["role"] for m in messages]
            raise InputError(f"{self.directory}: the chat template refuses turns {roles}: {e}") from e

    def _has(self, tokens: Iterable[str], text: str) -> bool:
        """Whether one of the tokens is in the text, or in what the tokenizer normalises it to (NFKC, lower case)."""
        normalizer = getattr(getattr(self.hf, "backend_tokenizer", None), "normalizer", None)
        texts = [text] if normalizer is None else [text, normalizer.normalize_str(text)]
        return any(token in each for each in texts for token in tokens)

    def _flag_control_tokens(self) -> list[str]:
        """All control tokens, by their flag or by their form: DeepSeek's distilled Qwens do not flag role markers."""
        added = [(t.content, t.special) for t in self.hf.added_tokens_decoder.values()]
        unflagged = [text for text, special in added if not special and CONTROL_TOKEN.fullmatch(text)]
        flagged = [AddedToken(text, special=True, normalized=False) for text in unflagged]
        self.hf.add_tokens(flagged, special_tokens=True)
        return unflagged + [text for text, special in added if special]

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files, and the model's prompt if there is one. Where they do not name the id that ends a
        turn, generation_config.json names it: other programs stop at the ids in it."""
        copy_side_files(self.directory, directory)
        if self.stop_ids[0] not in (self._named_stop_ids() or [self.hf.eos_token_id]):
            path = Path(directory) / "generation_config.json"
            content = read_object(path) if path.is_file() else {}
            write_whole(path, json.dumps(content | {"eos_token_id": self.stop_ids}, indent=2) + "\n")

    def _named_stop_ids(self) -> list[Any]:
        path = self.directory / "generation_config.json"
        given = read_object(path).get("eos_token_id") if path.is_file() else None
        return [i for i in (given if isinstance(given, list) else [given]) if i is not None]

    def _read_stop_ids(self) -> list[int]:
        # The turn's own end first, because SFT trains it. A model that was tuned to chat may name only the end of a
        # document in its files, which it never writes after an answer.
        own = self.hf.eos_token_id
        ids = [self._end_of_turn(), *sorted(self._named_stop_ids(), key=lambda i: i != own), own]
        ids = [i for i in ids if i is not None]
        if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise InputError(f"{self.directory}: no end of turn is named; set eos_token_id in generation_config.json")
        return list(dict.fromkeys(ids))

    def _end_of_turn(self) -> int | None:
        """The first special token that the chat template writes after an assistant's answer."""
        specials = set(self.hf.convert_tokens_to_ids(self.specials))
        ids = self.hf.encode(self._after("assistant"), add_special_tokens=False)
        return next((i for i in ids if i in specials), None)

    def _after(self, role: str) -> str:
        """The text after a last turn of this role; "" where the chat template refuses or drops it."""
        answered = role == "assistant"
        turns = [{"role": "user", "content": "1"}] * answered + [{"role": role, "content": ANSWER}]
        try:
            text = self._template(turns, answered)
        except InputError:
            return ""
        return text.rpartition(ANSWER)[2] if ANSWER in text else ""

    def _find_tags(self) -> list[str]:
        """The special tokens that mark no frame of the conversation, neither by their form nor by a role they have."""
        roles = {getattr(self.hf, name) for name in self.hf.SPECIAL_TOKENS_ATTRIBUTES}
        roles |= set(self.hf.convert_ids_to_tokens([i for i in self.stop_ids if i < len(self.hf)]))
        return [text for text in self.specials if text not in roles and not CONTROL_TOKEN.fullmatch(text)]


def prompt_end(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The text of a prompt's last tokens, in which a thought that the chat template begins can be seen."""
    return tokenizer.decode(prompt[-16:])


def completion_text(tokenizer: Any, prompt: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of a completion `token_ids` of `prompt`, with the `<think>` that the chat template opens for it."""
    # A thought that the chat template opens belongs to the text: one that never ends must not pass for a judgement.
    opened = opened_thought(prompt_end(tokenizer, prompt))
    return ("<think>\n" if opened else "") + tokenizer.decode(token_ids)


def copy_side_files(source: str | Path, target: str | Path) -> list[str]:
    """Copies the tokenizer's files, the chat template, the generation config and the model's prompt; returns the names
    that were there."""
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
