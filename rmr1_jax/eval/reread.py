"""Read the verdicts from finished texts again, by another rule and without the model.

Next: `judge/rows.read_again`, which does it for a row; `evaluate.score_logs`, for the logs of a benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmr1_jax.errors import InputError
from rmr1_jax.eval.logs import checked_row, settings_of, whole_rows
from rmr1_jax.files.append import settings_file
from rmr1_jax.files.write import to_json, write_whole, writing
from rmr1_jax.judge.rows import read_again
from rmr1_jax.judge.summary import Outcome, Summary

_MADE_BY = "rmr1 judge --reread"


def reread(file: Path, rule: str, output: Path | None = None) -> Summary:
    """Count the verdicts that `rule` reads from the texts in a file of `rmr1 judge` or `rmr1 eval`.

    Rows without texts count as they stand. output: the JSONL file to write the rows to, with the new verdicts; the
    settings beside it name the rule.

    Raises:
        InputError: the file cannot be read, a row is malformed, or `output` was not made by an earlier call. RunError:
            `output` cannot be written.
    """
    summary = Summary.of(map(Outcome.of, _rows(file, rule)))  # before anything is written: a row may be malformed
    if output is None:
        return summary
    if output.exists() and settings_of(output).get("made_by") != _MADE_BY:
        raise InputError(f"{output} exists, and `{_MADE_BY}` did not make it; give another --output")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, (to_json(row) + "\n" for row in _rows(file, rule)))
        settings = {**settings_of(file), "rule": rule, "made_by": _MADE_BY, "texts": file.name}
        write_whole(settings_file(output), json.dumps(settings, indent=2) + "\n")
    return summary


def _rows(file: Path, rule: str) -> Iterator[dict[str, Any]]:
    for row in whole_rows(file):
        checked_row(row)
        yield read_again(row.value, rule)
