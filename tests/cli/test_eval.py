"""`rmr1 eval` with a judge of each kind, from command to summary, and `rmr1 compare` on what they leave."""

import json

import pytest
from chat_models import with_template
from chat_server import KEY, ChatServer
from policies import prefers, tiny_policy
from scalar_models import their_model, written

from rmr1_jax.cli.main import main
from rmr1_jax.prompts.prompt import Prompt, save_prompt

SCALAR_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ 'brief' }}{% endif %}"
)
PROMPT = Prompt(name="short", system=None, single_turn=("", "\nA: ", "\nB: ", "\nWhich?"), multi_turn=("", "\n", ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a prompt, a policy and a scalar reward model."""
    folder = tmp_path_factory.mktemp("judges")
    with (folder / "rows.jsonl").open("w") as file:
        for k in range(8):
            row = {"prompt": f"name {k}", "chosen": f"good wren {k}", "rejected": f"bad owl {k}", "id": k}
            file.write(json.dumps(row | {"subset": ("mt-bench-hard", "hep-java")[k % 2]}) + "\n")
    save_prompt(PROMPT, folder / "prompt.yaml")
    tiny_policy().save(folder / "policy")
    (folder / "scalar").mkdir()
    written(folder / "scalar", their_model())
    return folder


def evaluate(folder, out, *options, model):
    data = ["--data", str(folder / "rows.jsonl"), "--out", str(folder / out)]
    return main(["eval", "rewardbench", "--model", str(model), *data, "--dtype", "float32", *options])


def summary_of(folder, out):
    return json.loads((folder / out / "summary.json").read_text())


def test_eval_and_compare_with_a_policy_a_scalar_model_and_an_endpoint(folder, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompt = ("--prompt", str(folder / "prompt.yaml"))
    limits = ("--max-new-tokens", "12", "--both-orders", "--forced-budgets")
    assert evaluate(folder, "a", *prompt, *limits, model=folder / "policy") == 0
    assert evaluate(folder, "b", "--judge", "scalar", model=folder / "scalar") == 0
    with ChatServer(lambda request, number: prefers("good")(request["messages"][-1]["content"], number)) as server:
        options = ("--judge", "endpoint", "--base-url", server.url)
        assert evaluate(folder, "c", *options, model="somebody/judge-1") == 0
        asked = len(server.log)
        assert evaluate(folder, "c", *options, model="somebody/judge-1") == 0
        assert len(server.log) == asked == 8
    capsys.readouterr()

    policy, scalar, endpoint = (summary_of(folder, out) for out in "abc")
    assert [s["judge"] for s in (policy, scalar, endpoint)] == ["policy", "scalar", "judge-1"]
    assert [s["n"] for s in (policy, scalar, endpoint)] == [8, 8, 8]
    assert endpoint["headline"] == 100 and endpoint["interval"] == [pytest.approx(100 * 0.05 ** (1 / 8)), 100]
    assert policy["orders"] is not None and policy["budget_forced"] == policy["budget"]  # no text is that long
    assert scalar["budget"] == [] and scalar["tokens"] is None and scalar["votes"] is None
    rows = [json.loads(line) for line in (folder / "b/judgements.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["winner"] == "AB"[row["scores"][0] < row["scores"][1]] and row["texts"] == []
    right = sum(row["correct"] for row in rows)
    assert scalar["accuracy"] == pytest.approx(100 * right / 8)
    assert (folder / "b/reward_bench/score_result/main_score.json").is_file()

    assert main(["compare", str(folder / "b"), str(folder / "c"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["a"], found["b"], found["n"], found["only_b"]) == ("scalar", "judge-1", 8, 8 - right)
    assert main(["compare", str(folder / "b"), str(folder / "c")]) == 0
    assert "pairs in both: 8, only in A: 0, only in B: 0" in capsys.readouterr().out
    assert KEY not in "".join(f.read_text() for out in "abc" for f in (folder / out).rglob("*.json*"))


def test_sampling_options_and_template_arguments_reach_each_kind_of_judge(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    off = ("--chat-template-kwargs", '{"enable_thinking": false}')
    sampling = ("--temperature", "0.6", "--top-p", "0.9", "--min-p", "0.1")
    policy = with_template(folder / "policy", tmp_path / "policy")
    options = ("--prompt", str(folder / "prompt.yaml"), "--max-new-tokens", "4", "--limit", "2", *sampling, *off)
    assert evaluate(folder, "e", *options, model=policy) == 0
    drawing = {"temperature": 0.6, "top_p": 0.9, "min_p": 0.1, "chat_template_kwargs": {"enable_thinking": False}}
    settings = json.loads((folder / "e" / "judgements.jsonl.run.json").read_text())
    assert drawing.items() <= settings.items() and "top_k" not in settings

    scalar = with_template(folder / "scalar", tmp_path / "scalar", SCALAR_TEMPLATE)
    scored = [
        evaluate(folder, out, "--judge", "scalar", "--limit", "2", *more, model=scalar)
        for out, more in (("f", ()), ("g", off))
    ]
    assert scored == [0, 0]
    scores = [[json.loads(line)["scores"] for line in (folder / out / "judgements.jsonl").open()] for out in "fg"]
    assert len(scores[0]) == 2 and scores[0] != scores[1]

    with ChatServer(lambda request, number: prefers("good")(request["messages"][-1]["content"], number)) as server:
        options = ("--judge", "endpoint", "--base-url", server.url, "--limit", "2", *sampling, *off)
        assert evaluate(folder, "h", *options, model="judge-1") == 0
        assert drawing.items() <= server.log[0][0].items()


def test_incompatible_options_are_refused(folder, capsys):
    assert evaluate(folder, "d", "--judge", "scalar", "--forced-budgets", model=folder / "scalar") == 2
    assert "not --judge scalar" in capsys.readouterr().err
    assert evaluate(folder, "d", "--judge", "scalar", "--votes", "3", model=folder / "scalar") == 2
    assert "neither votes nor both orders" in capsys.readouterr().err
    assert evaluate(folder, "d", model=folder / "scalar") == 2
    assert "rmr1 eval --judge scalar" in capsys.readouterr().err
    assert main(["compare", str(folder), str(folder)]) == 2
    assert "judgements.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judge", "options", "reason"),
    [
        ("policy", ["--base-url", "http://127.0.0.1:8000/v1"], "give --judge endpoint, or leave it out"),
        ("policy", ["--extra", "top_p=0.9"], "give --judge endpoint, or leave it out"),
        ("policy", ["--accept-refusals"], "give --judge endpoint, or leave it out"),
        ("scalar", ["--top-k", "3"], "--judge scalar samples no text"),
        ("scalar", ["--concurrency", "2"], "--judge scalar samples no text"),
        ("endpoint", ["--generation-config"], "--judge endpoint loads no model here"),
        ("endpoint", ["--tensor", "2"], "--judge endpoint loads no model here"),
        ("endpoint", ["--slots", "8"], "--judge endpoint loads no model here"),
        ("endpoint", ["--max-prompt-tokens", "100"], "--judge endpoint loads no model here"),
    ],
)
def test_options_without_an_effect_are_refused(folder, judge, options, reason, capsys):
    """By `rmr1 judge` too, which knows no scalar judge; before anything is read or written."""
    rows = ("--input", str(folder / "none.jsonl"), "--output", str(folder / "none"))
    made = [evaluate(folder, "none", "--judge", judge, *options, model="m")]
    if judge != "scalar":
        made.append(main(["judge", "--judge", judge, "--model", "m", *rows, *options]))
    said = capsys.readouterr().err
    assert made == [2] * len(made) and said.count(f"error: {options[0]} ") == said.count(reason) == len(made), said
    assert not (folder / "none").exists()


def test_a_number_that_json_has_not_becomes_null(folder, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = [json.loads(line) | {"score": float("nan")} for line in (folder / "rows.jsonl").read_text().splitlines()]
    (folder / "nan.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(lambda request, number: prefers("good")(request["messages"][-1]["content"], number)) as server:
        options = ["--judge", "endpoint", "--base-url", server.url, "--model", "m", "--out", str(folder / "nan")]
        assert main(["eval", "rewardbench", "--data", str(folder / "nan.jsonl"), *options]) == 0
    written = [*(folder / "nan").rglob("*.json"), *(folder / "nan").rglob("*.jsonl")]
    assert len(written) > 3 and not any("NaN" in file.read_text() for file in written)
    judged = [json.loads(line) for line in (folder / "nan/judgements.jsonl").read_text().splitlines()]
    assert [row["meta"]["score"] for row in judged] == [None] * 8
