"""Checks the words of a command line before they are parsed: an unknown command or option is one line that names the
nearest known one, whatever else is missing. Next: `main.py`."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rmr1_jax.cli.options import ConfigCommand
from rmr1_jax.errors import InputError


def commands_of(union: Any) -> dict[str, type]:
    """Returns the commands of a union of dataclasses by their names on the command line."""
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "-", each.__name__).lower(): each for each in _classes(union)}


def command_of(commands: Mapping[str, type], words: Sequence[str]) -> type | None:
    """Returns the command that the first words name, or None where they name none."""
    command = commands.get(words[0]) if words else None
    below = _below(command)
    return command_of(below, words[1:]) if below else command


def check_words(commands: Mapping[str, type], words: Sequence[str], program: str = "rmr1") -> None:
    """Raises InputError for an unknown command, and for an unknown option of a known command."""
    if not words:
        return
    name, *rest = words
    if name.startswith("-"):
        _check_options(["--help", "--version"], words, program)
    elif name not in commands:
        raise InputError(f"{program} has no command {name!r}; {_nearest(name, commands, 'its commands are')}")
    elif below := _below(commands[name]):
        check_words(below, rest, f"{program} {name}")
    else:
        options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(commands[name])]
        is_config = issubclass(commands[name], ConfigCommand)
        settings = commands[name].setting_keys if is_config else None
        _check_options([*options, "--help"], rest, f"{program} {name}", settings)


def _below(command: type | None) -> dict[str, type]:
    """Returns the commands below a command such as `data`."""
    if command is None or "action" not in {field.name for field in dataclasses.fields(command)}:
        return {}
    return commands_of(typing.get_type_hints(command)["action"])


def _classes(union: Any) -> Iterable[type]:
    return [each for each in typing.get_args(union) if dataclasses.is_dataclass(each)]


def _check_options(known: Sequence[str], words: Sequence[str], program: str, settings: Any = None) -> None:
    for place, word in enumerate(words):
        given, equals, value = word.partition("=")
        option = given.replace("_", "-")
        if not option.startswith("--") or option in known or option == "--" or option.startswith("--tyro-"):
            continue
        if settings:
            from rmr1_jax.settings import nearest_key

            value = value if equals else "".join(words[place + 1 : place + 2])
            key = nearest_key(given[2:].replace("-", "_"), settings())
            if key:
                raise InputError(f"{program} takes settings as KEY=VALUE: write {key}={shlex.quote(value)}")
        hint = _nearest(option, known, "its options are" if len(known) < 6 else "")
        raise InputError(f"{program} has no option {given}; {hint}`{program} --help` describes the options")


def _nearest(word: str, known: Iterable[str], introduction: str) -> str:
    known = list(known)
    longer = [each for each in known if len(word) > 3 and each.startswith(word)]
    names = {each.lstrip("-"): each for each in known}  # the dashes are alike in all options
    near = longer or [names[name] for name in difflib.get_close_matches(word.lstrip("-"), names, n=1)]
    if near:
        return f"did you mean {near[0]}? "
    return f"{introduction} {', '.join(known)}. " if introduction else ""
