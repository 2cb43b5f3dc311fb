"""The options of a judge behind an endpoint, which `rmr1 judge` and `rmr1 eval` share. Next: `judge.py`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from rmr1_jax.cli.options import MaybeText
from rmr1_jax.errors import InputError

if TYPE_CHECKING:
    from rmr1_jax.endpoint import Endpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Where the model of `--judge endpoint` is, and how it is asked."""

    base_url: MaybeText = None
    """Address of the endpoint, such as http://127.0.0.1:8000/v1. Defaults to OpenAI's."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; "" for an endpoint without a key."""
    concurrency: int = 8
    """Maximum number of requests to the endpoint at once, in each process."""
    extra: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE", help_behavior_hint="(repeatable)")] = ()
    """Another field of each request to the endpoint, such as top_p=0.9 or reasoning_effort=low; or a JSON object with
    several. A value is read as JSON where it is JSON. KEY=null leaves a field out, such as temperature=null."""
    accept_refusals: bool = False
    """Give a pair that the endpoint refuses a row with the status invalid. Without it, the pair has no row, the run
    ends with an error, and the next run asks again. A prompt that is too long has its own status in either case."""

    def endpoint(self, model: str, max_tokens: int, extra: Mapping[str, Any]) -> Endpoint:
        """The client of the endpoint for this model; `extra` are more fields of each request, before --extra."""
        from rmr1_jax.endpoint import Endpoint, EndpointConfig

        config = EndpointConfig(
            model=model,
            base_url=self.base_url,
            key_variable=self.key_variable or None,
            max_tokens=max_tokens,
            extra={**extra, **extra_fields(self.extra)},
            accept_refusals=self.accept_refusals,
            concurrency=self.concurrency,
        )
        return Endpoint(config)


def extra_fields(given: Sequence[str]) -> dict[str, Any]:
    """The fields that the options `--extra` name. Raises InputError for one that is neither KEY=VALUE nor a JSON
    object."""
    fields: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if isinstance(whole := _json(item), dict):
            fields |= whole
        elif equals and key.strip():
            fields[key.strip()] = _json(value)
        else:
            raise InputError(f"--extra {item!r}: expected KEY=VALUE, such as top_p=0.9, or a JSON object")
    return fields


def _json(text: str) -> Any:
    """The value of a JSON text; the text itself where it is none."""

    def refuse(token: str) -> Any:
        raise ValueError(token)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text
