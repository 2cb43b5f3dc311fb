"""The client of a chat endpoint: retries where they help, clear errors where they do not, and no key in any output."""

import email.utils
import threading
import time

import pytest
from chat_server import KEY, ChatServer, Reply

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
    assert answers["long"] == Answer(tries=1, error="400: too many tokens", failure="refused")
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


def test_no_server():
    with ChatServer(lambda request, number: "x") as server:
        pass
    [(_, answer)] = endpoint(server, retries=1).ask(asking("a"))
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
    ],
)
def test_wrong_settings(given, said):
    with pytest.raises(InputError, match=said) as caught:
        build_config(EndpointConfig, {"model": "m", **given}, source="teacher.yaml")
    assert "secret" not in str(caught.value)
