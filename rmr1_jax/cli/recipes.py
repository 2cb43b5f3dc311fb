"""The recipes: the YAML files of the repository's directory `configs/`, which wheels carry too."""

from __future__ import annotations

import difflib
from pathlib import Path

from rmr1_jax.errors import InputError


def recipes() -> dict[str, Path]:
    """Returns the recipes by name: those of the checkout that this package is in, or those that were installed."""
    root = Path(__file__).parents[2]
    if (root / "pyproject.toml").is_file():
        files = list((root / "configs").glob("*.yaml"))
    else:
        from importlib.metadata import files as installed

        files = [f.locate() for f in installed("rmr1-jax") or () if f.match("rmr1_jax/configs/*.yaml")]
    return {path.stem: Path(path) for path in sorted(files)}


def find_config(path: Path) -> Path:
    """Returns `path`, or the recipe that it names if there is no such file: NAME, NAME.yaml or configs/NAME.yaml."""
    if path.exists() or path.parent.name not in ("", "configs") or len(path.parts) > 2:
        return path
    return recipes().get(path.name.removesuffix(".yaml"), path)


def missing(path: Path) -> InputError:
    """Returns the error for a config that is neither a file nor a recipe."""
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), recipes(), n=1)
    hint = f"did you mean the recipe {near[0]}? " if near else ""
    return InputError(
        f"cannot read the config {path}: there is no such file, and no such recipe; {hint}"
        "give the path of a YAML file, or a name that `rmr1 config` lists"
    )


def recipe_lines() -> list[str]:
    """Returns a line for each recipe: its name and what it is for."""
    found = recipes()
    width = max(map(len, found), default=0)
    return [f"{name:<{width}}  {_about(path)}" for name, path in found.items()]


def _about(path: Path) -> str:
    """Returns the first sentence of the comments about the run itself, which follow the command and the machine."""
    comments = [line[2:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return next(line for line in comments if not line.startswith(("rmr1 ", "Slice: "))).partition(". ")[0].rstrip(".")
