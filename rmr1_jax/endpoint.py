"""A chat endpoint that speaks the OpenAI protocol: many questions at once, patiently, each answer given as it comes.

    endpoint = Endpoint(EndpointConfig(model="deepseek-reasoner", base_url="https://host/v1"))
    for key, answer in endpoint.ask(Request(pair.id, messages) for ...):
        ...                     # written to disk here, before the slot takes its next request

The key comes from the environment and goes nowhere else: not into settings, files or messages.

Next: `data/teacher.py`, which asks for chains; `eval/endpoint_judge.py`, which asks for judgements.
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
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from rmr1_jax.errors import InputError, RunError
from rmr1_jax.prompts.prompt import Messages

IN_A_ROW = 10  # failures without an answer between them: the endpoint is to blame, not the requests


LONGEST_WAIT = 120.0  # seconds between two tries, also where the endpoint asks for more


FATAL = (401, 402, 404, 405)  # no request can succeed: the key, the money, the model or the address


TRANSIENT = (408, 409, 425, 429)  # and all from 500 on


class Request(NamedTuple):
    """A question. key: hashable, comes back with the answer. number: which text of the same messages this is, from 0;
    where a seed is set each has its own."""

    key: Any
    messages: Messages
    number: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What was written, and what it took.

    text: "" where there is none. finish_reason: "stop", "length" or what else the teacher says. prompt_tokens,
    completion_tokens: 0 where the endpoint does not say. tries: requests that it took. error: why there is no answer,
    in the endpoint's words; failure: "refused" for good, or "gave_up" after all retries.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Which model is asked, where, and how.

    model: as the endpoint calls it. base_url: None: the library's own, OpenAI's. key_variable: the environment variable
    that holds the key; None: the endpoint wants none. max_tokens: of one text; None: not sent. seed: sent, with the
    text's number added; None: not sent. extra: other fields of the request's body, such as top_p. concurrency: requests
    in flight. retries: after the first try, on 429, 5xx, timeouts and dropped connections; the wait doubles from
    `backoff` seconds, or is what the endpoint asks for. timeout: seconds for one try.
    """

    model: str
    base_url: str | None = None
    key_variable: str | None = "OPENAI_API_KEY"
    temperature: float | None = 1.0
    max_tokens: int | None = 8192
    seed: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    concurrency: int = 8
    retries: int = 6
    timeout: float = 600.0
    backoff: float = 1.0

    def __post_init__(self):
        for name, ok, wanted in (
            ("model", bool(self.model), "the model's name, as the endpoint calls it"),
            ("temperature", self.temperature is None or self.temperature >= 0, "0 or more"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("concurrency", 1 <= self.concurrency <= 1000, "from 1 to 1000"),
            ("retries", self.retries >= 0, "0 or more"),
            ("timeout", self.timeout > 0, "more than 0"),
            ("backoff", self.backoff >= 0, "0 or more"),
        ):
            if not ok:
                raise InputError(f"{name}={getattr(self, name)!r} must be {wanted}")
        if self.base_url is not None:
            _check_address(self.base_url)


class Endpoint:
    """Asks one endpoint.

    Raises:
        InputError: the environment variable of the key is not set.
    """

    def __init__(self, config: EndpointConfig):
        import openai  # here: it takes half a second

        self.config, self._key, self._answers = config, _key(config), False
        timeout = openai.Timeout(config.timeout, connect=min(config.timeout, 20.0))
        options = {"base_url": config.base_url, "timeout": timeout, "max_retries": 0}  # we retry, and count
        self._client = openai.OpenAI(api_key=self._key or "none", **options)
        _check_address(str(self._client.base_url))  # the environment may have given it
        self.name = f"{config.model} at {str(self._client.base_url).rstrip('/')}"

    def settings(self) -> dict[str, Any]:
        """All that decides an answer, as plain values."""
        told = {name: getattr(self.config, name) for name in ("model", "temperature", "max_tokens", "seed")}
        return told | {"base_url": str(self._client.base_url), "extra": dict(self.config.extra)}

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        """(key, answer) for each request, in the order of arrival.

        `requests` is read as slots get free: the next one is taken only when the caller comes back for more after an
        answer, so what it wrote by then is written before the next request begins. A failed answer is given like any
        other; `IN_A_ROW` that gave up end it, and as many refused ones where none was ever answered.

        Raises:
            InputError: the endpoint takes no request of this kind (wrong key, no such model), with its words.
            RunError: it fails again and again. What was given before stands.
        """
        requests, in_flight, failures = iter(requests), 0, 0
        jobs: SimpleQueue[Request | None] = SimpleQueue()
        done: SimpleQueue[tuple[Any, Answer | BaseException]] = SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while (request := jobs.get()) is not None:
                try:
                    done.put((request.key, self._answer(request, stop)))
                except BaseException as e:  # raised again below, by whoever waits for it
                    done.put((request.key, e))

        try:
            for request in itertools.islice(requests, self.config.concurrency):
                # Daemons: an interrupted run does not wait for an answer that takes minutes.
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

        for tries in itertools.count(1):
            asked_to_wait = 0.0
            try:
                return self._ask_once(request, tries)
            except openai.APIStatusError as e:
                error, status = self._words(f"{e.status_code}: {_message(e)}"), e.status_code
                if status in FATAL:
                    raise InputError(f"{self.name} says {error}; check the model, base_url and the key") from None
                if status < 500 and status not in TRANSIENT:
                    return Answer(tries=tries, error=error, failure="refused")
                asked_to_wait = _retry_after(e.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                error = f"no answer within {self.config.timeout:g} s"
            except openai.OpenAIError as e:  # a dropped connection, half an answer, no address
                error = self._words(f"{e} {e.__cause__ or ''}")
            except ValueError as e:
                error = self._words(f"what it sent is no chat completion ({e})")
            if tries > self.config.retries:
                return Answer(tries=tries, error=f"{error} (after {tries} tries)", failure="gave_up")
            doubled = self.config.backoff * 2.0 ** min(tries - 1, 20) * random.uniform(0.75, 1.0)
            if stop.wait(min(max(asked_to_wait, doubled), LONGEST_WAIT)):
                return Answer(tries=tries, error="interrupted", failure="gave_up")
        raise AssertionError("unreachable")

    def _ask_once(self, request: Request, tries: int) -> Answer:
        config = self.config
        sent = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        sent["seed"] = None if config.seed is None else config.seed + request.number
        completion = self._client.chat.completions.create(
            model=config.model,
            messages=request.messages,  # type: ignore[arg-type]
            extra_body=dict(config.extra) or None,
            **{name: value for name, value in sent.items() if value is not None},
        )
        try:
            choice, usage = completion.choices[0], completion.usage
            text = (choice.message.content or "").encode(errors="replace").decode()  # no half surrogate pairs
        except (AttributeError, LookupError, TypeError):  # a proxy's page, or an error sent as if all were well
            raise ValueError(f"{completion!r:.200}") from None
        return Answer(
            text=text,
            finish_reason=choice.finish_reason or "",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            tries=tries,
        )

    def _words(self, text: str) -> str:
        """The endpoint's words, short, on one line, and without the key, which some endpoints repeat."""
        return " ".join((text.replace(self._key, "<key>") if self._key else text).split())[:400]


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:  # the address is written beside the answers
        raise InputError(
            "base_url holds a password or a query; the key belongs in the environment variable that key_variable names"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"base_url={url!r} must be an address such as http://127.0.0.1:8000/v1")


def _key(config: EndpointConfig) -> str:
    """The key; "" where none is wanted."""
    if config.key_variable is None:
        return ""
    key = os.environ.get(config.key_variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {config.key_variable} is not set; it holds the key of {config.model}. "
            "key_variable names another one, and is null for an endpoint that wants no key"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"the environment variable {config.key_variable} holds no key: it has spaces or other signs")
    return key


def _message(error: Any) -> str:
    body = error.body
    if isinstance(body, Mapping):
        return str(body.get("message") or dict(body))
    return str(body or error.message)


def _retry_after(header: str | None) -> float:
    """Seconds, from a number or a date; 0 where there is neither."""
    try:
        seconds = float(header or 0)
    except ValueError:
        date = email.utils.parsedate_tz(header)
        seconds = 0.0 if date is None else email.utils.mktime_tz(date) - time.time()
    return seconds if math.isfinite(seconds) else 0.0
