"""Settings: frozen dataclasses that pydantic checks, read from YAML files with dotted overrides, and written back.

A module that has settings declares them as a `config_dataclass`, whose annotations say what each value may be:

    @config_dataclass
    class CacheConfig:
        pages: PositiveInt = 16                     # from pydantic
        policy: Literal["fifo", "lru"] = "lru"

    CacheConfig(pages=0)    # InputError: CacheConfig: pages: Input should be greater than 0 (got 0)
    load_config(CacheConfig, "cache.yaml", ["policy=fifo"])

Unknown keys are refused, and the nearest known key is named: a misspelt setting that is silently ignored costs a run.
Next: `train/config.py`, the settings of training.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import pydantic
import yaml

from rmr1_jax.errors import InputError
from rmr1_jax.settings import nearest_key

C = TypeVar("C")

RENAMED = {"harmless": "escape_untrusted"}  # keys in files of earlier versions -> their current names


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config_dataclass(cls: type[C]) -> type[C]:
    """Make `cls` a frozen, keyword-only dataclass whose constructor checks and converts values by their annotations.

    Checks of several fields together belong in `__post_init__`, which sees the converted values and raises InputError.
    The constructor raises InputError for every value that is wrong, with its dotted path.
    """
    checked = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    checked.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    @wraps(checked.__init__)
    def __init__(self, **values: Any) -> None:
        # pydantic constructs a dataclass without its __init__.
        vars(self).update(vars(build_config(type(self), values, source=type(self).__name__)))

    checked.__init__ = __init__
    return checked


def load_config(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a `cls` from the YAML file `path`, with overrides such as `key.sub=value`.

    Raises:
        InputError: as `read_yaml`; or keys are unknown, or values missing or wrong, all of which are named at once.
    """
    return build_config(cls, with_overrides(read_yaml(path), overrides), source=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the `key: value` lines of a YAML file. Raises InputError if it cannot be read or holds anything else."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the config {path}: {e}; give the path of a YAML file") from e
    except (yaml.YAMLError, RecursionError) as e:
        raise InputError(f"{path} is not valid YAML: {e}") from e
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__}; expected `key: value` lines")
    return tree


def build_config(cls: type[C], tree: Mapping[str, Any], *, source: str) -> C:
    """Construct a `cls` from a tree of plain values. Errors begin with `source`.

    Raises:
        InputError: as `load_config`.
    """
    # A section starts from the default of its field (a recipe), which may differ from the defaults of its class.
    declared = {f.name: f.default for f in dataclasses.fields(cls)}
    sections = {k: dataclasses.asdict(v) for k, v in declared.items() if dataclasses.is_dataclass(v)}
    try:
        return _adapter(cls).validate_python(_merge(sections, current_names(tree)))
    except pydantic.ValidationError as e:
        raise InputError(f"{source}: " + "; ".join(_explanations(cls, e.errors()))) from e


def current_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of any version under their current names."""
    return {RENAMED.get(key, key): value for key, value in tree.items()}


def dump_config(config: Any) -> str:
    """Return the resolved config as YAML, which `load_config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Compare two trees of settings. Returns dotted keys -> (old, new) of the values that differ."""
    found = {}
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= config_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


_adapter = cache(pydantic.TypeAdapter)


def _explanations(cls: Any, errors: Sequence[Any]) -> Iterator[str]:
    """Yield what is wrong; the known keys of a section, which may be many, are listed once."""
    listed: set[str] = set()
    for error in errors:
        text, known, names = _explain(cls, error).partition("; known here: ")
        yield text if names in listed else text + known + names
        listed.add(names)


def _explain(cls: Any, error: Any) -> str:
    if error["type"] == "value_error":  # raised by a __post_init__, whose message is complete
        return str(error["ctx"]["error"])
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        *parents, key = error["loc"]
        known = [field.name for field in dataclasses.fields(_section(cls, parents))]
        meant = nearest_key(place, [*(place.removesuffix(key) + name for name in known), *_keys(cls)])
        return f"unknown key {place}; " + (f"did you mean {meant}?" if meant else f"known here: {', '.join(known)}")
    given = "" if error["type"] == "missing" else f" (got {error['input']!r})"
    return f"{place}: {error['msg']}{given}"


def _keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config class and of its sections, but not of lists of sections."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name
        parts = [] if typing.get_origin(hint) is tuple else [hint, *typing.get_args(hint)]
        for section in filter(dataclasses.is_dataclass, parts):
            yield from _keys(section, f"{prefix}{name}.")


def _section(cls: Any, path: Sequence[str | int]) -> Any:
    """Return the class of the section at a path of names, whose types are `X`, `X | None` or `tuple[X, ...]`."""
    for name in (part for part in path if isinstance(part, str)):
        hint = typing.get_type_hints(cls)[name]
        cls = next(x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x))
    return cls


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Add overrides such as `key.sub=value` to a tree of plain values, in place; return it. Raises InputError for one
    that is none."""
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"override {item!r}: expected key=value, e.g. optimizer.lr=1e-5")
        node: Any = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node[_index(node, parent, item)] if isinstance(node, list) else node.setdefault(parent, {})
            if not isinstance(node, dict | list):
                raise InputError(f"override {item!r}: {parent} is a value, not a section")
        try:
            node[_index(node, last, item)] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise InputError(f"override {item!r}: the value is not valid YAML; quote it if it is text") from e
    return tree


def _index(node: dict | list, key: str, item: str) -> Any:
    """Return the key of a section, or the index into a list."""
    if isinstance(node, dict):
        return key
    if not key.isdecimal() or int(key) >= len(node):
        raise InputError(f"override {item!r}: {key!r} is not an index from 0 to {len(node) - 1}")
    return int(key)


def _merge(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `given` into `defaults`, section by section."""
    sections = [k for k in given if isinstance(given[k], Mapping) and isinstance(defaults.get(k), Mapping)]
    return {**defaults, **given, **{k: _merge(defaults[k], given[k]) for k in sections}}
