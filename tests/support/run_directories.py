"""Run directories for the tests of the report, and the text that a reader of a page sees."""

import html
import json
import re
from pathlib import Path

CHAT = (
    "<type>Chat</type>\n<rubric> polite 3, short 2<justify> as asked</justify></rubric>\n"
    "<eval> polite<quote_A> please</quote_A> yes<quote_B> now</quote_B> no"
    "<summary_A> 5</summary_A><summary_B> 2</summary_B></eval>\n<answer>[[A]]</answer>"
)


REASONING = (
    "<type>Reasoning</type>\n<solution> a b c reversed gives c b a</solution>\n"
    "<eval><quote_A> c b a</quote_A><summary_A> right</summary_A></eval>\n<answer>[[A]]</answer>"
)


RESULTS = {
    "before": {"accuracy": 0.0, "reasoning": 0.0, "chat": 0.0, "tempted": 0.0, "valid": 0.0, "mean_tokens": 66.0},
    "sft": {"accuracy": 0.727, "reasoning": 0.741, "chat": 0.713, "tempted": 0.301, "valid": 1.0, "mean_tokens": 52.1},
    "grpo": {"accuracy": 0.86, "reasoning": 0.961, "chat": 0.759, "tempted": 0.84, "valid": 0.999, "mean_tokens": 52.4},
    "control": {"accuracy": 0.721, "reasoning": 0.75, "chat": 0.69, "tempted": 0.29, "valid": 1.0, "mean_tokens": 52.0},
    "seconds": {"sft": 125.2, "grpo": 166.3, "evaluation": 14.2},
    "seed": 7,
    "n": 1000,
    "notes": ["The teacher likes a confident opening & follows it."],
    "later_key": {"nested": [1, 2]},
}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(number: int, **changes) -> dict:
    row = {
        "id": f"q{number}",
        "stage": ("sft", "grpo")[number % 2],
        "kind": "chat",
        "task": "polite",
        "question": f"Ask number {number}",
        "response_a": "please do",
        "response_b": "now do",
        "better": "A",
        "winner": "A",
        "correct": True,
        "text": CHAT,
    }
    return row | changes


def make_run(root: Path, samples: list[dict] | None = None) -> Path:
    """Writes a run as the quickstart does: results, samples and configuration on top, metrics below."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "results.json").write_text(json.dumps(RESULTS))
    (root / "config.yaml").write_text("seed: 7\nname: '<b>bold</b>'\n")
    write_lines(root / "sft/metrics.jsonl", [{"step": i, "stage": "sft", "loss": 3 / (i + 1)} for i in range(40)])
    grpo = [{"step": i, "stage": "grpo", "accuracy": 0.7 + i / 400, "kl": i * 1e-4, "lr": 1e-4} for i in range(40)]
    write_lines(root / "grpo/metrics.jsonl", grpo)
    wrong = sample(3, winner="B", correct=False, text=CHAT.replace("[[A]]", "[[B]]"))
    reasoning = sample(4, kind="reasoning", task="reverse", text=REASONING)
    silent = sample(5, winner=None, correct=False, text=CHAT[:-30])
    write_lines(root / "samples.jsonl", samples or [sample(1), sample(2), wrong, reasoning, silent])
    return root


def words_of(page: str) -> str:
    """Returns the text of a page without tags, style and script, with single spaces."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))
