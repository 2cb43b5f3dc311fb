"""The record of a run's functions: another reward or loss is noticed, whatever kind of callable it is."""

import dataclasses
import functools
import linecache
import re
import types

import jax
import numpy as np
import pytest
from training import small_grpo

from rmr1_jax.errors import InputError
from rmr1_jax.train.functions import differences, record_of
from rmr1_jax.train.grpo import grpo
from rmr1_jax.train.run_directory import check_run, start_run


def cell(source: str, name: str = "<cell 1>", **names):
    """The names that a cell of a notebook defines: no file, but `linecache` has its lines."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = {"__name__": "__main__", "functools": functools, "dataclasses": dataclasses, "jax": jax} | names
    exec(compile(source, name, "exec"), scope)
    return scope["reward"]


def test_a_record_holds_the_name_the_source_and_plain_values():
    def inner(text):
        return len(text)

    weight, seen, table = 0.5, [], np.zeros(3)

    def reward(text, prompt, *, mode="strict"):
        seen.append(text)
        return weight * inner(text) + table[0] + (mode == "strict")

    record = record_of(reward)
    assert record["@name"].endswith("<locals>.reward")
    assert record["@source"].startswith("def reward(text, prompt") and "return weight * inner" in record["@source"]
    assert record["weight"] == "0.5" and record["mode"] == "'strict'"
    assert record["inner.@source"].startswith("def inner(text):")
    assert set(record) == {"@name", "@source", "weight", "mode", "inner.@name", "inner.@source"}


# Two cells that define `reward`, and words of the one difference.
PAIRS = {
    "def": (
        "def reward(t, p):\n    return 1.0",
        "def reward(t, p):\n    return 2.0",
        "`return 1.0` is now `return 2.0`",
    ),
    "name": ("def short(t, p): return 1\nreward = short", "def long(t, p): return 1\nreward = long", "short, is long"),
    "longer": (
        "def reward(t, p):\n    return 1",
        "def reward(t, p):\n    t += p\n    return 1",
        r"`return 1` is now `t \+= p`",
    ),
    "lambda": ("f = (lambda t, p: 1, 2); reward = f[0]", "f = (lambda t, p: 3, 2); reward = f[0]", "lambda t, p: 3"),
    "lambdas of a line": (
        "f = (lambda t, p: t, lambda t, p: p)\nreward = f[0]",
        "f = (lambda t, p: t, lambda t, p: p)\nreward = f[1]",
        "`lambda t, p: t` is now `lambda t, p: p`",
    ),
    "choice": (
        "reward = lambda t, p: 1 if t else (lambda: 2)()",
        "reward = lambda t, p: 1 if t else (lambda: 3)()",
        r"lambda: 3",
    ),
    "global": ("W = 1\ndef reward(t, p): return W", "W = 2\ndef reward(t, p): return W", r"W of reward .* was 1, is 2"),
    "default": (
        "W = 1/2\ndef reward(t, p, w=W): 0",
        "W = 1/4\ndef reward(t, p, w=W): 0",
        "w of reward .* was 0.5, is 0.25",
    ),
    "closure": (
        "def make(w):\n    def reward(t, p): return w\n    return reward\nreward = make(1)",
        "def make(w):\n    def reward(t, p): return w\n    return reward\nreward = make((2, 'x'))",
        r"w of reward \(make.<locals>.reward\) was 1, is \(2, 'x'\)",
    ),
    "inner": (
        "def make(f):\n    def reward(t, p): return f(t)\n    return reward\nreward = make(lambda t: 1)",
        "def make(f):\n    def reward(t, p): return f(t)\n    return reward\nreward = make(lambda t: 2)",
        r"source of reward.f .*lambda t: 1` is now `lambda t: 2",
    ),
    "partial": (
        "def f(t, p, w): return w\nreward = functools.partial(f, w={'form': 0.5})",
        "def f(t, p, w): return w\nreward = functools.partial(f, w={'form': 1.5})",
        r"form of reward.w \(f\) was 0.5, is 1.5",
    ),
    "partial of functions": (
        "def f(fs, t, p): 0\ndef g(): 1\nreward = functools.partial(f, [g])",
        "def f(fs, t, p): 0\ndef g(): 2\nreward = functools.partial(f, [g])",
        r"source of reward.0.0 .*`def g\(\):|`1` is now `2`",
    ),
    "object": (
        "class R:\n    def __call__(self, t, p): return self.of(t)\n    def of(self, t): return 1\nreward = R()",
        "class R:\n    def __call__(self, t, p): return self.of(t)\n    def of(self, t): return 2\nreward = R()",
        r"source of reward.of \(R\) differs",
    ),
    "attribute": (
        "class R:\n    def __init__(self, w): self.w = w\n    def __call__(self, t, p): return self.w\nreward = R(1)",
        "class R:\n    def __init__(self, w): self.w = w\n    def __call__(self, t, p): return self.w\nreward = R(2)",
        r"w of reward \(R\) was 1, is 2",
    ),
    "method": (
        "class R:\n    w = 1\n    def score(self, t, p): return self.w\nreward = R().score",
        "class R:\n    w = 2\n    def score(self, t, p): return self.w\nreward = R().score",
        r"w of reward \(R.score\) was 1, is 2",
    ),
    "compiled": (
        "@jax.jit\ndef reward(t, p): return t",
        "@jax.jit\ndef reward(t, p): return p",
        "`return t` is now `return p`",
    ),
    "long text": (
        f"K = '{'a' * 30}'\ndef reward(t, p): K",
        f"K = '{'b' * 30}'\ndef reward(t, p): K",
        r"30 characters \(",
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_another_function_is_noticed_and_said(kind):
    *sources, words = PAIRS[kind]
    first, again, second = (record_of(cell(s, f"<{kind} {i}>")) for i, s in enumerate([sources[0], *sources]))
    assert differences("reward", first, again) == []
    (found,) = differences("reward", first, second)
    assert re.search(words, found), found
    assert not any("aaaa" in text for text in first.values())  # a long text may be a secret


def test_without_a_source_the_bytecode_counts():
    def made(body):
        scope = {}
        exec(f"def reward(t, p):\n    # note\n    return {body}", scope)
        return record_of(scope["reward"])

    record = made("t in {'a', 'b', 'c'}")
    assert "@source" not in record and "Python 3." in record["@bytecode"]
    assert differences("loss", record, made("t in {'c', 'b', 'a'}")) == []
    assert differences("loss", record, made("t in {'a', 'b', 'd'}")) == ["the code of loss (reward) differs"]


def test_what_makes_no_difference():
    plain = record_of(cell("def reward(t, p):\n    return (t, p)"))
    commented = record_of(cell("def reward(t,  p):\n\n    # why\n    return t, p  # and so on", "<cell 2>"))
    assert differences("reward", plain, commented) == []
    counting = "COUNT = {}\ndef reward(t, p):\n    global COUNT\n    COUNT += 1\n    return COUNT"
    one, two = (record_of(cell(counting.format(n))) for n in (0, 7))
    assert "COUNT" not in one and differences("reward", one, two) == []
    counter = "class R:\n    def __init__(self): self.n = 0\n    def __call__(self, t, p): self.n += 1\nreward = R()"
    reward = cell(counter)
    before = record_of(reward)
    reward(1, 2)
    assert reward.n == 1 and differences("reward", before, record_of(reward)) == []


def test_recursion_ends():
    source = "def make():\n    def reward(t, p): return reward(t, p)\n    return reward\nreward = make()"
    assert set(record_of(cell(source))) == {"@name", "@source"}
    assert record_of(types.SimpleNamespace) and record_of(len) == {"@name": "len"}


def test_a_run_with_another_function_is_refused(tmp_path):
    def loss(config, inputs):
        return 0.0, {}

    config, rewards = small_grpo(out=str(tmp_path)), [lambda t, p: 1.0, lambda t, p: 2.0]
    start_run(config, tmp_path, {"reward": rewards[0], "loss": None})
    check_run(config, tmp_path, {"reward": rewards[0], "loss": None})
    with pytest.raises(InputError) as error:
        check_run(config, tmp_path, {"reward": rewards[1], "loss": loss})
    said = str(error.value)
    assert "first `lambda t, p: 1.0` is now `lambda t, p: 2.0`; loss was the default, is test_a_run" in said
    assert "give another `out`, or the function that the run was made with" in said
    with pytest.raises(InputError, match=r"reward was .*<lambda>, is the default"):
        grpo(config)  # as the command line calls it
    (tmp_path / "functions.json").unlink()  # a run of an earlier version
    check_run(config, tmp_path, {"reward": rewards[1], "loss": loss})
