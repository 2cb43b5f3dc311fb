"""Training rows in the published format, and our own fields of them: id, source, better, and the rest as meta."""

import json

import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.rows import ReadReport
from rmr1_jax.pairs.training_sets import read_published

MESSAGES = [{"role": "user", "content": "Which?"}]
SIDE = {"context_messages": MESSAGES, "winner": "model_b"}
TRACE = {"context_messages": MESSAGES, "winner": "<answer>[[A]]</answer>"}


def written(path, *made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def test_the_published_fields_alone(tmp_path):
    side, trace = read_published(written(tmp_path / "rows.jsonl", SIDE, TRACE))
    assert (side.id, side.source, side.meta, side.better, side.trace) == ("rows-0", "", {}, "B", None)
    assert (trace.id, trace.better, trace.trace) == ("rows-1", None, "<answer>[[A]]</answer>")


def test_our_own_fields(tmp_path):
    row = TRACE | {"id": 7, "source": "math", "better": "A", "pass": 2}
    [found] = read_published(written(tmp_path / "rows.jsonl", row))
    assert (found.id, found.source, found.better, found.trace) == ("7", "math", "A", "<answer>[[A]]</answer>")
    assert found.meta == {"better": "A", "pass": 2}
    nulls = SIDE | {"id": None, "source": None, "better": None}
    assert next(read_published(written(tmp_path / "rows.jsonl", nulls))).id == "rows-0"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([SIDE | {"id": "x"}, SIDE | {"id": "x"}], r"rows\.jsonl:2: field 'id' is 'x' a second time"),
        ([SIDE, SIDE | {"id": "rows-0"}], "'rows-0' a second time"),
        ([SIDE | {"id": ""}], "field 'id' is empty"),
        ([SIDE | {"id": [1]}], "field 'id' is a list of 1"),
        ([SIDE | {"source": 3}], "field 'source' is 3"),
        ([SIDE | {"better": "C"}], "field 'better' is 'C', expected 'A', 'B' or null"),
        ([SIDE | {"better": ["A"]}], r"field 'better' is \['A'\]"),
        ([SIDE | {"better": "A"}], "field 'better' is 'A', but winner is 'model_b'"),
        ([SIDE | {"winner": " \n"}], "field 'winner' is empty"),
        ([SIDE | {"winner": "model_c"}], "field 'winner' is 'model_c'"),
        ([SIDE | {"context_messages": []}], "must end with a message whose role is 'user'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_rows_are_placed_or_set_aside(tmp_path, rows, message):
    path = written(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(InputError, match=message):
        list(read_published(path))
    report = ReadReport()
    settings = {"rejects": tmp_path / "rejects", "report": report}
    assert len(list(read_published(path, **settings))) == len(rows) - 1
    assert (report.read, report.rejected) == (len(rows), 1)


def test_several_paths_are_numbered_on(tmp_path):
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "a.jsonl", SIDE, SIDE)
    written(tmp_path / "folder" / "b.jsonl", SIDE)
    one = written(tmp_path / "a.jsonl", TRACE, TRACE)
    ids = [row.id for row in read_published([tmp_path / "folder", one])]
    assert ids == ["a-0", "a-1", "b-2", "a-3", "a-4"]
    with pytest.raises(InputError, match="lies in the source"):
        read_published([one, tmp_path / "folder"], rejects=tmp_path / "folder" / "r.jsonl")
