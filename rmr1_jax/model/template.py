"""The arguments of a chat template beside the messages, such as Qwen3's `enable_thinking`: which ones it takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError

# Functions that Transformers gives a template.
FUNCTIONS = {"raise_exception", "strftime_now"}


def check_template_arguments(arguments: Mapping[str, Any], hf: Any, directory: Path) -> None:
    """Check that the chat template of the Transformers tokenizer `hf` uses every one of the arguments: it would ignore
    the others without a word.

    Raises:
        InputError: a name that the template does not use, which names those that it does; or one that is set by the
            rendering itself, such as `messages`.
    """
    if not arguments:
        return
    own = {*inspect.signature(hf.apply_chat_template).parameters, *hf.special_tokens_map, "messages"}
    used = _template_variables(hf.get_chat_template(), directory) - own - FUNCTIONS
    takes = f"it takes {', '.join(sorted(used))}" if used else "it takes no such argument"
    for name in arguments:
        if name in own:
            raise InputError(
                f"{directory}: chat_template_kwargs: {name!r} is set by the rendering itself; leave it out"
            )
        if name not in used:
            raise InputError(f"{directory}: chat_template_kwargs: the chat template does not use {name!r}; {takes}")


def _template_variables(template: str, directory: Path) -> set[str]:
    """The variables that a template reads and does not set."""
    import jinja2
    from jinja2 import meta

    # A tag of Transformers' own, which changes no text.
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys()
    except jinja2.TemplateError as e:
        raise InputError(f"{directory}: the chat template cannot be read ({e})") from e
