"""Evaluations for the tests of the report."""

import json
from pathlib import Path

from run_directories import write_lines

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">\u2028\u200b<b>\u202e bold"
PLACES = ({"section": "Chat", "subset": "mt-bench-easy"}, {"section": "Safety", "subset": "donotanswer"})
SUMMARY = {
    "benchmark": "rewardbench",
    "judge": "some/judge-7B",
    "settings": {"votes": 1, "sampling": {"temperature": 0.0}},
    "n": 40,
    "items": 36,
    "scores": {"Chat": 0.9, "Chat Hard": 0.5, "avg_Result_each_section": 0.7},
    "headline": 70.0,
    "interval": [61.5, 78.25],
    "sections": [{"name": "Chat", "n": 20, "accuracy": 90.0, "interval": [80.0, 96.0]}],
    "invalid": 3,
    "too_long": 2,
    "ties": 1,
    "tokens": {"mean": 626.4, "p50": 580, "p99": 1171, "max": 2210},
    "by_kind": [{"name": "chat", "n": 20, "accuracy": 81.25, "interval": [None, None]}],
    "by_length": [],
    "by_position": [],
    "subsets": [],
    "budget": [
        {"tokens": 512, "n": 40, "score": 41.5, "accuracy": 40.0, "invalid": 40.0, "truncated": 50.0},
        {"tokens": 1024, "score": 66.5, "accuracy": 65.0, "invalid": 5.0, "truncated": 6.0},
    ],
    "budget_forced": [
        {"tokens": 512, "n": 40, "score": 61.5, "accuracy": 60.0, "invalid": 0.0, "truncated": 50.0},
        {"tokens": 2048, "score": 69.5, "accuracy": 68.0, "invalid": 0.0, "truncated": 1.0},
    ],
    "orders": {
        "pairs": 41,
        "n": 40,
        "consistency": 83.5,
        "first_position_share": 55.5,
        "accuracy_ab": 71.0,
        "accuracy_ba": 69.0,
    },
    "votes": {"k": 2, "by_k": [{"k": 1, "accuracy": 68.0}, {"k": 2, "accuracy": 70.0}], "confidence": []},
    "styles": {"chat": [[70, 60, 50], [80, 71, 66], [90, 85, None]]},
    "notes": ["Budgets: <b>texts</b> are cut."],
}


def trace(winner: str, said: str = "short words") -> str:
    return (
        "<type>Chat</type>\n<rubric>Tact.<justify>Asked for.</justify></rubric>\n"
        f"<eval>One says <quote_A>{said}</quote_A> and <quote_B>never written</quote_B> too</eval>\n"
        f"<answer>[[{winner}]]</answer>"
    )


def judgement(number: int, winner: str | None = "A", **changes) -> dict:
    """Returns row `number`: A is better; rows with even numbers are of section Chat, the others of Safety."""
    row = {
        "id": f"q{number}",
        "better": "A",
        "winner": winner,
        "status": "ok" if winner else "invalid",
        "correct": winner == "A",
        "votes": {"A": int(winner == "A"), "B": int(winner == "B"), "invalid": int(winner is None)},
        "question": f"Ask number {number}",
        "response_a": f"Some short words, number {number}",
        "response_b": "Others",
        "meta": {"benchmark": "rewardbench", "number": number} | PLACES[number % 2],
        "kind": "chat",
        "texts": [[trace(winner or "neither")]],
        "verdicts": [[winner]],
        "tokens": [[60]],
    }
    return row | changes


def make_evaluation(root: Path, rows: list[dict] | None = None, **changes) -> Path:
    """Writes an evaluation of 100 judgements: in every ten one without a verdict and one wrong, all others right."""
    named = {0: None, 5: "B"}
    rows = [judgement(i, named.get(i % 10, "A")) for i in range(100)] if rows is None else rows
    write_lines(root / "judgements.jsonl", rows)
    (root / "summary.json").write_text(json.dumps(SUMMARY | changes))
    return root
