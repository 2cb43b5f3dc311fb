"""Mistakes in the words of a command line: one line each, which names what was meant."""

import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import pytest

import rmr1_jax
from rmr1_jax.cli import main as cli


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("jugde", "rmr1 has no command 'jugde'; did you mean judge?"),
        ("nonsense", "rmr1 has no command 'nonsense'; its commands are quickstart, sft, "),
        ("data mxi", "rmr1 data has no command 'mxi'; did you mean mix?"),
        ("--versoin", "rmr1 has no option --versoin; did you mean --version?"),
        ("judge --model m --input f --outptu o", "rmr1 judge has no option --outptu; did you mean --output?"),
        ("judge --outptu=o", "rmr1 judge has no option --outptu; did you mean --output?"),
        ("judge --modle x", "rmr1 judge has no option --modle; did you mean --model?"),
        ("judge --temp 1", "rmr1 judge has no option --temp; did you mean --temperature?"),
        ("judge --max_new_tokes 1", "rmr1 judge has no option --max_new_tokes; did you mean --max-new-tokens?"),
        ("judge --data f", "rmr1 judge has no option --data; `rmr1 judge --help` describes the options"),
        ("judge --quux 1", "rmr1 judge has no option --quux; `rmr1 judge --help` describes the options"),
        ("data show f --modle m", "rmr1 data show has no option --modle; did you mean --model?"),
        ("sft c.yaml --model X", "rmr1 sft takes settings as KEY=VALUE: write model=X"),
        ("sft c.yaml --model=X", "rmr1 sft takes settings as KEY=VALUE: write model=X"),
        ("sft c.yaml --learning-rate 1e-3", "rmr1 sft takes settings as KEY=VALUE: write optimizer.lr=1e-3"),
        ("grpo c.yaml --sampling.n 8", "rmr1 grpo takes settings as KEY=VALUE: write sampling.n=8"),
        ("data prepare c.yaml --max-length 9", "rmr1 data prepare takes settings as KEY=VALUE: write max_length=9"),
        ("sft c.yaml --quuux X", "rmr1 sft has no option --quuux; "),
        ("plan c.yaml --topolgy v5e:2x2", "rmr1 plan has no option --topolgy; did you mean --topology?"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_was_meant(words, line, capsys):
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1, err


def test_a_known_option_is_no_mistake(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", "--max_new_tokens=5"])  # tyro takes both spellings, and misses the required options
    assert left.value.code == 2 and "--model" in capsys.readouterr().err


def test_the_version(capsys):
    assert rmr1_jax.__version__ == version("rmr1-jax")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rmr1 {version('rmr1-jax')}\n"


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch, capsys):
    monkeypatch.setattr(
        "importlib.metadata.distribution", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name))
    )
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == "rmr1 0+unknown\n"


@pytest.mark.parametrize("words", [["sft"], ["grpo"], ["data", "prepare"], ["data", "mix"], ["data", "chains"]])
def test_help_describes_every_setting_without_the_libraries_that_it_needs(words):
    code = f"import sys, rmr1_jax.cli.main as c\ntry: c.main({[*words, '--help']})\nfinally: print(*sys.modules)"
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and time.perf_counter() - start < 10
    *text, modules = out.stdout.splitlines()
    assert any(line.startswith("  out (text; required)") for line in text)
    assert not {"jax", "numpy", "transformers", "pydantic", "yaml"} & set(modules.split())


def test_another_broken_pipe_keeps_its_traceback():
    """Such as that to a worker process which was killed."""
    code = (
        "import rmr1_jax.cli.main as c\ndef run(self): raise BrokenPipeError('of a worker')\n"
        "c.Config.run = run\nc.main(['config'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.endswith("BrokenPipeError: of a worker\n")


@pytest.mark.parametrize("words", [["--help"], ["sft", "--help"], ["config", "chains"], ["--version"]])
def test_a_closed_pipe_is_quiet(words):
    """As of `rmr1 --help | head -3`: the reader closes the pipe before anything is written."""
    code = f"import sys, rmr1_jax.cli.main as c; sys.stdin.read(); sys.exit(c.main({words}))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True) as run:
        run.stdout.close()
        run.stdin.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141
