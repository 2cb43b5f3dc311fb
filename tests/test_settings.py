"""The settings that help texts list, which are read from the source, are those of the classes themselves."""

import dataclasses
import typing

import pytest
import yaml

from rmr1_jax.cli.main import Command
from rmr1_jax.cli.options import ConfigCommand
from rmr1_jax.cli.words import commands_of
from rmr1_jax.config import build_config, config_dataclass, with_overrides
from rmr1_jax.data.chains.chains import ChainsConfig
from rmr1_jax.data.mix.mixture import MixtureConfig
from rmr1_jax.data.prepare import PrepareConfig
from rmr1_jax.errors import InputError
from rmr1_jax.settings import ELSEWHERE, settings, settings_text
from rmr1_jax.train.config import GrpoConfig, SftConfig

CONFIGS = {
    "train.config:SftConfig": SftConfig,
    "train.config:GrpoConfig": GrpoConfig,
    "data.prepare:PrepareConfig": PrepareConfig,
    "data.mix.mixture:MixtureConfig": MixtureConfig,
    "data.chains.chains:ChainsConfig": ChainsConfig,
}
each_config = pytest.mark.parametrize("reference", CONFIGS)


def leaves(cls: type, values: dict | None, prefix: str = "") -> typing.Iterator[tuple[str, object]]:
    """The dotted keys of a class and their defaults, found with the class itself; `values` replace its defaults."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        parts = (hints[field.name], *typing.get_args(hints[field.name]))
        section = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        default = (values or {}).get(field.name, field.default)
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if section and not isinstance(default, dict) and dataclasses.is_dataclass(default):
            default = dataclasses.asdict(default)
        if not isinstance(default, dict) or not section:
            yield prefix + field.name, default
        if section:
            many = "N." if typing.get_origin(hints[field.name]) is tuple else ""
            yield from leaves(section, default if isinstance(default, dict) else None, f"{prefix}{field.name}.{many}")


def test_every_command_with_settings_is_here():
    above = commands_of(Command)
    below = commands_of(typing.get_type_hints(above["data"])["action"])
    named = [each.settings for each in (above | below).values() if issubclass(each, ConfigCommand)]
    assert sorted(named) == sorted(["", *CONFIGS])  # the plan takes the settings of several commands


@each_config
def test_keys_and_defaults_are_those_of_the_class(reference):
    found = {each.key: each.default for each in settings(reference)}
    expected = dict(leaves(CONFIGS[reference], None))
    assert list(found) == list(expected)
    for key, value in expected.items():
        if value is dataclasses.MISSING:
            assert found[key] is None, key
        else:  # a float in YAML needs a point before the exponent
            read = yaml.safe_load(found[key])
            assert (float(read) if isinstance(value, float) else read) == (list(value) if value == () else value), key


@each_config
def test_every_setting_is_described_in_a_sentence(reference):
    for key, kind, _, doc in settings(reference):
        assert kind and doc.endswith("."), key
        assert len(doc) > 9, key


def test_types_in_words():
    kinds = {each.key: each.kind for each in settings("train.config:GrpoConfig")}
    assert kinds["optimizer.warmup_ratio"] == "number >= 0, < 1"
    assert kinds["sampling.top_k"] == "integer > 0 | null"
    assert kinds["loss.kl_kind"] == "k1 | k2 | k3"
    assert kinds["normalize_std"] == "true | false"


def test_the_text_keeps_to_its_width():
    text = settings_text("train.config:SftConfig", 60)
    assert "  optimizer.lr (number > 0; default 5e-06)\n      Learning rate after the warm-up.\n" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("      ")) <= 60


@pytest.mark.parametrize(
    ("cls", "key", "meant"),
    [
        (SftConfig, "learning_rate", "optimizer.lr"),
        (SftConfig, "num_train_epochs", "epochs"),
        (GrpoConfig, "num_train_epochs", "steps"),
        (SftConfig, "max_length", "row_length"),
        (GrpoConfig, "temperature", "sampling.temperature"),
        (GrpoConfig, "beta", "loss.kl_coef"),
        (GrpoConfig, "num_generations", "sampling.n"),
        (SftConfig, "lr", "optimizer.lr"),
        (SftConfig, "lr_schedule", "optimizer.schedule"),
        (SftConfig, "optimizer.learning_rate", "optimizer.lr"),
        (MixtureConfig, "sources.0.shufle", "sources.0.shuffle"),
        (SftConfig, "seeed", "seed"),
        (SftConfig, "optimizer.shedule", "optimizer.schedule"),
        (SftConfig, "batch_rows_per_step", "rows_per_step"),
    ],
)
def test_an_unknown_key_names_the_one_that_is_meant(cls, key, meant):
    tree: dict = {"out": "x"}
    if cls is MixtureConfig:
        tree["sources"] = [{"path": "p"}]
    tree = with_overrides(tree, [f"{key}=1"])
    with pytest.raises(InputError, match=rf"unknown key {key}; did you mean {meant}\?"):
        build_config(cls, tree, source="run.yaml")


def test_other_trainers_names_lead_to_keys_that_exist():
    known = {each.key for reference in CONFIGS for each in settings(reference)}
    assert not {key for keys in ELSEWHERE.values() for key in keys} - known
    # A name that a stage has itself is taken as it is; max_steps is one of SFT.
    assert not set(ELSEWHERE) & {
        each.key for stage in ("Sft", "Grpo") for each in settings(f"train.config:{stage}Config")
    } - {"max_steps"}


def test_a_key_without_any_near_one_lists_those_of_its_section():
    @config_dataclass
    class Small:
        pages: int = 1

    with pytest.raises(InputError, match="unknown key quux; known here: pages"):
        build_config(Small, {"quux": 1}, source="small.yaml")
