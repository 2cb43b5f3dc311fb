"""A client for chat endpoints with the OpenAI protocol: concurrent requests, retries, answers as they arrive.

    endpoint = Endpoint(EndpointConfig(model="deepseek-reasoner", base_url="https://host/v1"))
    for key, answer in endpoint.ask(Request(pair.id, messages) for ...):
        ...                     # write it to disk here: the next request is sent only afterwards

The API key is read from the environment and never appears in settings, files or messages.

Next: `data/chains/chains.py`, which asks a teacher for chains; `judge/endpoint.py`, which asks for judgements.
"""

from __future__ import annotations

import dataclasses
import email.utils
import itertools
import math
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from queue import SimpleQueue
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.prompts.prompt import Messages

SENT = ("model", "temperature", "max_tokens", "seed")  # sent with each request, unless None
IN_A_ROW = 10  # consecutive failures after which the endpoint is at fault, and not the requests
LONGEST_WAIT = 120.0  # seconds between two tries, even if the endpoint asks for more
FATAL = (401, 402, 404, 405)  # HTTP status: no request can succeed (wrong key, no credit, no such model or address)
TRANSIENT = (408, 409, 425, 429)  # HTTP status: worth another try, like all from 500 on


class Request(NamedTuple):
    """One request. key: returned with the answer. number: counts the texts that are sampled for the same messages, from
    0; where a seed is set, each number has its own."""

    key: Any
    messages: Messages
    number: int = 0


@config_dataclass
class Answer:
    """The answer to a request, or the failure.

    text: "" after a failure. finish_reason: as the endpoint reports it, such as "stop" or "length". prompt_tokens,
    completion_tokens: 0 if the endpoint does not report them. tries: the HTTP requests that were sent. error: the
    endpoint's own message; failure: "refused" (not worth another try), or "gave_up" after all retries.
    """

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tries: int = 1
    error: str | None = None
    failure: Literal["refused", "gave_up"] | None = None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@config_dataclass
class EndpointConfig:
    """The settings of an `Endpoint`.

    model: the endpoint's name of the model. base_url: None for OpenAI's own. key_variable: the environment variable
    that holds the API key; None for an endpoint without one. temperature and max_tokens (of one text) are not sent if
    None. seed: sent with the request's number added; None: not sent. extra: other fields of the request body, such as
    top_p. concurrency: requests in flight. retries: further tries after 429, 5xx, timeouts and dropped connections; the
    wait between tries doubles from `backoff` seconds, unless the endpoint asks for more. timeout: seconds for one try.
    """

    model: Annotated[str, Field(min_length=1)]
    base_url: str | None = None
    key_variable: str | None = "OPENAI_API_KEY"
    temperature: NonNegativeFloat | None = 1.0
    max_tokens: PositiveInt | None = 8192
    seed: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    retries: NonNegativeInt = 6
    timeout: PositiveFloat = 600.0
    backoff: NonNegativeFloat = 1.0

    def __post_init__(self):
        if self.base_url is not None:
            _check_address(self.base_url)


class Endpoint:
    """Sends requests to one endpoint. Raises InputError if the environment variable of the API key is not set."""

    def __init__(self, config: EndpointConfig):
        import openai  # imported here because it takes half a second

        self.config, self._key, self._answers = config, _key(config), False
        timeout = openai.Timeout(config.timeout, connect=min(config.timeout, 20.0))
        options = {"base_url": config.base_url, "timeout": timeout, "max_retries": 0}  # `_answer` retries, and counts
        self._client = openai.OpenAI(api_key=self._key or "none", **options)
        _check_address(str(self._client.base_url))  # it may come from the environment
        self.name = f"{config.model} at {str(self._client.base_url).rstrip('/')}"

    def settings(self) -> dict[str, Any]:
        """Return all settings that an answer depends on, as plain values."""
        sent = {name: getattr(self.config, name) for name in SENT}
        return sent | {"base_url": str(self._client.base_url), "extra": dict(self.config.extra)}

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        """Yield (key, answer) for each request, in the order in which the answers arrive.

        The next item of `requests` is taken only when the caller asks for the next answer, so everything that the
        caller wrote by then is written before another request is sent. Failures are yielded like answers.

        Raises:
            InputError: no request can succeed (wrong key, no such model), with the endpoint's message.
            RunError: `IN_A_ROW` requests in a row gave up, or, before the first answer, gave up or were refused.
        """
        requests, in_flight, failures = iter(requests), 0, 0
        jobs: SimpleQueue[Request | None] = SimpleQueue()
        done: SimpleQueue[tuple[Any, Answer | BaseException]] = SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while (request := jobs.get()) is not None:
                try:
                    done.put((request.key, self._answer(request, stop)))
                except BaseException as e:  # raised below, in the thread of the caller
                    done.put((request.key, e))

        try:
            for request in itertools.islice(requests, self.config.concurrency):
                # Daemon threads: an interrupted run does not wait for an answer that takes minutes.
                threading.Thread(target=work, daemon=True, name="endpoint").start()
                jobs.put(request)
                in_flight += 1
            while in_flight:
                key, answer = done.get()
                in_flight -= 1
                if isinstance(answer, BaseException):
                    raise answer
                if answer.error is None:
                    self._answers, failures = True, 0
                elif answer.failure == "gave_up" or not self._answers:
                    failures += 1
                yield key, answer
                if failures == IN_A_ROW:
                    raise RunError(f"{self.name}: {IN_A_ROW} failures in a row, the last one: {answer.error}")
                if (request := next(requests, None)) is not None:
                    jobs.put(request)
                    in_flight += 1
        finally:
            stop.set()
            for _ in range(self.config.concurrency):
                jobs.put(None)

    def _answer(self, request: Request, stop: threading.Event) -> Answer:
        import openai

        tries = 0
        while True:
            tries, asked_to_wait = tries + 1, 0.0
            try:
                return self._ask_once(request, tries)
            except openai.APIStatusError as e:
                body = e.body if isinstance(e.body, Mapping) else {"message": e.body or e.message}
                error, status = self._shorten(f"{e.status_code}: {body.get('message') or dict(body)}"), e.status_code
                if status in FATAL:
                    raise InputError(f"{self.name} answered {error}; check the model, base_url and the key") from None
                if status < 500 and status not in TRANSIENT:
                    return Answer(tries=tries, error=error, failure="refused")
                asked_to_wait = _retry_after(e.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                error = f"no answer within {self.config.timeout:g} s"
            except openai.OpenAIError as e:  # a dropped connection, half a response, an unknown host
                error = self._shorten(f"{e} {e.__cause__ or ''}")
            except ValueError as e:
                error = self._shorten(f"the response is no chat completion ({e})")
            if tries > self.config.retries:
                return Answer(tries=tries, error=f"{error} (after {tries} tries)", failure="gave_up")
            doubled = self.config.backoff * 2.0 ** min(tries - 1, 20) * random.uniform(0.75, 1.0)
            if stop.wait(min(max(asked_to_wait, doubled), LONGEST_WAIT)):
                return Answer(tries=tries, error="interrupted", failure="gave_up")

    def _ask_once(self, request: Request, tries: int) -> Answer:
        sent = {name: value for name in SENT if (value := getattr(self.config, name)) is not None}
        if "seed" in sent:
            sent["seed"] += request.number
        extra = dict(self.config.extra) or None
        completion = self._client.chat.completions.create(messages=request.messages, extra_body=extra, **sent)
        try:
            choice, usage = completion.choices[0], completion.usage
            text = (choice.message.content or "").encode(errors="replace").decode()  # replaces lone surrogates
        except (AttributeError, LookupError, TypeError):  # a proxy's page, or an error with status 200
            raise ValueError(f"{completion!r:.200}") from None
        tokens = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens} if usage else {}
        return Answer(text=text, finish_reason=choice.finish_reason or "", tries=tries, **tokens)

    def _shorten(self, text: str) -> str:
        """Return an endpoint's message on one short line and without the key, which some endpoints repeat."""
        return " ".join((text.replace(self._key, "<key>") if self._key else text).split())[:400]


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:  # the address is written to files beside the answers
        raise InputError(
            "base_url holds a password or a query; the key belongs in the environment variable that key_variable names"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"base_url={url!r} must be an address such as http://127.0.0.1:8000/v1")


def _key(config: EndpointConfig) -> str:
    """Return the API key, or "" for an endpoint without one."""
    if config.key_variable is None:
        return ""
    if not (key := os.environ.get(config.key_variable, "").strip()):
        raise InputError(
            f"the environment variable {config.key_variable} is not set; it must hold the API key for "
            f"{config.model}. Set it, or name another variable in key_variable (null for an endpoint without a key)"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"the environment variable {config.key_variable} holds no API key: it has spaces or non-ASCII characters"
        )
    return key


def _retry_after(header: str | None) -> float:
    """Return the seconds to wait, from a number or a date; 0 if the header holds neither."""
    try:
        seconds = float(header or 0)
    except ValueError:
        date = email.utils.parsedate_tz(header)
        seconds = 0.0 if date is None else email.utils.mktime_tz(date) - time.time()
    return seconds if math.isfinite(seconds) else 0.0
