"""Preference pairs for teachers, and the traces of a scripted teacher."""

import json


def chain(verdict: str, words: str = "A is right where B is not.") -> str:
    return (
        "<type>Chat</type>\n<rubric>1. Accuracy (100%)\n<justify>It matters.</justify></rubric>\n"
        f"<eval>{words}</eval>\n<answer>[[{verdict}]]</answer>"
    )


def better(number: int) -> str:
    return "AB"[number % 2]


def write_pairs(path, count: int):
    rows = (
        {"id": f"p{n}", "source": "odd" if n % 2 else "even", "question": f"question {n}?", "response_a": "a"}
        | {"response_b": "b", "better": better(n)}
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
