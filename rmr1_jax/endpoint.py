"""A client for chat endpoints with the OpenAI protocol: concurrent requests, retries, answers as they arrive.

    endpoint = Endpoint(EndpointConfig(model="deepseek-reasoner", base_url="https://host/v1"))
    for key, answer in endpoint.ask(Request(pair.id, messages) for ...):
        ...                     # write it to disk here: the next request is sent only afterwards

The API key is read from the environment and never appears in settings, files or messages.

A field that the endpoint does not take, such as the temperature of a reasoning model, is left out of later requests.

Next: `reply.py`, which reads the replies; `data/chains/chains.py`, which asks a teacher for chains;
`judge/endpoint.py`, which asks for judgements.
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
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rmr1_jax.config import config_dataclass
from rmr1_jax.distributed.terminal import say
from rmr1_jax.errors import InputError, RunError
from rmr1_jax.prompts.prompt import Messages
from rmr1_jax.reply import ACCEPT_REFUSALS, Answer, ReplyError, read_reply

SENT = ("model", "temperature", "max_tokens", "seed")  # sent with each request, unless None or not taken
IN_A_ROW = 10  # consecutive failures after which the endpoint is at fault, and not the requests
NOTES_APART = 5.0  # seconds between two lines about failures before the first answer
LONGEST_WAIT = 120.0  # seconds between two tries, even if the endpoint asks for more
FATAL = (401, 402, 404, 405)  # HTTP status: no request can succeed (wrong key, no credit, no such model or address)


class Request(NamedTuple):
    """One request. key: returned with the answer. number: counts the texts that are sampled for the same messages, from
    0; where a seed is set, each number has its own."""

    key: Any
    messages: Messages
    number: int = 0


@config_dataclass
class EndpointConfig:
    """The settings of an `Endpoint`."""

    model: Annotated[str, Field(min_length=1)]
    """The endpoint's name of the model."""
    base_url: str | None = None
    """Address of the endpoint. null: OpenAI's own."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the API key. null: the endpoint needs none."""
    temperature: NonNegativeFloat | None = 1.0
    """Sampling temperature. null: not sent."""
    max_tokens: PositiveInt | None = 8192
    """Maximum length of a text in tokens. null: not sent."""
    seed: int | None = None
    """Sent with the request's number added. null: not sent."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other fields of the request body, such as top_p. They replace those above; one that is null is not sent at
    all."""
    accept_refusals: bool = False
    """Count a refused request as answered, without a text. Otherwise the next run asks again."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    """Requests in flight."""
    retries: NonNegativeInt = 6
    """Further tries after 429, 5xx, timeouts and dropped connections."""
    timeout: PositiveFloat = 600.0
    """Seconds for one try."""
    backoff: NonNegativeFloat = 1.0
    """Seconds before the second try. The wait doubles with each try, unless the endpoint asks for more."""

    def __post_init__(self):
        if self.base_url is not None:
            _check_address(self.base_url)
        if fixed := {"messages", "model", "stream"} & self.extra.keys():
            raise InputError(f"extra: {', '.join(sorted(fixed))} cannot be given as an extra field of a request")


class Endpoint:
    """Sends requests to one endpoint. Raises InputError if the environment variable of the API key is not set."""

    def __init__(self, config: EndpointConfig):
        import openai  # imported here because it takes half a second

        self.config, self._key, self._answers = config, _key(config), False
        self._not_taken, self._lock, self._noted = frozenset[str](), threading.Lock(), -NOTES_APART
        timeout = openai.Timeout(config.timeout, connect=min(config.timeout, 20.0))
        options = {"base_url": config.base_url, "timeout": timeout, "max_retries": 0}  # `_answer` retries, and counts
        self._client = openai.OpenAI(api_key=self._key or "none", **options)
        _check_address(str(self._client.base_url))  # it may come from the environment
        self.name = f"{config.model} at {str(self._client.base_url).rstrip('/')}"

    def settings(self) -> dict[str, Any]:
        """Return all settings that an answer depends on, as plain values: what was asked for, taken or not."""
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
                elif answer.failure == "gave_up" or not (self._answers or self.config.accept_refusals):
                    failures += 1
                yield key, answer
                if failures == IN_A_ROW:
                    advice = "run the same command again when the endpoint answers"
                    if answer.failure == "refused":
                        advice += f"; {ACCEPT_REFUSALS}"
                    raise RunError(f"{self.name}: {IN_A_ROW} failures in a row, the last one: {answer.error}; {advice}")
                if (request := next(requests, None)) is not None:
                    jobs.put(request)
                    in_flight += 1
        finally:
            stop.set()
            for _ in range(self.config.concurrency):
                jobs.put(None)

    def _answer(self, request: Request, stop: threading.Event) -> Answer:
        import openai

        tries = failures = 0
        not_taken = self._not_taken
        while True:
            tries, asked_to_wait = tries + 1, 0.0
            fields = self._fields(request, not_taken)
            try:
                answer = self._ask_once(request, fields, tries)
                self._remember(not_taken)
                return answer
            except ReplyError as e:
                error = self._shorten(str(e))
                if e.status in FATAL:
                    raise InputError(f"{self.name} answered {error}; check the model, base_url and the key") from None
                if e.refuses and (more := e.fields(fields)):
                    not_taken |= more
                    continue
                if e.refuses:
                    return Answer(tries=tries, error=error, failure=e.failure)
                asked_to_wait = e.retry_after
            except openai.APITimeoutError:
                error = f"no answer within {self.config.timeout:g} s"
            except openai.OpenAIError as e:  # a dropped connection, half a response, an unknown host
                error = self._shorten(f"{e} {e.__cause__ or ''}")
            except ValueError as e:
                error = self._shorten(f"the response is no chat completion ({e})")
            failures += 1
            if failures > self.config.retries:
                return Answer(tries=tries, error=f"{error} (after {tries} tries)", failure="gave_up")
            doubled = self.config.backoff * 2.0 ** min(failures - 1, 20) * random.uniform(0.75, 1.0)
            wait = min(max(asked_to_wait, doubled), LONGEST_WAIT)
            self._note_failure(f"{error}; try {tries + 1} follows in {wait:.0f} s")
            if stop.wait(wait):
                return Answer(tries=tries, error="interrupted", failure="gave_up")

    def _note_failure(self, text: str) -> None:
        """Say why no answer comes, until the first one has come, and not for each of the concurrent requests."""
        with self._lock:
            now = time.monotonic()
            if self._answers or now - self._noted < NOTES_APART:
                return
            self._noted = now
        say(f"note: {self.name}: {text}")

    def _fields(self, request: Request, not_taken: frozenset[str]) -> dict[str, Any]:
        """Return the fields of a request, except for its messages and those that the endpoint does not take."""
        fields = {name: getattr(self.config, name) for name in SENT}
        if fields["seed"] is not None:
            fields["seed"] += request.number
        if "max_completion_tokens" in self.config.extra:  # another name of the same limit
            del fields["max_tokens"]
        fields |= self.config.extra
        if "max_tokens" in not_taken:
            fields = {"max_completion_tokens": fields.get("max_tokens")} | fields
        return {name: value for name, value in fields.items() if value is not None and name not in not_taken}

    def _remember(self, not_taken: frozenset[str]) -> None:
        """Leave these fields out of later requests, because one without them was answered. Says so on stderr, once."""
        with self._lock:
            new = sorted(not_taken - self._not_taken)
            self._not_taken |= not_taken
        if new:
            changes = [
                f"{n} is sent as max_completion_tokens" if n == "max_tokens" else f"{n} is not sent" for n in new
            ]
            say(f"note: {self.name} does not take {', '.join(new)}: {', '.join(changes)}")

    def _ask_once(self, request: Request, fields: Mapping[str, Any], tries: int) -> Answer:
        import openai

        sent = {name: value for name, value in fields.items() if name != "model"}
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.config.model, messages=request.messages, extra_body=sent
            )
        except openai.APIStatusError as e:
            wait = _retry_after(e.response.headers.get("retry-after"))
            raise ReplyError(e.status_code, e.body or e.message, wait) from None
        return read_reply(response.http_response.json(), tries)

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
            f"{config.model}. Set it, or name another variable in key_variable; for an endpoint without a key give "
            "key_variable=null, which on the command line is --key-variable ''"
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
