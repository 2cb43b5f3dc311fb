"""JSON that every reader takes: NaN and the infinities, which Python reads and writes, become null."""

import json
import math

import numpy as np
import pytest

from rmr1_jax.files.append import append_rows
from rmr1_jax.files.write import to_json


def strict(text: str):
    """Parse JSON as other readers do, which take no NaN and no Infinity."""

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_json_has_not_are_null(tmp_path, number):
    row = {"a": number, "b": [number, 1.5, {"c": (number, "NaN")}], "d": None}
    expected = {"a": None, "b": [None, 1.5, {"c": [None, "NaN"]}], "d": None}
    assert strict(to_json(row)) == expected
    append_rows(tmp_path / "rows.jsonl", [{"plain": 1}, row])
    assert [strict(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [{"plain": 1}, expected]


def test_other_values_are_written_as_before():
    row = {"ä": [1, 2.0, True, None, "Infinity"], "b": {"c": "\ud800"}}
    assert to_json(row) == json.dumps(row)
    assert to_json({**row, "n": math.nan}, ensure_ascii=False, indent=1) == json.dumps(
        {**row, "n": None}, ensure_ascii=False, indent=1
    )
    with pytest.raises(TypeError):
        to_json({"n": math.nan, "x": object()})
