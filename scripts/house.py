"""Prints the structure of the package, read from its source: rooms, imports, and what is too long or goes in circles.

A room is a folder or a file at the root of `rmr1_jax`. A room imports only from rooms above it in `ROOMS`, and no two
files import each other, not even through a third. Exits with 1 if a rule or a limit is broken.
`tests/test_house.py` checks the same rules with the same functions.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rmr1_jax"
ROOMS = (
    *(
        "errors",
        "jax_private",
        "settings",
        "config",
        "files",
        "distributed",
        "prompts",
        "pairs",
        "reply",
        "endpoint",
        "model",
        "sampler",
        "policy",
    ),
    *("data", "train", "judge", "eval", "report", "plan", "quickstart", "__init__", "cli", "__main__"),
)
MOST_ROOMS, FILE_LINES, FUNCTION_LINES, PARAMETERS = 24, 350, 60, 8
PUBLIC = {"Judge", "Policy", "load"}  # what a user calls may have more parameters

Module = tuple[str, ...]  # ("model", "qwen"); () is the package's own __init__


def modules() -> dict[Module, str]:
    """The source of every module of the package."""
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    return {m[:-1] if m[-1] == "__init__" else m: path.read_text(encoding="utf-8") for m, path in files.items()}


def room(module: Module) -> str:
    return module[0] if module else "__init__"


def imports(sources: dict[Module, str]) -> dict[Module, set[Module]]:
    """What each module imports of the package, anywhere in its source; a name in a module counts as the module."""
    graph: dict[Module, set[Module]] = {}
    for module, source in sources.items():
        graph[module] = set()
        package = module if module and any(m[:-1] == module for m in sources) else module[:-1]
        for node in ast.walk(ast.parse(source)):
            targets: list[tuple[str, ...]] = []
            if isinstance(node, ast.Import):
                targets = [tuple(alias.name.split(".")) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ("rmr1_jax", *package)[: len(package) + 2 - node.level] if node.level else ()
                base += tuple(node.module.split(".")) if node.module else ()
                targets = [(*base, alias.name) for alias in node.names]
            for target in (t[1:] for t in targets if t[0] == "rmr1_jax"):
                # The longest part that is a module; where the source is not given (a test's), the name as it stands.
                known = [target[:n] for n in range(len(target), -1, -1) if target[:n] in sources]
                graph[module].add(known[0] if known and (known[0] or len(target) < 2) else target[:-1] or target)
    return graph


def backward(graph: dict[Module, set[Module]]) -> list[str]:
    """The imports from a room that does not stand above the importing one, and the modules of unknown rooms."""
    unknown = [f"{'.'.join(m)} is in no room: add it to ROOMS" for m in graph if room(m) not in ROOMS]
    rank = {name: i for i, name in enumerate(ROOMS)}
    return unknown + [
        f"{'.'.join(module) or 'rmr1_jax'} imports {'.'.join(target) or 'rmr1_jax'}"
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if room(module) in rank and room(target) != room(module) and rank.get(room(target), 99) > rank[room(module)]
    ]


def circles(graph: dict[Module, set[Module]]) -> list[list[Module]]:
    """Every set of modules that import each other, directly or through others (strongly connected components)."""

    def reach(start: Module) -> set[Module]:
        seen, todo = set(), [start]
        while todo:
            for target in graph.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    reached = {module: reach(module) for module in graph}
    found = {tuple(sorted(m for m in reached[x] if x in reached.get(m, ()))) for x in graph if x in reached[x]}
    return [list(circle) for circle in sorted(found)]


def functions(sources: dict[Module, str]) -> Iterator[tuple[int, int, str, bool]]:
    """(lines, parameters but self, dotted name, whether public) of every function and method."""
    for module, source in sources.items():
        for parent in ast.walk(ast.parse(source)):
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    a = node.args
                    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
                    owner = getattr(parent, "name", "")
                    path = ".".join([*module, *([owner] if owner else []), node.name])
                    public = (owner or node.name) in PUBLIC
                    yield node.end_lineno - node.lineno + 1, len(names), path, public


def main() -> int:
    sources = modules()
    graph = imports(sources)
    arrows = {(room(m), room(t)) for m, targets in graph.items() for t in targets if room(m) != room(t)}
    rooms = sorted({room(m) for m in sources}, key=lambda r: ROOMS.index(r) if r in ROOMS else len(ROOMS))
    texts = {path.relative_to(PACKAGE): path for pattern in ("*.py", "*.j2") for path in PACKAGE.rglob(pattern)}
    lengths = sorted(
        ((len(p.read_text(encoding="utf-8").splitlines()), str(n)) for n, p in texts.items()), reverse=True
    )
    found = list(functions(sources))
    longest = sorted(((lines, name) for lines, _, name, _ in found), reverse=True)
    widest = sorted(((count, name) for _, count, name, public in found if not public), reverse=True)

    for name in rooms:
        inside = [m for m in sources if room(m) == name]
        lines = sum(len(sources[m].splitlines()) for m in inside)
        above = [r for r in rooms if (name, r) in arrows]
        print(f"{name:12} {len(inside):3} files {lines:6} lines   imports {', '.join(above) or 'nothing'}")
    total = sum(len(s.splitlines()) for s in sources.values())
    print(f"\n{len(rooms)} rooms (at most {MOST_ROOMS}), {len(arrows)} arrows, {len(sources)} files, {total} lines")
    problems = backward(graph) + [f"circle: {', '.join('.'.join(m) for m in c)}" for c in circles(graph)]
    print(f"imports of a room below: {len(backward(graph))}; circles between files: {len(circles(graph))}")
    for what, ranked, most in (
        ("file", lengths, FILE_LINES),
        ("function", longest, FUNCTION_LINES),
        ("signature", widest, PARAMETERS),
    ):
        print(
            f"{'widest' if what == 'signature' else 'longest'} {what}: {ranked[0][1]}, {ranked[0][0]} (at most {most})"
        )
        problems += [f"over {most} {what}: {name}, {size}" for size, name in ranked if size > most]
    problems += [f"{len(rooms)} rooms, at most {MOST_ROOMS}"] if len(rooms) > MOST_ROOMS else []
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
