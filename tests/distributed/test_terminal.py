"""What a run says while it waits: in order, again and again, and no longer than it lasts."""

import sys
import threading

import pytest

from rmr1_jax.distributed import terminal


@pytest.fixture
def impatient(monkeypatch):
    """Everything is said again after some hundredths of a second."""
    for name in ("QUIET", "TICK", "DELAY"):
        monkeypatch.setattr(terminal, name, 0.03)


def until(capsys, enough) -> str:
    """What stderr holds when `enough` of it is there."""
    said = ""
    for _ in range(500):
        said += capsys.readouterr().err
        if enough(said):
            return said
        threading.Event().wait(0.02)
    raise AssertionError(said)


def speakers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "terminal"]


def test_a_wait_is_said_again_until_it_ends(impatient, capsys):
    with terminal.waiting("loading it", delay=0):
        assert capsys.readouterr().err.startswith("loading it ...\n")  # at once
        said = until(capsys, lambda said: said.count("\n") >= 3)
    assert all(line.startswith("loading it ... ") and line.endswith(" s") for line in said.splitlines())
    assert not speakers()
    with terminal.waiting("compiling it", delay=0.03):
        assert "compiling it ... 0 s\n" in until(capsys, lambda said: said.count("\n") >= 2)


def test_a_short_wait_is_not_said(capsys):
    with terminal.waiting("loading it"):
        assert speakers() == ["terminal"]
    assert capsys.readouterr().err == ""


def test_a_bar_that_does_not_move_is_drawn_again(impatient, capsys):
    with terminal.bar("judge", total=5, unit="pair") as bar:
        bar.set_postfix_str("compiling", refresh=False)
        until(capsys, lambda said: said.count("0/5") >= 3 and "compiling" in said)
        bar.update(2)
        until(capsys, lambda said: said.count("2/5") >= 2)
    assert not speakers()


def test_after_an_error_nothing_is_said(impatient, capsys):
    with pytest.raises(KeyError), terminal.bar("judge", total=5, unit="pair"):
        raise KeyError
    assert not speakers()


def test_only_the_first_process_speaks(impatient, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "first", lambda: False)
    terminal.say("a line")
    with terminal.waiting("a wait", delay=0), terminal.bar("a bar", total=2, unit="step") as bar:
        assert not speakers()
        bar.update()
    assert capsys.readouterr().err == ""


def test_how_often_a_bar_moves(monkeypatch):
    """In a file, where each time is one more line, seldom; in a terminal always."""
    assert terminal.pace(brief=True) == {"mininterval": 6.0, "maxinterval": 6.0, "delay": 6.0, "position": 0}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert terminal.pace(brief=True) == {"mininterval": 0.1}
