"""Lists the settings of a command, read from the source of its config class: its fields, their types, their defaults,
and the docstring below each field. The class is not imported, because JAX, which most of them need, takes seconds. Also
finds the setting that a wrong key means.

Next: `config.py`, which reads and checks settings.
"""

from __future__ import annotations

import ast
import difflib
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parent

TYPES = {
    "int": "integer",
    "PositiveInt": "integer > 0",
    "NonNegativeInt": "integer >= 0",
    "float": "number",
    "FiniteFloat": "number",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number >= 0",
    "str": "text",
    "bool": "true | false",
    "Mapping": "mapping",
    "dict": "mapping",
    "tuple": "list",
}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}

# Names of settings in other trainers (TRL, Transformers) -> ours, the first of which that a command has.
ELSEWHERE = {
    "model_name_or_path": ("model",),
    "dataset_name": ("data",),
    "output_dir": ("out",),
    "learning_rate": ("optimizer.lr",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "adam_beta1": ("optimizer.b1",),
    "adam_beta2": ("optimizer.b2",),
    "adam_epsilon": ("optimizer.eps",),
    "max_grad_norm": ("optimizer.clip",),
    "warmup_steps": ("optimizer.warmup_ratio",),
    "num_train_epochs": ("epochs", "steps"),
    "max_steps": ("steps",),
    "max_length": ("row_length",),
    "max_seq_length": ("row_length",),
    "per_device_train_batch_size": ("micro_rows",),
    "gradient_accumulation_steps": ("rows_per_step", "mini_batch_prompts"),
    "gradient_checkpointing": ("remat",),
    "attn_implementation": ("attention",),
    "bf16": ("dtype",),
    "save_steps": ("save_every",),
    "save_total_limit": ("keep",),
    "num_generations": ("sampling.n",),
    "max_completion_length": ("sampling.max_new_tokens",),
    "beta": ("loss.kl_coef",),
    "epsilon": ("loss.clip_low",),
    "epsilon_high": ("loss.clip_high",),
    "importance_sampling_level": ("loss.ratio",),
    "loss_type": ("aggregation",),
    "scale_rewards": ("normalize_std",),
    "report_to": ("logger",),
    "eval_steps": ("eval_every",),
    "metric_for_best_model": ("best.metric",),
    "log_completions": ("log_rollouts",),
    "num_completions_to_print": ("log_rollouts",),
}


class Setting(NamedTuple):
    """A setting. key: dotted; N stands for the number of an item of a list. default: as in YAML; None: required."""

    key: str
    kind: str
    default: str | None
    doc: str


@cache
def settings(reference: str) -> tuple[Setting, ...]:
    """Returns the settings of a config class, named as "train.config:SftConfig", in the order of its fields."""
    module, name = reference.split(":")
    return tuple(_expand(module, _names(module)[name], {}, ""))


def settings_text(reference: str, width: int | None = None) -> str:
    """Describes the settings of a config class for the help text of its command."""
    width = min(width or shutil.get_terminal_size((100, 24)).columns, 100)
    lines = ["settings, as lines of the YAML file or as KEY=VALUE:"]
    for key, kind, default, doc in settings(reference):
        lines.append(f"  {key} ({kind}; {'required' if default is None else f'default {default}'})")
        lines += textwrap.wrap(doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """Returns the key among `known` that is meant by a dotted key: the one that other trainers call so; the one of this
    name in another section; or one whose name is similar, in the same section rather than in another."""
    section, _, leaf = key.rpartition(".")
    leaves: dict[str, str] = {}
    for each in known:
        leaves.setdefault(each.rpartition(".")[2], each)
    meant = [*ELSEWHERE.get(leaf, ()), leaves.get(leaf)]
    beside = {leaf: each for each in known for above, _, leaf in [each.rpartition(".")] if above == section}
    for names in (beside, leaves):
        meant += [names[near] for near in difflib.get_close_matches(leaf, names, n=1)]
    return next((each for each in (key, *meant) if each in known), None)


class _Field(NamedTuple):
    module: str
    annotation: ast.expr
    default: ast.expr | None
    doc: str


def _expand(module: str, node: ast.ClassDef, given: Mapping[str, ast.expr], prefix: str) -> Iterator[Setting]:
    """Yields the settings of a class; `given` replaces its defaults."""
    for name, (where, annotation, default, doc) in _fields(module, node).items():
        default = given.get(name, default)
        section = _section(where, annotation)
        if section is None:
            yield Setting(prefix + name, _kind(where, annotation), _text(default), doc)
            continue
        values = {word.arg: word.value for word in default.keywords} if isinstance(default, ast.Call) else {}
        if not isinstance(default, ast.Call):
            yield Setting(prefix + name, _kind(where, annotation), _text(default), doc)
        many = isinstance(annotation, ast.Subscript)
        yield from _expand(*section, values, f"{prefix}{name}.{'N.' if many else ''}")


def _fields(module: str, node: ast.ClassDef) -> dict[str, _Field]:
    """Returns the fields of a class by name, those of its bases first."""
    found: dict[str, _Field] = {}
    for base in node.bases:
        found |= _fields(*_resolve(module, base.id))
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            name = statement.target.id
            doc = " ".join(after.value.value.split()) if is_doc else found[name].doc if name in found else ""
            found[name] = _Field(module, statement.annotation, statement.value, doc)
    return found


@cache
def _names(module: str) -> dict[str, ast.AST | str]:
    """Returns what a module's names stand for: a class, an expression, or the module they are imported from."""
    tree = ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    found: dict[str, ast.AST | str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
            found |= {name.name: node.module.partition(".")[2] for name in node.names}
    return found


def _resolve(module: str, name: str) -> tuple[str, ast.AST | None]:
    """Returns the definition of a name of this package and its module; None for other names."""
    found = _names(module).get(name)
    return _resolve(found, name) if isinstance(found, str) else (module, found)


def _section(module: str, annotation: ast.expr) -> tuple[str, ast.ClassDef] | None:
    """Returns the config class in an annotation such as `X`, `X | None` or `tuple[X, ...]`, with its module."""
    for part in ast.walk(annotation):
        if isinstance(part, ast.Name):
            where, node = _resolve(module, part.id)
            if isinstance(node, ast.ClassDef):
                return where, node
    return None


def _kind(module: str, node: ast.AST) -> str:
    """Describes a type in words."""
    if isinstance(node, ast.BinOp):
        return f"{_kind(module, node.left)} | {_kind(module, node.right)}"
    if isinstance(node, ast.Constant):
        return _text(node)
    if isinstance(node, ast.Name):
        where, found = _resolve(module, node.id)
        if isinstance(found, ast.ClassDef):
            return "section"
        return _kind(where, found) if found is not None else TYPES[node.id]
    assert isinstance(node, ast.Subscript), ast.dump(node)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    match node.value.id:
        case "Literal":
            return " | ".join(map(_text, inner))
        case "Annotated":
            calls = [each for each in inner[1:] if isinstance(each, ast.Call)]
            bounds = [f"{BOUNDS[w.arg]} {_text(w.value)}" for call in calls for w in call.keywords if w.arg in BOUNDS]
            return " ".join([_kind(module, inner[0]), ", ".join(bounds)]).rstrip()
        case "tuple":
            return f"list of {_kind(module, inner[0])}"
        case name:
            return TYPES[name]


def _text(node: ast.expr | None) -> str | None:
    """Writes a default as it stands in YAML."""
    if node is None:
        return None
    if isinstance(node, ast.Constant):
        words = {"None": "null", "True": "true", "False": "false", "": '""'}
        return words.get(str(node.value), str(node.value))
    if isinstance(node, ast.Call):  # field(default_factory=dict)
        return "{}"
    return "[]" if isinstance(node, ast.Tuple) and not node.elts else ast.unparse(node)
