"""Writes one self-contained HTML file about training runs, evaluations or prepared sets.

Each kind of page has a module that reads the directories into the variables of its template. Texts in these
directories come from models and data sets and are not trusted: the templates escape everything, and the page's Content
Security Policy forbids any network access and any script except the page's own.

Read next: `training.py`, `evaluation.py`, `prepared.py`; `templates/page.html.j2`, the frame of every page.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from rmr1_jax.data.store import is_prepared
from rmr1_jax.errors import InputError
from rmr1_jax.files.write import to_json, write_whole, writing
from rmr1_jax.report.curves import PLOT
from rmr1_jax.report.evaluation import evaluation_page, find_evaluations
from rmr1_jax.report.prepared import prepared_page
from rmr1_jax.report.reading import find_holders, named_roots
from rmr1_jax.report.training import FILES, holds_run, training_page


def write_report(run_dirs: Sequence[Path], out: Path, *, max_traces: int = 48) -> Path:
    """Writes the report of one or several directories to the file `out` and returns `out`.

    A page shows training runs, evaluations or prepared sets. `out` is replaced as a whole; a failure leaves an earlier
    file as it was.

    Args:
        max_traces: the number of traces shown of a training run's samples file, chosen evenly over stage, kind and
            outcome. A page of evaluations holds all judgements.

    Raises:
        InputError: a directory does not exist or holds none of these, the directories are of different kinds, or a
            file is malformed (the message names file, line and field).
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: is a directory; give the file to write, for example {out / 'report.html'}")
    roots = named_roots(run_dirs)
    if any(is_prepared(root) for _, root in roots):
        return _render("prepared.html.j2", prepared_page(roots), out)
    evaluated = {name: found for name, root in roots if (found := find_evaluations(root))}
    trained = [name for name, root in roots if name not in evaluated or holds_run(root)]
    if not trained:
        return _render("evaluation.html.j2", evaluation_page(roots, evaluated), out)
    alone = [name for name in evaluated if name not in trained]
    if alone:
        raise InputError(
            f"{alone[0]} is an evaluation and {trained[0]} a training run; a page shows one kind. Make two: "
            f"rmr1 report {_paths(roots, alone)}, and rmr1 report {_paths(roots, trained)}"
        )
    return _render("training.html.j2", training_page(roots, evaluated, max_traces=max_traces), out)


def found_below(run_dirs: Sequence[Path]) -> list[Path]:
    """Returns the runs and evaluations that a page shows because they lie in a directory that is none itself."""
    found: list[Path] = []
    for root in map(Path, run_dirs):
        parts = [*find_evaluations(root), *find_holders(root, FILES)]
        found += [] if root in parts else parts
    return list(dict.fromkeys(found))


def _paths(roots: Sequence[tuple[str, Path]], names: Sequence[str]) -> str:
    """Returns the paths of the named directories as words of a command."""
    return shlex.join(str(path) for name, path in roots if name in names)


def _render(template: str, variables: Mapping[str, Any], out: Path) -> Path:
    """Renders the page into `out` piece by piece, because the page of a whole benchmark may be large."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_function"] = to_json  # of the filter tojson
    environment.globals["plot"] = PLOT
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    pieces = environment.get_template(template).generate(variables)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    # JSON strings may hold a lone surrogate, which UTF-8 cannot encode.
    write_whole(out, (piece.encode("utf-8", "backslashreplace").decode() for piece in pieces))
    return out
