"""Reads the reply of a chat endpoint: an answer, or why there is none.

Endpoints of the OpenAI protocol differ in where they put a model's thought, in how they report an error, and in the
fields of a request that they take. This file knows the variants; `endpoint.py` sends the requests.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from rmr1_jax.config import config_dataclass
from rmr1_jax.errors import RunError

Failure = Literal["refused", "too_long", "gave_up"]

ACCEPT_REFUSALS = "--accept-refusals (accept_refusals: true in a config) counts refused requests as answered"
TRANSIENT = (408, 409, 425, 429)  # HTTP status: worth another try, like all from 500 on
SAMPLING = ("temperature", "seed", "top_p", "top_k", "min_p")  # fields that a request can do without
FILTERED = ("content_filter", "sensitive")  # finish reasons of an answer that the endpoint's filter stopped

# Parts of the errors for a prompt that does not fit, from OpenAI, vLLM, SGLang, llama.cpp, TGI, Gemini and others.
_TOO_LONG = (
    *("context_length_exceeded", "context length", "context window", "context size", "too long", "too many tokens"),
    *("prompt length", "input length", "input token count", "length of the messages", "`inputs` tokens"),
)
# Parts of the errors for a field that is not taken, from OpenAI, Azure, Anthropic, Gemini, Mistral, Moonshot, LiteLLM.
_NOT_TAKEN = re.compile(
    r"unsupported|n(?:o|'|\N{RIGHT SINGLE QUOTATION MARK})t support|deprecated|unrecogni[sz]ed|unknown|unexpected"
    r"|not (?:permitted|allowed)|forbidden|is allowed for",
    re.IGNORECASE,
)


@config_dataclass
class Answer:
    """The answer to a request, or the failure.

    text: "" after a failure. thought: the model's reasoning, if the endpoint reports it apart from the text.
    finish_reason: as the endpoint reports it, such as "stop" or "length". prompt_tokens, completion_tokens: 0 if the
    endpoint does not report them. tries: the HTTP requests that were sent. error: the endpoint's own message. failure:
    "too_long" (the prompt does not fit the model), "refused" (for another reason, which may pass), or "gave_up" after
    all retries.
    """

    text: str = ""
    thought: str | None = None
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tries: int = 1
    error: str | None = None
    failure: Failure | None = None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def settles(self, accept_refusals: bool) -> bool:
        """Whether the request need not be sent again by another run."""
        return self.failure in (None, "too_long") or (self.failure == "refused" and accept_refusals)

    @property
    def full_text(self) -> str:
        """The text after the thought in `<think>` tags. A text that has its thought already stays as it is."""
        if not self.thought or self.text.lstrip().startswith(("<think>", self.thought)):
            return self.text
        return f"<think>\n{self.thought}\n</think>\n\n{self.text}"


class Unanswered(RunError):
    """Some pairs have no answer, after all others have theirs. asked: what was asked. answers: the failure for each, by
    the pair's id."""

    def __init__(self, asked: str, answers: Mapping[str, Answer]):
        self.asked, self.answers = asked, answers
        name, answer = next(iter(answers.items()))
        refused = sum(answer.failure == "refused" for answer in answers.values())
        count = f"{len(answers)} pair{'s' * (len(answers) > 1)}{f' ({refused} refused)' if refused else ''}"
        advice = "run the same command again to ask for these alone"
        if refused:
            advice += f"; {ACCEPT_REFUSALS}"
        super().__init__(f"{asked}: no answer for {count}, for one of them ({name!r}): {answer.error}; {advice}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Unanswered, (self.asked, self.answers)  # processes exchange it

    @staticmethod
    def check(errors: Iterable[Unanswered]) -> None:
        """Raise the errors of all processes and their batches as one, if there are any."""
        if errors := list(errors):
            raise Unanswered(errors[0].asked, {name: why for e in errors for name, why in e.answers.items()})


class ReplyError(Exception):
    """An error that an endpoint reports, with an HTTP status. body: the parsed content of the reply, or its text.
    retry_after: the seconds for which the endpoint asks the client to wait."""

    def __init__(self, status: int, body: Any, retry_after: float = 0.0):
        error = _inner_error(body)
        self.status, self.retry_after = status, retry_after
        self.code, self.param = (str(error.get(name) or "") for name in ("code", "param"))
        message = error.get("message") or (error if error else body)
        metadata = error.get("metadata")
        if isinstance(metadata, Mapping) and metadata.get("raw"):  # OpenRouter: the message of the provider behind it
            message = f"{message}: {metadata['raw']}"
        super().__init__(f"{status}: {message}")

    @property
    def refuses(self) -> bool:
        """Whether the same request would be refused again at once."""
        return self.status < 500 and self.status not in TRANSIENT

    @property
    def failure(self) -> Failure:
        said = " ".join(f"{self.code} {self}".lower().split())
        return "too_long" if any(words in said for words in _TOO_LONG) else "refused"

    def fields(self, sent: Collection[str]) -> set[str]:
        """The fields among `sent` that the endpoint says it does not take, and that a request can do without."""
        known = [name for name in ("max_tokens", *SAMPLING) if name in sent]
        if self.failure == "too_long" or not _NOT_TAKEN.search(f"{self.code} {self}"):
            return set()
        return {self.param} & set(known) or {name for name in known if re.search(rf"\b{name}\b", str(self))}


def read_reply(body: Any, tries: int) -> Answer:
    """Read the parsed JSON of a reply with HTTP status 200. A message that refuses in the model's own words is a text;
    one that a filter stopped is a refusal.

    Raises:
        ReplyError: the body holds an error with a status of its own.
        ValueError: the body is no whole chat completion.
    """
    try:
        choice = {} if body.get("error") else body["choices"][0]
        if (error := body.get("error") or choice.get("error")) or choice.get("finish_reason") == "error":
            status = str(error.get("code")) if isinstance(error, Mapping) else ""
            if re.fullmatch("[45][0-9][0-9]", status):
                raise ReplyError(int(status), error)
            raise ValueError(f"{error or choice!r:.200}")
        message, usage = choice["message"], body.get("usage") or {}
        thought, text = _parts(message.get("content"))
        text = text or message.get("refusal") or ""
        finish_reason = choice.get("finish_reason") or ""
        tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        thought = _clean(_own_thought(message) or thought)
        thought = thought.strip().removeprefix("<think>").removesuffix("</think>").strip() or None
        text = _clean(text)
    except (AttributeError, LookupError, TypeError):  # a proxy's page, for example
        raise ValueError(f"{body!r:.200}") from None
    if finish_reason in FILTERED:
        error = f"a filter of the endpoint stopped the answer (finish_reason {finish_reason})"
        return Answer(finish_reason=finish_reason, tries=tries, error=error, failure="refused", **tokens)
    return Answer(text=text, thought=thought, finish_reason=finish_reason, tries=tries, **tokens)


def _inner_error(body: Any) -> Mapping[str, Any]:
    """The object that describes an error; {} if there is none. It may be the only element of a list (Gemini)."""
    if isinstance(body, list) and body:
        body = body[0]
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        body = body["error"]
    return body if isinstance(body, Mapping) else {}


def _own_thought(message: Mapping[str, Any]) -> str:
    """The thought in a field of its own, "" if there is none: vLLM, DeepSeek and SGLang; OpenRouter and newer vLLM;
    OpenRouter's list of parts."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name].strip():
            return message[name]
    details = message.get("reasoning_details") or []
    return "".join(part.get("text") or part.get("summary") or "" for part in details)


def _parts(content: Any) -> tuple[str, str]:
    """(thought, text) of a message's content: a text, a list of parts, or None."""
    if content is None or isinstance(content, str):
        return "", content or ""
    if not isinstance(content, list):
        raise TypeError
    thought, text = "", ""
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        if part.get("type") in ("thinking", "reasoning"):  # Mistral's holds a list of parts again
            thought += "".join(_parts(part.get("thinking") or part.get("text")))
        else:
            text += part.get("text") or part.get("refusal") or ""
    return thought, text


def _clean(text: str) -> str:
    """The text without lone surrogates, which no file could hold."""
    return text.encode(errors="replace").decode()
