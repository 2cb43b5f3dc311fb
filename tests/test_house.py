"""The structure of the package: imports point one way, no two files import each other, nothing is too long, and
importing does nothing. The rules are those of `scripts/house.py`, which prints the structure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import house  # noqa: E402


def graph_of(**files: str) -> dict:
    """The imports of files given as {"model__qwen": source}."""
    return house.imports({tuple(name.split("__")) if name else (): text for name, text in files.items()})


def test_the_package_keeps_the_rules(capsys):
    code = house.main()
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "circles between files: 0" in printed


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("train__sft", "from rmr1_jax.judge.judge import Judge"),
        ("judge__file", "import rmr1_jax.cli.main"),
        ("pairs__rows", "def f():\n    from rmr1_jax import model"),
        ("pairs__rows", "from ..model import qwen"),
        ("pairs__rows", "if True:\n    from .. import policy"),
        ("files__write", "from rmr1_jax.distributed.mesh import make_mesh"),
        ("model__qwen", "from rmr1_jax import load"),
        ("judge__judge", "from rmr1_jax.quickstart.quickstart import quickstart"),
        ("eval__logs", "from rmr1_jax.report.report import write_report"),
        ("nowhere", "import json"),
    ],
)
def test_a_backward_import_is_found(module, line):
    sources = house.modules() | {tuple(module.split("__")): line}
    assert len(house.backward(house.imports(sources))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("judge__file", "from rmr1_jax.judge.judge import Judge"),
        ("pairs__rows", "from .pair import PreferencePair"),
        ("pairs__read", "from ..prompts import cor\nimport json"),
        ("quickstart__quickstart", "from rmr1_jax.quickstart import world"),
        ("report__report", "from rmr1_jax.eval.logs import Judged"),
    ],
)
def test_a_forward_import_is_not(module, line):
    sources = house.modules() | {tuple(module.split("__")): line}
    assert house.backward(house.imports(sources)) == []


def test_circles_between_two_and_three_files_are_found():
    two = graph_of(model__a="from rmr1_jax.model import b", model__b="def f():\n    from rmr1_jax.model.a import x")
    assert house.circles(two) == [[("model", "a"), ("model", "b")]]
    three = graph_of(
        model__a="from .b import x",
        model__b="from .c import x",
        model__c="from .a import x",
        model__d="from .a import x",
    )
    assert house.circles(three) == [[("model", "a"), ("model", "b"), ("model", "c")]]
    assert house.circles(graph_of(model__a="from .b import x", model__b="import json")) == []


def test_prompts_need_the_standard_library_and_yaml_only():
    for file in (house.PACKAGE / "prompts").glob("*.py"):
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


@pytest.mark.parametrize("module", ["pairs.read", "judge.judgement", "judge.file", "eval.evaluate", "endpoint"])
def test_what_reads_pairs_and_verdicts_needs_no_jax(module):
    assert run_python(f"import sys, rmr1_jax.{module}; print('jax' in sys.modules)") == "False\n"


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

    for path, source in house.modules().items():
        for node in at_import(ast.parse(source)):
            name = getattr(node, "attr", getattr(node, "id", ""))
            assert name not in ("environ", "getenv"), f"{'.'.join(path)}:{node.lineno}"
