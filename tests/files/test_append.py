"""Files that grow row by row: a run of an earlier version can be resumed."""

import json

import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.files.append import append_rows, resume_rows


def test_settings_under_an_earlier_name_are_the_same_settings(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"id": 1}])
    (tmp_path / "rows.jsonl.run.json").write_text(json.dumps({"harmless": True, "votes": 1}))
    assert resume_rows(path, {"escape_untrusted": True, "votes": 1}, lambda row: row["id"], command="rmr1 judge") == [1]
    with pytest.raises(InputError, match="escape_untrusted was True, is False"):
        resume_rows(path, {"escape_untrusted": False, "votes": 1}, lambda row: row["id"], command="rmr1 judge")
