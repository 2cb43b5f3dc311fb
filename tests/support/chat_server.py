"""A server of the OpenAI chat protocol on 127.0.0.1 that follows a script: it answers, fails, delays or drops requests.

    with ChatServer(lambda request, number: Reply("hello") if number else Reply(status=503)) as server:
        ...  # base_url=server.url; the first request fails, the same one again is answered

The requests and replies are in `server.log`.
"""

import collections
import hashlib
import json
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789abcdef"  # the key that the server accepts; it must appear in no output


@dataclass(frozen=True)
class Reply:
    """The reply to one request. status: other than 200 replies with `text` as the error's message. delay: in seconds.
    raw: a body of any kind. message: fields of the answer's message besides `text`. drop: "before" closes the
    connection without a reply, "middle" inside the body."""

    text: str = ""
    status: int = 200
    delay: float = 0.0
    drop: str | None = None
    retry_after: str | None = None
    raw: str | None = None
    message: dict = field(default_factory=dict)
    finish_reason: str = "stop"
    tokens: tuple[int, int] = (100, 10)  # of the prompt, of the completion


class ChatServer:
    """`script(request, number)` returns a Reply, or a text; number: how many requests had the same messages before.

    request: the JSON body (model, messages, temperature, ...). The script runs in the thread of its request. log: a
    tuple (request, number, reply) for each, in the order of arrival. most_at_once: requests in flight.
    """

    def __init__(self, script, key: str | None = KEY):
        self.log, self.most_at_once, self._at_once = [], 0, 0
        self._script, self._key, self._lock = script, key, threading.Lock()
        self._asked = collections.Counter()
        self._server = _Quiet(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def reply(self, path: str, authorization: str, body: bytes) -> Reply:
        if path != "/v1/chat/completions":
            return Reply(f"no such route {path}", status=404)
        if self._key is not None and authorization != f"Bearer {self._key}":
            return Reply(f"wrong key: {authorization}", status=401)  # some endpoints repeat the key
        request = json.loads(body)
        asked = hashlib.sha256(json.dumps(request["messages"]).encode()).digest()
        with self._lock:
            number = self._asked[asked]
            self._asked[asked] += 1
        reply = self._script(request, number)
        reply = Reply(reply) if isinstance(reply, str) else reply
        with self._lock:
            self.log.append((request, number, reply))
        return reply

    def in_flight(self, change: int) -> None:
        with self._lock:
            self._at_once += change
            self.most_at_once = max(self.most_at_once, self._at_once)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # the client was killed
            super().handle_error(request, client_address)


def _handler(server: ChatServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            server.in_flight(1)
            try:
                length = int(self.headers["Content-Length"])
                body = self.rfile.read(length)
                if len(body) < length:
                    raise ConnectionError("the client was killed inside its request")
                reply = server.reply(self.path, self.headers.get("Authorization", ""), body)
                time.sleep(reply.delay)
                self._send(reply, json.loads(body))
            except (ConnectionError, TimeoutError):
                self.close_connection = True
            finally:
                server.in_flight(-1)

        def _send(self, reply: Reply, request: dict) -> None:
            if reply.drop == "before":
                return self._close()
            answered = _answer(reply, request) if reply.status == 200 else _error(reply)
            content = (json.dumps(answered) if reply.raw is None else reply.raw).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if reply.retry_after is not None:
                self.send_header("Retry-After", reply.retry_after)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if reply.drop == "middle" else content)
            if reply.drop == "middle":
                self._close()

        def _close(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_):
            pass

    return Handler


def _answer(reply: Reply, request: dict) -> dict:
    prompt, completion = reply.tokens
    message = {"role": "assistant", "content": reply.text, **reply.message}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def no_field(message: str, param: str | None = None, status: int = 400) -> Reply:
    """OpenAI's error for a field of the request."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": "unsupported_parameter"}
    return Reply(raw=json.dumps({"error": error}), status=status)


def reasoning_model(text: str):
    """A script that refuses `max_tokens` and any temperature, as OpenAI's reasoning models do."""

    def script(request, number):
        if "max_tokens" in request:
            advice = "Use 'max_completion_tokens' instead."
            said = f"Unsupported parameter: 'max_tokens' is not supported with this model. {advice}"
            return no_field(said, "max_tokens")
        if "temperature" in request:
            said = f"Unsupported value: 'temperature' does not support {request['temperature']} with this model."
            return no_field(f"{said} Only the default (1) value is supported.", "temperature")
        return text

    return script


def _error(reply: Reply) -> dict:
    return {"error": {"message": reply.text or f"scripted {reply.status}", "type": "scripted", "code": reply.status}}
