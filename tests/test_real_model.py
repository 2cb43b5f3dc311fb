"""scripts/real_model.py: no judged row is trained on, and its table counts what the judgements hold."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from policies import ScriptedPolicy, prefers

from rmr1_jax.eval.evaluate import NamedJudge, evaluate, load
from rmr1_jax.judge.judge import Judge

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "real_model.py"
TRACE = (
    "<type>Chat</type>\n<rubric>Accuracy\n<justify>It decides.</justify></rubric>\n<eval>The better one is it.</eval>\n"
    "<answer>[[A]]</answer>"
)


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("real_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pairs(path: Path, count: int) -> Path:
    rows = (
        {
            "id": k,
            "subset": "mt-bench-easy",
            "prompt": f"Question {k}?",
            "chosen": f"Good {k}.",
            "rejected": f"Bad {k}.",
        }
        for k in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_table(script, tmp_path, capsys):
    pairs = list(load("rewardbench", write_pairs(tmp_path / "rows.jsonl", 8)))
    scripts = {"before": prefers("nothing"), "after": lambda prompt, number: TRACE}
    for name in script.JUDGED:
        judge = Judge(ScriptedPolicy(scripts[name.split("_")[0]]), "cor", rule="eval")
        evaluate("rewardbench", NamedJudge(judge=judge, name=name), pairs, tmp_path / name)
    (tmp_path / "done").mkdir()
    for name in (*script.JUDGED, "sft"):
        (tmp_path / "done" / name).write_text("120\n")
    (tmp_path / "prompt.yaml").write_bytes(Path("rmr1_jax/prompts/named/cor.yaml").read_bytes())
    (tmp_path / "trained.jsonl").write_text(json.dumps({"context_messages": ["Another question?"]}))
    script.table(tmp_path, tmp_path / "trained.jsonl")
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    shown_first = sum(pair.better == "A" for pair in pairs)
    assert [line[2] for line in lines[2:6]] == ["0 of 8 (0% to 31%)"] * 2 + ["8 of 8 (69% to 100%)"] * 2
    assert [int(line[3].split()[0]) for line in lines[4:6]] == [shown_first] * 2
    assert lines[4][4] == f"{np.mean([len(TRACE)]):.0f}" and lines[4][5] == "2 |"

    (tmp_path / "trained.jsonl").write_text(json.dumps({"context_messages": ["Question 3?"]}))
    with pytest.raises(SystemExit, match="trained on"):
        script.table(tmp_path, tmp_path / "trained.jsonl")


def test_rows_that_are_trained_on_are_not_judged(script, tmp_path):
    rows = [{"id": k, "subset": f"s{k % 3}", "prompt": f'Grüße "{k}"?\nNow.'} for k in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The same questions inside a longer text, once as JSON with escapes and once without.
    inside = [json.dumps({"text": f"[Client]\n{rows[k]['prompt']} [/Client]"}, ensure_ascii=k == 1) for k in (1, 3)]
    (tmp_path / "trained.jsonl").write_text("\n".join(inside))
    script.held_out(tmp_path / "rows.jsonl", tmp_path / "trained.jsonl", 5, tmp_path / "out.jsonl")
    kept = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert kept == [0, 2, 4, 6, 5]  # one of each subset, then the next of each
