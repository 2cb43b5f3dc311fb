"""Imports point one way, and importing does nothing: the order of the house plan, read with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rmr1_jax"

# A unit imports from the layers above its own line. Units of one line do not import each other. A module `x_y.py`
# belongs to the unit `x`, whose modules may import each other.
LAYERS = (
    ("errors",),
    ("config", "mesh", "processes", "files"),
    ("preemption",),
    ("prompts",),
    ("data",),
    ("model",),
    ("sampler",),
    ("policy",),
    ("train", "judge"),
    ("eval", "report", "serve", "plan"),
    ("world",),
    ("quickstart",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
NARROW = {"world": {"errors", "prompts", "data"}}  # units that may import less than their layer allows


def unit_of(path: tuple[str, ...]) -> str:
    """("data", "rows") -> "data"; ("world_cases",) -> "world"; () -> "__init__"."""
    name = path[0] if path else "__init__"
    return name if name.startswith("__") else name.split("_")[0]


def imported(source: str, inside: tuple[str, ...]) -> set[tuple[str, ...]]:
    """What a module imports from the package, as paths below it. `inside`: the package that the module is in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("rmr1_jax", *inside)[: len(inside) + 2 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from rmr1_jax import world` names a module, `from rmr1_jax.world import Item` does not.
            found |= {(*base, alias.name) if base == ("rmr1_jax",) else base for alias in node.names}
    return {path[1:] for path in found if path[0] == "rmr1_jax"}


def backward(sources: dict[tuple[str, ...], str]) -> list[str]:
    """The imports that the order forbids. `sources`: text by module path, () for the package itself."""
    wrong = []
    for path, source in sources.items():
        unit = unit_of(path)
        if unit not in RANK:
            wrong.append(f"{'.'.join(path)} stands in no layer: add it to LAYERS")
            continue
        for target in sorted(imported(source, path[:-1])):
            other = unit_of(target)
            allowed = other == unit or RANK.get(other, len(LAYERS)) < RANK[unit]
            if unit in NARROW and other != unit:
                allowed = other in NARROW[unit]
            if not allowed:
                wrong.append(f"{'.'.join(path) or 'rmr1_jax'} imports {'.'.join(target) or 'rmr1_jax'}")
    return wrong


def package_sources() -> dict[tuple[str, ...], str]:
    files = {file.relative_to(PACKAGE).with_suffix("").parts: file for file in PACKAGE.rglob("*.py")}
    return {
        path[:-1] if path[-1] == "__init__" else path: file.read_text(encoding="utf-8") for path, file in files.items()
    }


def test_no_import_points_back():
    sources = package_sources()
    assert len(sources) > 30
    assert backward(sources) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("train.sft", "from rmr1_jax.judge import Judge"),
        ("judge", "from rmr1_jax.train.sft import sft"),
        ("judge_file", "import rmr1_jax.train.sft"),
        ("data.rows", "def f():\n    from rmr1_jax import model"),
        ("data.rows", "from ..model import qwen"),
        ("data.rows", "if True:\n    from .. import policy"),
        ("mesh", "from rmr1_jax.config import load_config"),
        ("world_cases", "from rmr1_jax.policy import load"),
        ("world", "from rmr1_jax.config import load_config"),
        ("model.qwen", "from rmr1_jax import load"),
        ("judge", "from rmr1_jax.quickstart import quickstart"),
        ("nowhere", "import json"),
    ],
)
def test_a_backward_import_is_found(module, line):
    assert len(backward({tuple(module.split(".")): line})) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("judge_file", "from rmr1_jax.judge import Judge"),
        ("data.rows", "from .containers import read_rows"),
        ("data.rows", "from ..prompts import cor\nimport json"),
        ("world", "from rmr1_jax.data.preferences import PreferencePair"),
        ("quickstart", "from rmr1_jax import world"),
        ("", "from rmr1_jax.policy import load"),
    ],
)
def test_a_forward_import_is_not(module, line):
    assert backward({tuple(module.split(".")) if module else (): line}) == []


def test_prompts_need_the_standard_library_and_yaml_only():
    for file in (PACKAGE / "prompts").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                top = name.split(".")[0]
                assert top in {*sys.stdlib_module_names, "yaml", "rmr1_jax"}, f"{file.name} imports {name}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'jax', 'numpy', 'transformers', 'flax', 'orbax', 'pydantic'}"
    assert run_python(f"import sys, rmr1_jax; print({heavy} & set(sys.modules))") == "set()\n"


def test_the_public_names_are_there():
    names = ["Completion", "Judge", "Judgement", "Policy", "load"]
    code = (
        "import rmr1_jax as r; n = sorted(r.__all__); print(n, all(x in dir(r) and callable(getattr(r, x)) for x in n))"
    )
    assert run_python(code) == f"{names} True\n"
    with pytest.raises(AttributeError, match="no attribute 'judgement'"):
        _ = __import__("rmr1_jax").judgement


def test_importing_every_module_starts_no_device_and_leaves_the_environment():
    code = """
import os, pkgutil, importlib
import jax, flax, optax, orbax.checkpoint, grain, transformers, pydantic  # what they do to the environment is theirs
before = dict(os.environ)
import rmr1_jax
names = [m.name for m in pkgutil.walk_packages(rmr1_jax.__path__, "rmr1_jax.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
from jax._src import xla_bridge
print(len(names) > 30, xla_bridge.backends_are_initialized(), dict(os.environ) == before)
"""
    assert run_python(code) == "True False True\n"


def test_no_module_reads_the_environment_when_it_is_imported():
    def at_import(node: ast.AST):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield child
                yield from at_import(child)

    for path, source in package_sources().items():
        for node in at_import(ast.parse(source)):
            name = getattr(node, "attr", getattr(node, "id", ""))
            assert name not in ("environ", "getenv"), f"{'.'.join(path)}:{node.lineno}"
