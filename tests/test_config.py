"""Configs: overrides, errors for misspelt and ill-typed settings, defaults of sections, and dumps that read back."""

import dataclasses
from typing import Literal

import pytest
import yaml
from pydantic import PositiveFloat, PositiveInt

from rmr1_jax.config import build_config, config_dataclass, config_differences, dump_config, load_config
from rmr1_jax.errors import InputError
from rmr1_jax.train.config import GrpoConfig, SftConfig


@config_dataclass
class Inner:
    rate: PositiveFloat = 0.1
    kind: Literal["x", "y"] = "x"

    def __post_init__(self):
        if self.kind == "y" and self.rate > 100:
            raise InputError(f"rate={self.rate} is too high for kind y")


@config_dataclass
class Outer:
    out: str
    steps: PositiveInt | None = None
    inner: Inner = Inner(rate=0.5, kind="y")
    maybe: Inner | None = None
    several: tuple[Inner, ...] = ()


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_a_file_and_overrides(write):
    path = write("out: runs/a\nsteps: 3\ninner:\n  rate: 0.2\n")
    assert load_config(Outer, path) == Outer(out="runs/a", steps=3, inner=Inner(rate=0.2, kind="y"))
    changed = load_config(Outer, path, ["out=runs/b", "inner.kind=x", "steps=null", "maybe.rate=2"])
    assert changed == Outer(out="runs/b", inner=Inner(rate=0.2), maybe=Inner(rate=2.0))
    assert load_config(Outer, write(""), ["out=a=b"]).out == "a=b"


def test_a_list_of_sections(write):
    path = write("out: a\nseveral:\n  - rate: 0.2\n  - {kind: y, rate: 1e-6}\n")
    assert load_config(Outer, path).several == (Inner(rate=0.2), Inner(rate=1e-6, kind="y"))
    changed = load_config(Outer, path, ["several.1.rate=3", "several.0={kind: y}"])
    assert changed.several == (Inner(kind="y"), Inner(rate=3.0, kind="y"))
    for place in ("2.rate", "x.rate", "-1.rate", "2"):
        message = error_of(load_config, Outer, path, [f"several.{place}=1"])
        assert f"{place.split('.')[0]!r} is not an index from 0 to 1" in message
    assert "rate is a value, not a section" in error_of(load_config, Outer, path, ["several.1.rate.x=1"])


def test_numbers_in_scientific_notation(write):
    path = write("out: a\ninner:\n  rate: 1e-6\n")  # YAML 1.1 takes this for text
    assert load_config(Outer, path).inner.rate == 1e-6
    assert load_config(Outer, path, ["inner.rate=2E-5"]).inner.rate == 2e-5
    loss = load_config(GrpoConfig, write("out: a\nloss: {importance_cap: 2e0}\n")).loss
    assert loss.importance_cap == 2.0


def test_a_section_starts_from_its_own_field_s_defaults():
    """GRPO's recipe is not the optimizer's or the sampler's own default; changing one value must not undo the rest."""
    plain = GrpoConfig(out="a")
    built = build_config(GrpoConfig, {"out": "a", "sampling": {"temperature": 0.7}, "optimizer": {"lr": 1}}, source="t")
    assert built == GrpoConfig(
        out="a",
        sampling=dataclasses.replace(plain.sampling, temperature=0.7),
        optimizer=dataclasses.replace(plain.optimizer, lr=1.0),
    )
    assert built.sampling.n == 7 and built.optimizer.schedule == "constant"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"out": "a", "step": 3}, "t: unknown key step; did you mean steps?"),
        ({"out": "a", "inner": {"rat": 3}}, "unknown key inner.rat; did you mean inner.rate?"),
        ({"out": "a", "maybe": {"kin": 3}}, "unknown key maybe.kin; did you mean maybe.kind?"),
        ({"out": "a", "several": [{}, {"rat": 3}]}, "unknown key several.1.rat; did you mean several.1.rate?"),
        ({"out": "a", "several": [{}, {"rate": "x"}]}, "several.1.rate: Input should be a valid number"),
        ({"out": "a", "several": [3]}, "several.0: Input should be a dictionary or an instance of Inner (got 3)"),
        ({"out": "a", "several": {"rate": 3}}, "several: Input should be a valid tuple"),
        (
            {"out": "a", "qqq": 1, "zzz": 2},
            "t: unknown key qqq; known here: out, steps, inner, maybe, several; unknown key zzz",
        ),
        (
            {"out": "a", "zzz": 1, "inner": {"qqq": 2}, "xxx": 3},
            "unknown key zzz; known here: out, steps, inner, maybe, several; unknown key xxx",
        ),
        ({}, "out: Field required"),
        ({"out": 5}, "out: Input should be a valid string (got 5)"),
        ({"out": "a", "steps": "many"}, "unable to parse string as an integer (got 'many')"),
        ({"out": "a", "steps": 2.5}, "(got 2.5)"),
        ({"out": "a", "inner": {"kind": "z"}}, "inner.kind: Input should be 'x' or 'y' (got 'z')"),
        ({"out": "a", "inner": 3}, "inner: Input should be a dictionary or an instance of Inner (got 3)"),
        ({"out": "a", "inner": None}, "inner: Input should be"),
        ({"out": "a", "inner": {"rate": "x", "kind": "z"}}, "(got 'x'); inner.kind"),
        ({"out": "a", "inner": {"rate": -1}}, "t: inner.rate: Input should be greater than 0 (got -1)"),
        ({"out": "a", "steps": 0}, "t: steps: Input should be greater than 0 (got 0)"),
        ({"out": "a", "inner": {"rate": "101"}}, "t: rate=101.0 is too high for kind y"),
    ],
    ids=str,
)
def test_an_error_names_the_field_the_value_and_what_is_expected(tree, message):
    assert message in error_of(build_config, Outer, tree, source="t")
    assert message.removeprefix("t: ") in error_of(Outer, **tree)  # the constructor checks the same


def test_the_constructor_checks_and_converts():
    assert error_of(Inner, rate=0, kind="z") == (
        "Inner: rate: Input should be greater than 0 (got 0); kind: Input should be 'x' or 'y' (got 'z')"
    )
    assert error_of(Inner, rat=1) == "Inner: unknown key rat; did you mean rate?"
    assert error_of(dataclasses.replace, Inner(), rate=float("nan")).endswith("greater than 0 (got nan)")
    outer = Outer(out="a", inner={"rate": "1e-6"}, several=[Inner()])
    assert outer == Outer(out="a", inner=Inner(rate=1e-6, kind="y"), several=(Inner(),)) and hash(outer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        outer.out = "b"
    with pytest.raises(TypeError):
        Inner(0.1)


def test_messages_of_post_init_are_shown_unchanged():
    wrong = {"out": "a", "optimizer": {"lr": 0}}
    assert error_of(build_config, SftConfig, wrong, source="run.yaml") == (
        "run.yaml: optimizer.lr: Input should be greater than 0 (got 0)"
    )
    wrong = {"out": "a", "rows_per_step": 6, "micro_rows": 4}
    assert "rows_per_step=6 must be a multiple of micro_rows=4" in error_of(build_config, SftConfig, wrong, source="t")
    message = error_of(build_config, GrpoConfig, {"out": "a", "max_prompt_length": 5000}, source="t")
    assert "row_length=12288 cannot hold" in message and "= 13192" in message


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((SftConfig, x) for x in ("epochs", "max_steps", "row_length", "rows_per_step", "micro_rows", "save_every")),
        *(
            (GrpoConfig, x)
            for x in ("steps", "prompts_per_step", "mini_batch_prompts", "dynamic_sampling", "micro_rows")
        ),
    ],
)
def test_counts_are_at_least_one_and_seeds_at_least_zero(cls, name):
    assert f"{name}: Input should be greater than 0 (got 0)" in error_of(cls, out="a", **{name: 0})
    assert "seed: Input should be greater than or equal to 0 (got -1)" in error_of(cls, out="a", seed=-1)


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (SftConfig, {"dtype": "f32"}, "dtype: Input should be 'float32' or 'bfloat16' (got 'f32')"),
        (SftConfig, {"on_too_long": "cut"}, "on_too_long: Input should be 'error' or 'drop' (got 'cut')"),
        (GrpoConfig, {"structure": "x"}, "structure='x' must be"),
    ],
)
def test_choices(cls, wrong, message):
    assert message in error_of(cls, out="a", **wrong)


def test_unreadable_files_and_overrides(write, tmp_path):
    assert "cannot read the config" in error_of(load_config, Outer, tmp_path / "none.yaml")
    assert "is not valid YAML" in error_of(load_config, Outer, write("a: [1"))
    assert "holds a list; expected `key: value` lines" in error_of(load_config, Outer, write("- 1"))
    path = write("out: a\n")
    assert "override 'steps': expected key=value" in error_of(load_config, Outer, path, ["steps"])
    assert "override '=3': expected key=value" in error_of(load_config, Outer, path, ["=3"])
    assert "override 'out.x=3': out is a value, not a section" in error_of(load_config, Outer, path, ["out.x=3"])
    assert "override 'out=[a': the value is not valid YAML" in error_of(load_config, Outer, path, ["out=[a"])
    assert "did you mean inner.rate?" in error_of(load_config, Outer, path, ["inner.rates=3"])


@pytest.mark.parametrize(
    "config",
    [
        Outer(out="a", maybe=Inner(rate=1e-7), several=(Inner(), Inner(kind="y"))),
        SftConfig(out="a b: c", max_steps=3),
        GrpoConfig(out="a", steps=4, optimizer=dataclasses.replace(GrpoConfig(out="a").optimizer, lr=3e-7)),
    ],
    ids=lambda c: type(c).__name__,
)
def test_a_dump_reads_back(config):
    assert build_config(type(config), yaml.safe_load(dump_config(config)), source="dump") == config


def test_differences():
    old = dataclasses.asdict(Outer(out="a"))
    new = dataclasses.asdict(Outer(out="b", inner=Inner(rate=0.5), maybe=Inner()))
    assert config_differences(old, old) == {}
    assert config_differences(old, new) == {
        "out": ("a", "b"),
        "inner.kind": ("y", "x"),
        "maybe": (None, {"rate": 0.1, "kind": "x"}),
    }
    assert config_differences({"a": 1}, {"b": 2}) == {"a": (1, None), "b": (None, 2)}


def test_a_key_of_an_earlier_version_is_read_under_its_name_today():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Shown:
        escape_untrusted: bool = False

    assert build_config(Shown, {"harmless": True}, source="c.yaml").escape_untrusted
