"""One self-contained HTML file about training runs or evaluations; here, the runs: results, curves, traces, settings.

What runs hold is read by `report_runs.py`, what curves look like is worked out by `report_curves.py`, and how all of it
is shown is in `report.html.j2`. Traces come from a model and are not trusted: the template escapes everything, and the
page's own policy forbids it any network access and any script but the one it came with.

Read next: `report.html.j2`; for evaluations, `report_eval.py`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from rmr1_jax.data.store import is_prepared
from rmr1_jax.errors import InputError
from rmr1_jax.files.write import write_whole, writing
from rmr1_jax.report.evaluation import Compare, eval_view, find_evaluations
from rmr1_jax.report.prepared import data_view
from rmr1_jax.report.reading import named_roots
from rmr1_jax.report.training import Page, find_parts, holds_run


def write_report(run_dirs: Sequence[Path], out: Path, *, max_traces: int = 48, compare: Compare | None = None) -> Path:
    """Writes the report of one or several directories to the file `out` (replaced whole, never half-written).

    Evaluations get the page of `report_eval.py`, with every judgement in it; `compare(first, second)` adds what it says
    of two of them. Training runs get curves and traces: of a samples file with more than `max_traces` rows, that many
    are shown, spread evenly over stage, kind and outcome. Prepared sets get that of `report_data.py`. Returns `out`.

    Raises:
      InputError: a directory that is absent or holds neither, directories of both kinds, or a file in one that is
        malformed (file, line, field).
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: is a directory; give the file to write, for example {out / 'report.html'}")
    roots = named_roots(run_dirs)
    if any(is_prepared(root) for _, root in roots):
        return _render("prepared.html.j2", data_view(roots), out)
    evaluated = {name: found for name, root in roots if (found := find_evaluations(root))}
    trained = [name for name, root in roots if name not in evaluated or holds_run(root)]
    if not trained:
        return _render("evaluation.html.j2", eval_view(roots, evaluated, compare), out)
    alone = [name for name in evaluated if name not in trained]
    if alone:
        raise InputError(
            f"{alone[0]} is an evaluation and {trained[0]} a training run; a page shows one kind. Make two: "
            f"rmr1 report {' '.join(alone)}, and rmr1 report {' '.join(trained)}"
        )
    page = Page(max_traces=max_traces)
    for name, root in roots:
        page.runs.append(name)
        for part in find_parts(root):
            page.add(name, part.relative_to(root).parts, part)
        for path in evaluated.get(name, ()):
            page.warnings.append(f"{path}: an evaluation, which has a page of its own: rmr1 report {path}")
    return _render("training.html.j2", page.view(), out)


def _render(template: str, view: dict[str, Any], out: Path) -> Path:
    """Writes the page piece by piece, for one of a whole benchmark may be large."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    pieces = environment.get_template(template).generate(view)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    # JSON may hold half a surrogate pair, UTF-8 may not.
    write_whole(out, (piece.encode("utf-8", "backslashreplace").decode() for piece in pieces))
    return out
