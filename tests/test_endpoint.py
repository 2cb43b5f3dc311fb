"""The client of a chat endpoint: retries where they help, clear errors where they do not, and no key in any output."""

import email.utils
import json
import threading
import time

import pytest
from chat_server import KEY, ChatServer, Reply, no_field, reasoning_model

from rmr1_jax.config import build_config
from rmr1_jax.endpoint import IN_A_ROW, Answer, Endpoint, EndpointConfig, Request
from rmr1_jax.errors import InputError, RunError


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def asking(*texts: str) -> list[Request]:
    return [Request(text, [{"role": "user", "content": text}]) for text in texts]


def endpoint(server: ChatServer, **options) -> Endpoint:
    return Endpoint(EndpointConfig(**{"model": "m", "base_url": server.url, "backoff": 0.01, **options}))


def content(request: dict) -> str:
    return request["messages"][-1]["content"]


def test_a_request_and_its_answer():
    reply = Reply("fine ünd good", finish_reason="length", tokens=(7, 3))
    with ChatServer(lambda request, number: reply) as server:
        options = {"temperature": 0.5, "max_tokens": 20, "seed": 40, "extra": {"top_p": 0.9}}
        request = Request(("any", 1), [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], 2)
        answers = list(endpoint(server, **options).ask([request]))
    expected = Answer(text="fine ünd good", finish_reason="length", prompt_tokens=7, completion_tokens=3, tries=1)
    assert answers == [(("any", 1), expected)] and expected.tokens == 10
    sent = {"model": "m", "temperature": 0.5, "max_tokens": 20, "seed": 42, "top_p": 0.9, "messages": request.messages}
    assert server.log[0][0] == sent


def test_settings_of_none_are_not_sent():
    with ChatServer(lambda request, number: "x") as server:
        list(endpoint(server, temperature=None, max_tokens=None).ask(asking("u")))
    assert set(server.log[0][0]) == {"model", "messages"}


def test_retries_until_an_answer():
    date = email.utils.formatdate(time.time() - 5)
    replies = [
        *(Reply(status=status) for status in (500, 502, 503, 408)),
        Reply(status=429, retry_after="0.3"),
        Reply(status=429, retry_after=date),
        Reply(status=429, retry_after="soon"),
        Reply(drop="before"),
        Reply(drop="middle", text="x" * 1000),
        Reply(delay=1.0, text="too late"),
        Reply("at last"),
    ]
    arrived = []

    def script(request, number):
        arrived.append(time.monotonic())
        return replies[number]

    with ChatServer(script) as server:
        [(_, answer)] = endpoint(server, retries=10, timeout=0.5, backoff=0.001).ask(asking("u"))
    assert (answer.text, answer.tries, answer.error) == ("at last", 11, None)
    assert arrived[5] - arrived[4] >= 0.3 > arrived[1] - arrived[0]  # it waits as long as the endpoint asks


def test_the_wait_doubles():
    arrived = []

    def script(request, number):
        arrived.append(time.monotonic())
        return Reply(status=503) if number < 4 else "x"

    with ChatServer(script) as server:
        list(endpoint(server, backoff=0.1).ask(asking("u")))
    for number, least in enumerate((0.075, 0.15, 0.3, 0.6)):
        assert least <= arrived[number + 1] - arrived[number] < 2 * least + 0.5


@pytest.mark.parametrize("sent", ["<html>busy</html>", '{"error": "busy"}', "[]", "null", '{"choices": []}'])
def test_a_response_that_is_no_completion_is_retried(sent):
    with ChatServer(lambda request, number: Reply(raw=sent)) as server:
        [(_, answer)] = endpoint(server, retries=1).ask(asking("u"))
    assert answer.failure == "gave_up" and answer.tries == 2 and answer.text == ""
    assert "the response is no chat completion" in answer.error and "(after 2 tries)" in answer.error


def test_a_failed_request_does_not_stop_the_others():
    bad = {"long": Reply("too many\ntokens", status=400), "sick": Reply("fell over", status=500)}
    with ChatServer(lambda request, number: bad.get(content(request), "x")) as server:
        answers = dict(endpoint(server, retries=2).ask(asking("a", "long", "b", "sick", "c")))
    assert [answers[name].text for name in "abc"] == ["x"] * 3
    assert answers["long"] == Answer(tries=1, error="400: too many tokens", failure="too_long")
    assert answers["sick"] == Answer(tries=3, error="500: fell over (after 3 tries)", failure="gave_up")


def test_many_failures_in_a_row_are_an_error():
    script = lambda request, number: "x" if content(request) == "0" else Reply("out of order", status=500)  # noqa: E731
    seen = []
    with ChatServer(script) as server, pytest.raises(RunError, match=r"m at http.*: 10 failures in a row.*out of"):
        for key, answer in endpoint(server, retries=0, concurrency=1).ask(asking(*map(str, range(100)))):
            seen.append((key, answer.failure))
    assert seen == [("0", None)] + [(str(number), "gave_up") for number in range(1, 1 + IN_A_ROW)]
    assert len(server.log) == 1 + IN_A_ROW


def test_refusals_in_a_row_are_an_error_only_before_the_first_answer():
    script = lambda request, number: "x" if content(request) == "0" else Reply("not this", status=400)  # noqa: E731
    with ChatServer(script) as server:
        one = endpoint(server, concurrency=1)
        answers = [answer.failure for _, answer in one.ask(asking(*map(str, range(30))))]
        assert answers == [None] + ["refused"] * 29
        assert [answer.failure for _, answer in one.ask(asking(*map(str, range(30, 50))))] == ["refused"] * 20
        with pytest.raises(RunError, match="10 failures in a row, the last one: 400: not this"):
            list(endpoint(server).ask(asking(*map(str, range(1, 50)))))


@pytest.mark.parametrize("status", [401, 402, 404])
def test_a_wrong_key_or_model_is_an_error_at_once(status):
    script = lambda request, number: Reply(f"not with {KEY}", status=status)  # noqa: E731
    with (
        ChatServer(script) as server,
        pytest.raises(InputError, match=rf"m at .*/v1 answered {status}: not with <key>"),
    ):
        list(endpoint(server, concurrency=1).ask(asking("a", "b")))
    assert len(server.log) == 1


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", "wrong-secret\n")
    with ChatServer(lambda request, number: "x") as server:
        one = endpoint(server, key_variable="MY_KEY")
        with pytest.raises(InputError) as caught:
            list(one.ask(asking("a")))
        assert "wrong key: Bearer <key>" in str(caught.value)
        output = f"{caught.value} {one.settings()} {one.config} {one.name} {capfd.readouterr()}"
        assert "secret" not in output
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(InputError, match="MY_KEY is not set"):
            endpoint(server, key_variable="MY_KEY")
        monkeypatch.setenv("MY_KEY", "ключ")
        with pytest.raises(InputError, match="MY_KEY holds no API key: it has spaces or non-ASCII"):
            endpoint(server, key_variable="MY_KEY")
    with ChatServer(lambda request, number: "x", key=None) as server:
        assert [answer.text for _, answer in endpoint(server, key_variable=None).ask(asking("a"))] == ["x"]


def test_no_server(capsys):
    with ChatServer(lambda request, number: "x") as server:
        pass
    [(_, answer)] = endpoint(server, retries=1).ask(asking("a"))
    notes = capsys.readouterr().err
    assert notes.count("note: ") == 1 and "refused; try 2 follows in " in notes.lower()
    assert answer.failure == "gave_up" and "Connection error" in answer.error and "refused" in answer.error


def test_concurrency_and_order_of_requests():
    taken, written = [], []

    def requests():
        for request in asking(*map(str, range(30))):
            taken.append(len(written))
            yield request

    with ChatServer(lambda request, number: Reply(content(request), delay=0.02)) as server:
        for key, answer in endpoint(server, concurrency=4).ask(requests()):
            assert answer.text == key
            written.append(key)
    assert sorted(written, key=int) == [str(number) for number in range(30)]
    assert server.most_at_once == 4
    assert taken == [0] * 4 + list(range(1, 27))  # each request after the first four: one more answer is written


def test_closing_the_iterator_waits_for_no_answer_and_leaves_no_thread():
    def threads() -> int:
        return sum(thread.name == "endpoint" for thread in threading.enumerate())

    go = threading.Event()

    def script(request, number):
        if content(request) == "slow":
            go.wait(60)
        return "x"

    with ChatServer(script) as server:
        answers = endpoint(server, concurrency=3).ask(asking("a", "slow", "b", "c"))
        began = time.monotonic()
        assert next(answers)[1].text == "x" and threads() == 3
        answers.close()
        assert time.monotonic() - began < 10
        go.set()
        deadline = time.monotonic() + 30
        while threads() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert threads() == 0


def test_no_requests():
    with ChatServer(lambda request, number: "x") as server:
        assert list(endpoint(server).ask([])) == []
    assert server.log == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"concurrency": 0}, r"concurrency: Input should be greater than or equal to 1 \(got 0\)"),
        ({"concurrency": 1001}, r"concurrency: Input should be less than or equal to 1000 \(got 1001\)"),
        ({"model": ""}, "model: String should have at least 1 character"),
        ({"retries": -1}, r"retries: Input should be greater than or equal to 0 \(got -1\)"),
        ({"timeout": 0.0}, r"timeout: Input should be greater than 0 \(got 0.0\)"),
        ({"base_url": "127.0.0.1:8000"}, "must be an address"),
        ({"base_url": "https://me:secret@host/v1"}, "base_url holds a password"),
        ({"base_url": "https://host/v1?key=secret"}, "base_url holds a password"),
        ({"api_key": "secret"}, "unknown key api_key"),
        ({"extra": {"stream": True, "messages": []}}, "extra: messages, stream cannot be given"),
    ],
)
def test_wrong_settings(given, said):
    with pytest.raises(InputError, match=said) as caught:
        build_config(EndpointConfig, {"model": "m", **given}, source="teacher.yaml")
    assert "secret" not in str(caught.value)


# ---- fields of a request that the endpoint does not take ----


def test_a_reasoning_model_is_asked_without_the_fields_that_it_refuses(capfd):
    with ChatServer(reasoning_model("fine")) as server:
        one = endpoint(server, temperature=0, max_tokens=50, concurrency=3, retries=0)
        answers = [answer for _, answer in one.ask(asking(*map(str, range(20))))]
        assert [answer.text for answer in answers] == ["fine"] * 20
        assert server.log[-1][0].keys() == {"model", "messages", "max_completion_tokens"}
        assert server.log[-1][0]["max_completion_tokens"] == 50
        assert 22 <= len(server.log) <= 20 + 2 * 3  # the threads that began before the first answer find out, no other
        assert answers[-1].tries == 1 and max(answer.tries for answer in answers) == 3
        assert (one.settings()["temperature"], one.settings()["max_tokens"]) == (0, 50)  # what was asked for
    said = capfd.readouterr().err
    assert said == (
        f"note: {one.name} does not take max_tokens, temperature: max_tokens is sent as max_completion_tokens, "
        "temperature is not sent\n"
    )


@pytest.mark.parametrize(
    ("status", "body", "left_out"),
    [
        (400, {"error": {"message": "`temperature` is deprecated for this model."}}, {"temperature"}),
        (400, {"error": {"message": "invalid temperature: only 1 is allowed for this model"}}, {"temperature"}),
        (400, {"error": {"message": "UnsupportedParamsError: x don't support temperature=0.5. Only"}}, {"temperature"}),
        (400, {"error": {"message": "does not support parameters: ['temperature', 'seed']"}}, {"temperature", "seed"}),
        (400, [{"error": {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}}], {"seed"}),
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs"}]}, {"seed"}),
        (
            422,
            {"object": "error", "message": {"detail": [{"loc": ["body", "top_p"], "msg": "not permitted"}]}},
            {"top_p"},
        ),
        (400, {"error": {"message": "Unrecognized request argument supplied: seed"}}, {"seed"}),
    ],
)
def test_a_field_is_left_out_whatever_the_words(status, body, left_out):
    def script(request, number):
        return Reply(raw=json.dumps(body), status=status) if left_out & request.keys() else "fine"

    sent = {"model", "messages", "temperature", "max_tokens", "seed", "top_p"}
    with ChatServer(script) as server:
        one = endpoint(server, temperature=0.5, seed=1, extra={"top_p": 0.9}, concurrency=1)
        assert [answer.text for _, answer in one.ask(asking("a", "b"))] == ["fine", "fine"]
    assert [request.keys() for request, _, _ in server.log] == [sent, sent - left_out, sent - left_out]


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 8192. This model supports at most 4096 completion tokens.",
        "temperature must be at most 1",
        "This feature is not supported: response_format",
        "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
        "Unsupported parameter: 'max_completion_tokens'",
    ],
)
def test_another_refusal_leaves_the_fields_as_they_are(message, capfd):
    extra = {"response_format": {"type": "text"}, "top_p": 0.9}
    with ChatServer(lambda request, number: Reply(message, status=400)) as server:
        [(_, answer)] = endpoint(server, extra=extra).ask(asking("a"))
        assert (answer.failure, answer.error, len(server.log)) == ("refused", f"400: {message}", 1)
    assert capfd.readouterr().err == ""


def test_a_refusal_that_only_quotes_a_field_changes_no_later_request(capfd):
    quoting = "content not allowed: 'what temperature is it'"
    script = lambda request, number: no_field(quoting) if content(request) == "bad" else "fine"  # noqa: E731
    with ChatServer(script) as server:
        answers = dict(endpoint(server, concurrency=1).ask(asking("bad", "good")))
    assert (answers["bad"].failure, answers["good"].text) == ("refused", "fine")
    assert "temperature" in server.log[-1][0] and capfd.readouterr().err == ""


def test_extra_fields_replace_the_others_and_none_removes_them():
    extra = {"temperature": None, "max_completion_tokens": 9, "seed": 3, "think": {"budget": 5}}
    with ChatServer(lambda request, number: "x") as server:
        one = endpoint(server, temperature=1.0, seed=40, extra=extra)
        list(one.ask(asking("u")))
        sent = {key: value for key, value in server.log[0][0].items() if key != "messages"}
    assert sent == {"model": "m", "max_completion_tokens": 9, "seed": 3, "think": {"budget": 5}}
    assert one.settings()["extra"] == extra


# ---- replies ----


def replied(reply: Reply, **options) -> Answer:
    with ChatServer(lambda request, number: reply) as server:
        [(_, answer)] = endpoint(server, **{"retries": 0, **options}).ask(asking("u"))
    return answer


@pytest.mark.parametrize(
    ("message", "thought", "text"),
    [
        ({"reasoning_content": "so\n"}, "so", "fine"),
        ({"reasoning": "so"}, "so", "fine"),
        ({"reasoning": "so", "reasoning_content": None}, "so", "fine"),
        ({"reasoning": "so", "reasoning_details": [{"type": "reasoning.text", "text": "so"}]}, "so", "fine"),
        (
            {"reasoning_details": [{"type": "reasoning.text", "text": "s"}, {"summary": "o"}, {"data": "x"}]},
            "so",
            "fine",
        ),
        ({"reasoning_content": "<think>\nso\n</think>"}, "so", "fine"),
        ({"reasoning_content": "\ud800so"}, "?so", "fine"),
        ({"reasoning": {"effort": "low"}, "reasoning_content": ""}, None, "fine"),
        ({"content": None, "reasoning_content": "so"}, "so", ""),
        ({"content": [{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]}, None, "fine"),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}, {"text": "fine"}]},
            *("so", "fine"),
        ),
        ({"content": None, "refusal": "I cannot judge this."}, None, "I cannot judge this."),
        ({"content": None}, None, ""),
    ],
)
def test_a_thought_and_a_text_in_every_form(message, thought, text):
    answer = replied(Reply("fine", message=message))
    assert (answer.thought, answer.text, answer.error) == (thought, text, None)
    assert answer.full_text == (f"<think>\n{thought}\n</think>\n\n{text}" if thought else text)


@pytest.mark.parametrize("text", ["<think>\nso\n</think>\nfine", "so\n</think>\n\nfine"])
def test_a_thought_that_the_text_has_already_is_not_doubled(text):
    assert replied(Reply(text, message={"reasoning_content": "so\n"})).full_text == text


@pytest.mark.parametrize("reason", ["content_filter", "sensitive"])
def test_an_answer_that_a_filter_stopped_is_a_refusal(reason):
    answer = replied(Reply("<type>Ch", finish_reason=reason))
    assert (answer.failure, answer.text) == ("refused", "") and f"(finish_reason {reason})" in answer.error


@pytest.mark.parametrize(
    ("body", "failure", "said"),
    [
        ({"error": {"message": "not this", "code": 400}}, "refused", "400: not this"),
        (
            {"error": {"message": "busy", "code": 429, "metadata": {"raw": "z is full"}}},
            "gave_up",
            "429: busy: z is full",
        ),
        ({"error": {"message": "odd", "code": "weird"}}, "gave_up", "no chat completion ({'message': 'odd'"),
        (
            {"choices": [{"error": {"code": 502, "message": "died"}, "message": {"content": "h"}}]},
            "gave_up",
            "502: died",
        ),
        ({"choices": [{"finish_reason": "error", "message": {"content": "half"}}]}, "gave_up", "no chat completion"),
        ({"choices": None}, "gave_up", "no chat completion ({'choices': None})"),
        ({"choices": [{"message": {"content": {"text": "x"}}}]}, "gave_up", "no chat completion"),
    ],
)
def test_an_error_with_status_200(body, failure, said):
    answer = replied(Reply(raw=json.dumps(body)))
    assert (answer.failure, answer.text) == (failure, "") and said in answer.error


def test_a_wrong_key_with_status_200_is_an_error_at_once():
    with pytest.raises(InputError, match="answered 401: who are you; check the model"):
        replied(Reply(raw=json.dumps({"error": {"message": "who are you", "code": 401}})))


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens",
        "The input (9000 tokens) is longer than the model's context length (8192 tokens).",
        "the request exceeds the available context size. try increasing the context size",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
        "`inputs` tokens + `max_new_tokens` must be <= 4096.",
        "This model's maximum prompt length is 131072 but the request contains 200000 tokens.",
        "Please reduce the length of the messages or completion.",
    ],
)
def test_a_prompt_that_does_not_fit(message):
    assert replied(Reply(message, status=400)).failure == "too_long"
    assert (
        replied(Reply(raw=json.dumps({"error": {"code": "context_length_exceeded"}}), status=400)).failure == "too_long"
    )


def test_refusals_do_not_end_a_run_that_accepts_them():
    with ChatServer(lambda request, number: Reply("not this", status=400)) as server:
        found = [
            answer.failure for _, answer in endpoint(server, accept_refusals=True).ask(asking(*map(str, range(20))))
        ]
    assert found == ["refused"] * 20
