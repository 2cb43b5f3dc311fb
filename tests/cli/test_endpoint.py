"""The options of a judge behind an endpoint: `rmr1 judge --judge endpoint`, extra fields of requests, and refusals."""

import json

import pytest
from chat_server import KEY, ChatServer, Reply, reasoning_model
from policies import answer, prefers

from rmr1_jax.cli.endpoint import extra_fields
from rmr1_jax.cli.main import main
from rmr1_jax.errors import InputError


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for k in range(12):
            row = {"id": f"p{k}", "question": f"name {k}", "response_a": "good", "response_b": "bad", "better": "A"}
            file.write(json.dumps(row) + "\n")
    return tmp_path / "pairs.jsonl"


def judge(pairs, server, *options) -> int:
    where = ["--input", str(pairs), "--output", str(pairs.parent / "verdicts.jsonl")]
    return main(["judge", "--judge", "endpoint", "--model", "org/m", "--base-url", server.url, *where, *options])


def rows(pairs):
    return [json.loads(line) for line in (pairs.parent / "verdicts.jsonl").read_text().splitlines()]


def good(request, number):
    return prefers("good")(request["messages"][-1]["content"], number)


def test_refused_pairs_are_asked_again_by_the_same_command(pairs, capsys):
    state = {"refused": ("name 3\n", "name 7\n")}

    def script(request, number):
        text = request["messages"][-1]["content"]
        return Reply("filtered", status=403) if any(s in text for s in state["refused"]) else good(request, number)

    with ChatServer(script) as server:
        assert judge(pairs, server) == 1
        said = capsys.readouterr().err
        assert "no answer for 2 pairs (2 refused), for one of them ('p" in said and "403: filtered" in said
        assert len(rows(pairs)) == 10 and all(row["status"] == "ok" for row in rows(pairs))
        assert judge(pairs, server) == 1 and len(server.log) == 12 + 2
        state["refused"] = ()
        assert judge(pairs, server) == 0 and len(server.log) == 12 + 2 + 2
    assert [(row["id"], row["winner"], row["correct"]) for row in rows(pairs)] == [
        (f"p{k}", "A", True) for k in range(12)
    ]
    assert "12 pairs: 100.0% ok" in capsys.readouterr().out


def test_an_endpoint_that_refuses_all_ends_the_run_early_and_loses_nothing(pairs, capsys):
    state = {"down": True}
    script = lambda request, number: Reply("no", status=422) if state["down"] else good(request, number)  # noqa: E731
    with ChatServer(script) as server:
        assert judge(pairs, server, "--concurrency", "1") == 1 and len(server.log) == 10
        assert "10 failures in a row, the last one: 422: no; run the same command again" in capsys.readouterr().err
        state["down"] = False
        assert judge(pairs, server) == 0 and len(rows(pairs)) == 12


def test_refusals_that_are_accepted_have_rows(pairs, capsys):
    with ChatServer(lambda request, number: Reply("no", status=400)) as server:
        assert judge(pairs, server, "--accept-refusals") == 0
    assert "100.0% invalid" in capsys.readouterr().out
    assert {row["note"] for row in rows(pairs)} == {"1 texts were refused: 400: no"}


def test_the_settings_are_those_that_were_asked_for(pairs, capsys):
    with ChatServer(reasoning_model(answer("A"))) as server:
        assert judge(pairs, server, "--extra", "reasoning_effort=low", "--max-new-tokens", "99") == 0
        sent = server.log[-1][0]
        assert sent.keys() == {"model", "messages", "max_completion_tokens", "reasoning_effort"}
        assert (sent["max_completion_tokens"], sent["reasoning_effort"]) == (99, "low")
        assert capsys.readouterr().err.count("does not take") == 1
        settings = json.loads((pairs.parent / "verdicts.jsonl.run.json").read_text())
        assert (settings["temperature"], settings["max_tokens"]) == (0.0, 99)
        assert settings["extra"] == {"reasoning_effort": "low"} and settings["model"] == "org/m"
        asked = len(server.log)
        assert judge(pairs, server, "--extra", "reasoning_effort=low", "--max-new-tokens", "99") == 0
        assert len(server.log) == asked
        assert judge(pairs, server, "--extra", "reasoning_effort=high", "--max-new-tokens", "99") == 2
        assert "extra.reasoning_effort was 'low', is 'high'" in capsys.readouterr().err


def test_null_leaves_a_field_out(pairs):
    with ChatServer(good) as server:
        assert judge(pairs, server, "--extra", "temperature=null", "--extra", '{"top_p": 0.9, "n": {"m": [1]}}') == 0
        sent = server.log[0][0]
    assert "temperature" not in sent and (sent["top_p"], sent["n"]) == (0.9, {"m": [1]})


def test_extra_fields_are_json_where_they_are_json():
    given = ("a=1", "b=x=y", 'c={"d": null}', "e=NaN", '{"f": true, "a": 2}', "g=", 'h="1"', "i=null")
    assert extra_fields(given) == {
        **{"a": 2, "b": "x=y", "c": {"d": None}, "e": "NaN", "f": True, "g": "", "h": "1", "i": None}
    }
    for bad in ("top_p", "=1", "[1]"):
        with pytest.raises(InputError, match="expected KEY=VALUE"):
            extra_fields([bad])
