"""`rmr1 judge`: one question, the reasons why there is no verdict, texts read again, and the defaults that it finds."""

import io
import json
from pathlib import Path

import pytest
from policies import ScriptedPolicy, answer

from rmr1_jax.cli import main as cli
from rmr1_jax.prompts.prompt import get_prompt, save_prompt
from rmr1_jax.quickstart.world import world_prompt

LONG = "<eval>" + "because " * 40  # longer than the limit of the commands below
TEXTS = {
    "fine": answer("A"),
    "bare": "[[A]]",
    "cut": LONG,
    "both": "Either <answer>[[A]]</answer> or <answer>[[B]]</answer>",
    "outline": "<answer>[[A or B]]</answer>",
    "long": "never asked",
}
QUESTION = "which of them is it"


def script(prompt: str, number: int) -> str:
    """The text of the pair whose name is in answer A."""
    return next((text for name, text in TEXTS.items() if f"name:{name}" in prompt), answer("A"))


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """A directory with a model whose texts are scripted, a file of pairs, and the policies that commands loaded."""
    loaded = []

    def load(model, dtype, **options):
        policy = ScriptedPolicy(script)
        policy.directory, policy.dtype = model, "float32" if dtype == "auto" else dtype
        loaded.append(policy)
        return policy

    monkeypatch.setattr("rmr1_jax.policy.load", load)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for name in TEXTS:
            more = "x" * 19_800 * (name == "long")
            row = {"id": name, "question": QUESTION, "response_a": f"name:{name}{more}", "response_b": "other"}
            file.write(json.dumps(row | {"better": "A"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return loaded


def run(capsys, *argv: str, code: int = 0) -> tuple[str, str]:
    """Run `rmr1 judge` and return what it prints on stdout and stderr."""
    assert cli.main(["judge", *argv]) == code
    return tuple(capsys.readouterr())


def judge_pairs(capsys, *argv: str) -> tuple[str, str]:
    limits = ("--max-new-tokens", "200", "--output", "v.jsonl")
    return run(capsys, "--model", "model", "--input", "pairs.jsonl", *limits, *argv)


def rows(path="v.jsonl"):
    with open(path) as file:
        return {row["id"]: row for row in map(json.loads, file)}


def settings(path):
    return json.loads(Path(f"{path}.run.json").read_text())


def test_each_pair_says_why_it_has_no_verdict_and_the_last_lines_what_helps(scripted, capsys):
    out, err = judge_pairs(capsys)
    found = rows()
    assert {name: row.get("reason") for name, row in found.items()} == {
        "fine": None,
        "bare": "other_form",
        "cut": "cut_off",
        "both": "several_verdicts",
        "outline": "no_verdict",
        "long": None,
    }
    assert found["cut"]["reasons"] == [["cut_off"]] and found["cut"]["finish_reasons"] == [["length"]]
    assert found["cut"]["tokens"] == [[200]] and found["bare"]["tokens"] == [[5]]
    lines = out.splitlines()
    assert lines[0].startswith("6 pairs: 16.7% ok, 0.0% tie, 66.7% invalid, 16.7% too long; accuracy 16.7% of 6")
    tokens = found["long"]["prompt_tokens"]
    for line in (
        "  1 cut off at 200 tokens: raise --max-new-tokens",
        "  1 bare [[A]] or [[B]], which the rule strict does not read: --rule eval reads them (finished texts too: "
        "rmr1 judge --reread FILE --rule eval)",
        f"  1 too long (up to {tokens} tokens, the limit is 19800): raise --max-prompt-tokens, lower --max-new-tokens "
        "if the model has no more positions, or give a --prompt with a shorter instruction",
    ):
        assert line in lines
    assert any(line.startswith("  1 with verdicts for both answers") for line in lines)
    assert any(line.startswith("  1 without a verdict") for line in lines)
    assert lines[-2:] == ["written: v.jsonl", "next:    rmr1 report v.jsonl"]
    assert "warning" not in err


def test_no_verdict_at_all_is_a_warning(scripted, capsys, monkeypatch):
    monkeypatch.setitem(TEXTS, "fine", "[[A]]")
    _, err = judge_pairs(capsys)
    assert err.splitlines()[-1] == "warning: none of the 6 pairs has a verdict, so nothing is measured"


def test_finished_texts_are_read_again_without_the_model(scripted, capsys):
    judge_pairs(capsys)
    count = len(scripted)
    out, _ = run(capsys, "--reread", "v.jsonl", "--rule", "eval")
    assert out.startswith("6 pairs: 33.3% ok, 0.0% tie, 50.0% invalid, 16.7% too long; accuracy 33.3% of 6\n")
    assert "1 cut off at 200 tokens" in out and "bare" not in out
    out, _ = run(capsys, "--reread", "v.jsonl", "--rule", "eval", "--output", "again.jsonl")
    assert out.splitlines()[-1] == "next:    rmr1 report again.jsonl" and len(scripted) == count
    judge_pairs(capsys, "--rule", "eval", "--output", "eval.jsonl")
    assert rows("again.jsonl") == rows("eval.jsonl")  # as the rule reads them when they are made
    assert settings("again.jsonl")["rule"] == "eval"
    run(capsys, "--reread", "v.jsonl", "--output", "again.jsonl")  # its own output is replaced
    assert rows("again.jsonl") == rows()
    _, err = run(capsys, "--reread", "v.jsonl", "--output", "eval.jsonl", code=2)
    assert "eval.jsonl exists, and `rmr1 judge --reread` did not make it" in err


def test_rows_of_earlier_versions_are_read_again_where_their_texts_allow(scripted, capsys, tmp_path):
    votes = {"A": 0, "B": 0, "invalid": 1}
    old = [
        {"id": "1", "winner": None, "status": "invalid", "votes": votes, "text": "[[A]]", "correct": False},
        {"id": "2", "winner": "B", "status": "ok", "votes": votes | {"B": 3}, "text": answer("B"), "correct": True},
        {"id": "3", "winner": "A", "status": "ok", "votes": {"A": 1, "B": 0, "invalid": 0}, "text": answer("A"),
         "correct": False},
    ]  # fmt: skip
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    out, _ = run(capsys, "--reread", "old.jsonl", "--rule", "eval", "--output", "new.jsonl")
    assert out.startswith("3 pairs: 100.0% ok, 0.0% tie, 0.0% invalid, 0.0% too long; accuracy 50.0% of 2\n")
    assert rows("new.jsonl")["1"]["winner"] == "A" and "correct" not in rows("new.jsonl")["1"]
    assert rows("new.jsonl")["2"] == old[1]  # one of several texts is not enough


def test_one_question_prints_the_trace_and_the_verdict(scripted, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nelsewhere"))
    out, _ = run(capsys, "--model", "model", QUESTION, "five", "six")
    assert out == "<eval>because</eval>\n<answer>[[A]]</answer>\nverdict: A\n"
    out, _ = run(capsys, "--model", "model", QUESTION, "-", "six", "--output", "one.jsonl")
    assert "verdict: A" in out
    (row,) = rows("one.jsonl").values()
    assert row["response_a"] == "from\nelsewhere" and row["response_b"] == "six" and "better" not in row
    out, _ = run(capsys, "--model", "model", QUESTION, "name:bare", "six")
    assert out.splitlines()[:2] == ["[[A]]", "no verdict"] and "--rule eval reads them" in out
    out, _ = run(capsys, "--model", "model", QUESTION, "five", "six", "--votes", "3", "--both-orders")
    assert "tie (A 3, B 3, invalid 0)" in out
    out, _ = run(capsys, "--model", "model", QUESTION, "same", "same")
    assert out == "tie; the two answers are the same\n"


def test_colours_are_for_terminals_and_control_characters_never_reach_one(scripted, capsys, monkeypatch):
    monkeypatch.setitem(TEXTS, "fine", "<eval><quote_A>\x1b[2Jfive\r</quote_A></eval>\n<answer>[[A]]</answer>")
    monkeypatch.setattr("rmr1_jax.cli.trace.sys.stdout.isatty", lambda: True, raising=False)
    command = ("--model", "model", QUESTION, "name:fine", "six")
    out, _ = run(capsys, *command)
    assert "\x1b[34m\ufffd[2Jfive\ufffd\x1b[0m" in out and "verdict: \x1b[1;34mA\x1b[0m" in out
    monkeypatch.setenv("NO_COLOR", "1")
    out, _ = run(capsys, *command)
    assert "\x1b" not in out and "verdict: A" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a question and two answers, or --input FILE, or --reread FILE"),
        (["q", "a", "b"], "--model is missing"),
        (["--model", "m", "q", "a"], "2 texts are given; expected three, each in quotation marks"),
        (["--model", "m", "q", "-", "-"], "- stands for several texts"),
        (["--model", "m", "--input", "pairs.jsonl"], "--output is missing"),
        (["--model", "m", "q", "a", "b", "--input", "x"], "not texts and input together"),
        (["--model", "m", "--input", "pairs.jsonl", "--output", "v", "--limit", "0"], "--limit 0: expected at least 1"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(scripted, capsys, argv, message):
    _, err = run(capsys, *argv, code=2)
    assert message in err and err.count("\n") == 1 and not scripted


def test_a_limit_is_spread_over_the_file_and_a_later_run_judges_the_rest(scripted, capsys):
    out, _ = judge_pairs(capsys, "--limit", "2")
    assert out.startswith("2 pairs") and list(rows()) == ["fine", "both"]
    judge_pairs(capsys)
    assert list(rows()) == list(TEXTS)


def test_rows_hold_the_texts_of_the_pair_unless_they_are_left_out(scripted, capsys):
    judge_pairs(capsys)
    assert rows()["bare"]["response_a"] == "name:bare" and rows()["bare"]["question"] == QUESTION
    judge_pairs(capsys, "--no-texts", "--output", "short.jsonl")
    assert not {"question", "response_a", "response_b"} & rows("short.jsonl")["bare"].keys()


def test_the_models_own_prompt_is_taken_and_named(scripted, capsys, tmp_path):
    _, err = judge_pairs(capsys)
    assert "prompt: cor; the model has no prompt.yaml (--prompt gives another)" in err
    old = Path("v.jsonl").read_text()
    save_prompt(world_prompt(), tmp_path / "model" / "prompt.yaml")
    _, err = judge_pairs(capsys)  # rows that were made with the default of then are continued with it
    assert "prompt: cor, as in the rows that are continued" in err and Path("v.jsonl").read_text() == old
    _, err = judge_pairs(capsys, "--output", "own.jsonl")
    assert "model/prompt.yaml, the model's own (--prompt gives another)" in err
    assert settings("own.jsonl")["prompt"] == world_prompt().identity
    _, err = judge_pairs(capsys, "--output", "given.jsonl", "--prompt", "compare")
    assert "prompt:" not in err
    assert settings("given.jsonl")["prompt"] == get_prompt("compare").identity


def test_rows_that_were_made_in_another_data_type_are_continued_with_it(scripted, capsys):
    judge_pairs(capsys, "--dtype", "bfloat16", "--limit", "2")
    judge_pairs(capsys)
    assert [policy.dtype for policy in scripted] == ["bfloat16", "bfloat16"]
    judge_pairs(capsys, "--output", "new.jsonl")
    assert settings("new.jsonl")["dtype"] == "float32"


def test_a_report_on_a_file_of_any_name(scripted, capsys, tmp_path):
    judge_pairs(capsys, "--output", "out/mine.jsonl")
    assert cli.main(["report", "out/mine.jsonl"]) == 0
    assert capsys.readouterr().out == "written: out/mine.html\n"
    page = (tmp_path / "out" / "mine.html").read_text()
    assert "mine.jsonl" in page and QUESTION in page
    assert cli.main(["report", "out"]) == 0  # the files of `rmr1 judge` in a directory
    assert QUESTION in (tmp_path / "out" / "report.html").read_text()
    judge_pairs(capsys, "--output", "plain/verdicts.jsonl")  # the name of a file of training runs
    assert cli.main(["report", "plain"]) == 0
    assert QUESTION in (tmp_path / "plain" / "report.html").read_text()
