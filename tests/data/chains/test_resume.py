"""`rmr1 data chains` in a process that is killed or interrupted, with an endpoint that fails, delays and drops."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from chat_server import KEY, ChatServer, Reply
from teachers import better, chain, rows, write_pairs

from rmr1_jax.cli import main as cli
from rmr1_jax.prompts.verdict import other_side

PAIRS, AT_ONCE = 300, 8


def endpoint_script(n: int, stage: int, number: int) -> Reply:
    """The reply to request `number`, from 0, about pair n in this pass."""
    if n == 77:
        return Reply("your prompt was filtered", status=400)
    right = n % 4 != 0 if stage == 1 else n % 48 != 4
    words = "As the earlier attempt missed, A is right." if stage == 2 and n % 48 == 0 else "A is right."
    text = "[[B]]" if stage == 1 and n % 50 == 1 else chain(better(n) if right else other_side(better(n)), words)
    faults = (
        Reply("overloaded", status=503),
        Reply(drop="before"),
        Reply(text, drop="middle"),
        Reply("slow down", status=429, retry_after="0.05"),
        Reply(text, delay=0.3),
    )
    faulty = (n % 10 < 5 and number == 0) or (n % 10 == 0 and number == 1)
    return faults[n % 10] if faulty else Reply(text, delay=0.02)


def expected_states() -> dict[str, int]:
    counts = {"right_at_first": 0, "right_at_second": 0, "failed": 0}
    for n in range(PAIRS):
        good_at_first = n % 4 != 0 and n % 50 != 1
        failed = n == 77 or (n % 4 == 0 and n % 48 in (0, 4))
        counts["failed" if failed else "right_at_first" if good_at_first else "right_at_second"] += 1
    return counts


class Watch:
    """The endpoint's script. It also records requests whose answer was already in the file."""

    def __init__(self):
        self.answers, self.asked_again = None, []

    def __call__(self, request, number):
        text = request["messages"][-1]["content"]
        n, stage = int(re.search(r"question (\d+)\?", text)[1]), 2 if "[Note]" in text else 1
        written = self.answers.read_text() if self.answers.is_file() else ""
        if f'"id": "p{n}", "pass": {stage},' in written:
            self.asked_again.append((n, stage))
        return endpoint_script(n, stage, number)


def start(config) -> subprocess.Popen:
    command = [sys.executable, "-m", "rmr1_jax", "data", "chains", str(config)]
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # Background processes of a shell ignore SIGINT, and so do their children; the tests may run in one.
    restore_sigint = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, env=environment, preexec_fn=restore_sigint, **output)


def configured(path, pairs, out, url):
    # Some requests are filtered for good; a run that does not accept that ends with 1 and asks them again.
    side = f"{{model: m, base_url: '{url}', concurrency: {AT_ONCE}, backoff: 0.01, accept_refusals: true}}"
    path.write_text(f"pairs: {pairs}\nout: {out}\nteacher: {side}\nsecond: {side}\n")
    return path


@pytest.mark.slow
def test_killed_three_times(tmp_path):
    pairs, watch = write_pairs(tmp_path / "pairs.jsonl", PAIRS), Watch()
    with ChatServer(watch) as server:
        watch.answers = tmp_path / "out" / "answers.jsonl"
        config = configured(tmp_path / "chains.yaml", pairs, tmp_path / "out", server.url)
        for at_least in (60, 170, 330):  # rows; there are 300 in the first pass
            process = start(config)
            deadline = time.monotonic() + 120
            while (watch.answers.read_bytes().count(b"\n") if watch.answers.is_file() else 0) < at_least:
                assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if at_least == 170:
                with watch.answers.open("a") as file:  # as a kill in the middle of a write would leave it
                    file.write('{"id": "p299", "pass": 1, "te')
        process = start(config)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        after = len(server.log)
        assert start(config).wait(timeout=60) == 0 and len(server.log) == after  # no request is left
        log = list(server.log)
        watch.answers = tmp_path / "whole" / "answers.jsonl"
        server._asked.clear()
        config = configured(tmp_path / "whole.yaml", pairs, tmp_path / "whole", server.url)
        whole = start(config)
        assert whole.wait(timeout=300) == 0, whole.stdout.read()

    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    expected = expected_states()
    assert {name: ledger[name] for name in expected} == expected and sum(expected.values()) == ledger["read"] == PAIRS
    assert ledger["open"] == 0
    second = PAIRS - expected["right_at_first"]
    assert ledger["requests"] == PAIRS + second and [row["asked"] for row in ledger["attempts"]] == [PAIRS, second]
    # No request is sent after its answer was on the disk.
    assert watch.asked_again == []
    done = [reply for _, _, reply in log if (reply.status == 200 and not reply.drop) or reply.status == 400]
    assert PAIRS + second <= len(done) <= PAIRS + second + 3 * AT_ONCE  # requests in flight at a kill are repeated
    assert server.most_at_once <= AT_ONCE + 2  # including those of a process that was killed
    # The rows are in the order of the pairs, and equal those of an uninterrupted run.
    chains = tmp_path / "out" / "chains.jsonl"
    taken = [int(row["id"][1:]) for row in rows(chains)]
    assert taken == sorted(taken) and len(taken) == PAIRS - expected["failed"]
    assert chains.read_bytes() == (tmp_path / "whole" / "chains.jsonl").read_bytes()
    uninterrupted = json.loads((tmp_path / "whole" / "ledger.json").read_text())
    assert ledger | {"retries": 0} == uninterrupted | {"retries": 0}
    assert f"{PAIRS} pairs: {expected['right_at_first']} (" in output and "next:    rmr1 sft" in output
    assert KEY not in output + "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    print(f"\n{output[-700:]}\n{len(log)} requests reached the endpoint, {len(done)} of them answered")


@pytest.mark.slow
def test_interrupted(tmp_path):
    pairs, asked = write_pairs(tmp_path / "pairs.jsonl", 20), threading.Event()

    def script(request, number):
        if "question 7?" in request["messages"][-1]["content"]:
            asked.set()
            return Reply("x", delay=20)
        return chain("A")

    with ChatServer(script) as server:
        process = start(configured(tmp_path / "chains.yaml", pairs, tmp_path / "out", server.url))
        assert asked.wait(60)
        answers = tmp_path / "out" / "answers.jsonl"
        while not answers.is_file() or answers.read_bytes().count(b"\n") < 3:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command again" in output
    assert time.monotonic() - began < 10  # it does not wait for requests in flight
    counted = json.loads((tmp_path / "out" / "ledger.json").read_text())["requests"]
    assert 2 <= counted <= len(rows(answers)) <= counted + 1  # the interrupt may come between writing and counting


def test_the_command_reports_errors(tmp_path, capsys, monkeypatch):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 3)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ChatServer(lambda request, number: chain("A")) as server:
        config = configured(tmp_path / "chains.yaml", pairs, tmp_path / "out", server.url)
        assert cli.main(["data", "chains", str(config)]) == 2
        assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
        assert cli.main(["data", "chains", str(config)]) == 2
        assert "401: wrong key: Bearer <key>" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert cli.main(["data", "chains", str(config), "budget_requests=2"]) == 0
        assert "the budget is spent; to continue, run the same command with a larger one" in capsys.readouterr().out
        assert cli.main(["data", "chains", str(config)]) == 0
        assert "right at first" in capsys.readouterr().out
