"""Argument types and the base class that the commands of `rmr1` share. Read next: `main.py`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from rmr1_jax.cli.recipes import find_config, missing
from rmr1_jax.errors import InputError

Dtype = Literal["bfloat16", "float32"]
AutoDtype = Literal["auto", "bfloat16", "float32"]

# Optional values. tyro would print "(default: None)"; the help text of each says what happens without a value.
MaybeInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
MaybeFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
MaybePath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
MaybeText = Annotated[str | None, arg(metavar="STR", help_behavior_hint="")]


TemplateArguments = Annotated[str | None, arg(metavar="JSON", help_behavior_hint="")]


def template_arguments(given: str | None) -> dict[str, Any]:
    """The value of an option --chat-template-kwargs. Raises InputError if it is no JSON object."""
    import json

    try:
        value = {} if given is None else json.loads(given)
    except ValueError as e:
        value = e
    if not isinstance(value, dict):
        raise InputError(
            f"--chat-template-kwargs {given}: expected a JSON object such as '{{\"enable_thinking\": false}}'"
        )
    return value


def template_setting(arguments: Mapping[str, Any], option: str = "chat_template_kwargs=") -> str:
    """The arguments of the chat template as the next command takes them, with a space before; "" without any."""
    import json
    import shlex

    return f" {option}{shlex.quote(json.dumps(dict(arguments)))}" if arguments else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigCommand:
    """A command whose settings come from a YAML file and from overrides on the command line."""

    settings: ClassVar[str] = ""
    """The config class of the command, such as "train.config:SftConfig"."""

    config: Annotated[Positional[Path], arg(metavar="CONFIG.yaml")]
    """YAML file with the settings, or the name of a recipe; `rmr1 config` lists the recipes."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")] = ()
    """Settings that override those in the file, such as out=runs/first or optimizer.lr=1e-5."""

    def path(self) -> Path:
        """Returns the file with the settings; raises InputError if there is none."""
        if not (path := find_config(self.config)).exists():
            raise missing(path)
        return path

    def load(self) -> Any:
        """Reads the settings; raises InputError for a mistake in them."""
        from importlib import import_module

        from rmr1_jax.config import load_config

        path = self.path()
        module, name = self.settings.split(":")
        cls = getattr(import_module(f"rmr1_jax.{module}"), name)
        return load_config(cls, path, self.overrides)

    @classmethod
    def settings_help(cls) -> str:
        """Describes every setting of the command."""
        from rmr1_jax.settings import settings_text

        return settings_text(cls.settings)

    @classmethod
    def setting_keys(cls) -> list[str]:
        """Returns the dotted keys of the settings."""
        from rmr1_jax.settings import settings

        return [setting.key for setting in settings(cls.settings)] if cls.settings else []


@contextmanager
def starting(text: str) -> Iterator[None]:
    """Says "text ..." at once, and again while the block lasts, in a process that has not loaded JAX yet: the first
    line of a command comes before the seconds that this takes. With RMR1_PROCESS set, only process 0 speaks."""
    if "jax" in sys.modules or os.environ.get("RMR1_PROCESS", "0") != "0":
        yield
        return
    from rmr1_jax.distributed.terminal import waiting

    with waiting(text, delay=0):
        yield


@contextmanager
def all_processes(*, loads_model: bool = True) -> Iterator[bool]:
    """Join the other processes of the run, if there are any; yields whether this is the first one, which prints.

    SIGTERM at one process stops all of them. A command that loads no model has no use for JAX, which takes seconds to
    start, so it joins only where RMR1_PROCESSES is set.
    """
    if not loads_model and "RMR1_PROCESSES" not in os.environ:
        yield True
        return
    with starting("loading JAX"):
        from rmr1_jax.distributed.exchange import first
        from rmr1_jax.distributed.join import join_processes
        from rmr1_jax.distributed.preemption import Preemption

    with join_processes(), Preemption() as preemption, preemption.interruptible():
        yield first()
