"""The kinds of directories that a page takes, what it refuses, and how the file is written."""

from pathlib import Path

import pytest
from evaluations import make_evaluation
from run_directories import make_run, words_of

from rmr1_jax.cli import main as cli
from rmr1_jax.errors import InputError
from rmr1_jax.report.report import write_report


def page_of(*roots: Path) -> str:
    return write_report(roots, roots[0].parent / "report.html").read_text(encoding="utf-8")


def test_a_directory_without_a_run_says_what_was_expected(tmp_path):
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"empty: no run here\. Expected one of results\.json, metrics\.jsonl"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"nowhere: no such directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"is a directory; give the file to write"):
        write_report([make_run(tmp_path / "run")], tmp_path)
    with pytest.raises(InputError, match="no run directory given"):
        write_report([], tmp_path / "report.html")


def test_a_directory_of_several_runs_says_which_it_shows(tmp_path, capsys):
    for name in ("one", "two"):
        make_run(tmp_path / "all" / name)
    assert cli.main(["report", str(tmp_path / "all")]) == 0
    shown = capsys.readouterr().out.splitlines()[1]
    assert shown.startswith("shows:   ") and f"{tmp_path}/all/one" in shown and f"{tmp_path}/all/two" in shown
    assert cli.main(["report", str(tmp_path / "all/one")]) == 0
    assert "shows:" not in capsys.readouterr().out


def test_runs_and_evaluations_need_a_page_each(tmp_path):
    run, evaluation = make_run(tmp_path / "run"), make_evaluation(tmp_path / "evaluation")
    commands = f"rmr1 report {evaluation}, and rmr1 report {run}"
    with pytest.raises(InputError, match=rf"evaluation is an evaluation and run a training run; .* {commands}"):
        page_of(run, evaluation)
    make_evaluation(run / "eval")
    words = words_of(page_of(run))
    assert "run/eval: an evaluation, which has a page of its own" in words and "After GRPO" in words


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path):
    root = make_run(tmp_path / "run")
    (root / "results.json").write_text('{"note on \\ud800": "x \\udfff"}')
    assert "x \\udfff" in page_of(root)


def test_the_same_runs_give_the_same_bytes(tmp_path):
    root = make_run(tmp_path / "run")
    assert page_of(root) == page_of(root)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run"]  # no partial file is left
