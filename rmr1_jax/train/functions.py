"""The functions of a run, such as its reward and its loss: a record of their names, sources and values.

`record_of` describes a function by a flat dict of texts that can be kept in a file, and `differences` says in words how
two such records differ. `run_directory.py` keeps them in `functions.json`, so that a run is not continued with another
reward, nor a finished run's policy returned for it.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import itertools
import linecache
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Record = dict[str, str]  # "@name", "@source" or "@bytecode", and by their own names the values that count

DEFAULT: Record = {"@name": "the default"}  # not its source, which another version of this package may change
SHORT = 20  # characters of a string that is recorded itself; of a longer one, which may be a secret, a hash is


def record_of(function: Any) -> Record:
    """Describe a function, so that another one is noticed.

    Recorded are its qualified name and its source; the plain values (numbers, strings, tuples and frozen dataclasses of
    them) that it reads from its closure, its module and its default arguments; and in the same way the functions in its
    closure. A `functools.partial` adds its arguments, lists and dicts among them. A callable object has the name and
    the methods of its class, and its plain attributes. Where no source can be read, as of a function made by `exec`, a
    hash of the bytecode takes its place, which differs between versions of Python.

    Not seen are the functions that it calls by their names in a module, the base classes of a callable object, callable
    objects in a closure, the content of lists, dicts and arrays that are not arguments of a `partial`, and values that
    the function itself assigns, such as a counter. The source of a module is read from disk: one that was edited after
    its import is recorded as it was edited.
    """
    return {key.removeprefix("."): text for key, text in _parts(function, "", (), whole=True)}


def differences(name: str, old: Record, new: Record) -> list[str]:
    """Say how the function `name` of a run differs from that of its record; empty if it does not. Comments and the
    layout of a source are no difference."""
    if old["@name"] != new["@name"]:
        return [f"{name} was {old['@name']}, is {new['@name']}" + _also_source(old, new)]
    found = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        *above, last = key.split(".")
        whose = f"{'.'.join([name, *above])} ({new['@name']})"
        if was == now or (last == "@source" and was and now and _normal(was) == _normal(now)):
            continue
        if last == "@source" and was and now:
            found.append(f"the source of {whose} differs: {_first_change(was, now)}")
        elif last in ("@source", "@bytecode"):
            found.append(f"the code of {whose} differs")
        else:
            found.append(f"{last.lstrip('@')} of {whose} was {was or 'absent'}, is {now or 'absent'}")
    return found


def _parts(value: Any, path: str, above: tuple[int, ...], *, whole: bool) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all that is recorded of a function or value. above: the ids of what holds it. whole:
    whether a callable object has more than its name, and a list or dict its items."""
    if id(value) in above:
        return
    above = (*above, id(value))
    inside: dict[str, Any] = {}
    if isinstance(value, functools.partial):
        yield from _parts(value.func, path, above, whole=whole)
        inside, whole = {str(i): each for i, each in enumerate(value.args)} | value.keywords, True
    elif isinstance(value, types.MethodType):
        yield from _parts(value.__func__, path, above, whole=whole)
        inside, whole = _attributes(value.__self__) if whole else {}, False
    elif isinstance(value, types.FunctionType):
        yield f"{path}.@name", value.__qualname__
        yield _code(value.__code__, path)
        inside, whole = _bound(value), False
    elif (plain := _plain(value)) is not None:
        yield path, plain
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        inside = {str(key): each for key, each in items} if whole or isinstance(value, tuple) else {}
    elif isinstance(wrapped := getattr(value, "__wrapped__", None), Callable):  # such as a function of `jax.jit`
        yield from _parts(wrapped, path, above, whole=whole)
    elif callable(value):
        cls = value if isinstance(value, type) else type(value)
        yield f"{path}.@name", getattr(value, "__qualname__", cls.__qualname__)
        if whole:
            yield from (_code(method.__code__, f"{path}.{name}") for name, method in _methods(cls).items())
            inside, whole = _attributes(value), False
    for name, each in inside.items():
        yield from _parts(each, f"{path}.{name}", above, whole=whole)


def _methods(cls: type) -> dict[str, types.FunctionType]:
    """The methods that a class defines, but of those with special names only `__call__`, which may be inherited."""
    methods = {k: v for k, v in vars(cls).items() if isinstance(v, types.FunctionType) and not k.startswith("__")}
    call = inspect.getattr_static(cls, "__call__", None)
    return methods | ({"__call__": call} if isinstance(call, types.FunctionType) else {})


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object and of its class that are no methods, and that no method assigns."""
    cls = value if isinstance(value, type) else type(value)
    held, methods = {**vars(cls), **getattr(value, "__dict__", {})}, _methods(cls)
    assigned = {name for method in methods.values() for name in _names(method.__code__, "STORE_ATTR")}
    return {k: v for k, v in held.items() if not k.startswith("__") and k not in methods.keys() | assigned}


def _bound(function: Callable[..., Any]) -> dict[str, Any]:
    """The values that a function reads from its closure, its default arguments and its module."""
    code, bound = function.__code__, dict(function.__kwdefaults__ or {})
    if defaults := function.__defaults__:
        bound |= dict(zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True))
    for name in _names(code, "LOAD_GLOBAL") & function.__globals__.keys():
        if _plain(found := function.__globals__[name]) is not None:
            bound[name] = found
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            bound[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    assigned = _names(code, "STORE_GLOBAL") | _names(code, "STORE_DEREF")
    return {name: value for name, value in bound.items() if name not in assigned}


def _names(code: types.CodeType, operation: str) -> set[str]:
    """The names that the code, and the code of functions in it, reads or writes with a bytecode operation."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname == operation}
    return found.union(*(_names(each, operation) for each in code.co_consts if isinstance(each, types.CodeType)))


def _plain(value: Any) -> str | None:
    """A plain value as text; None for any other object."""
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if isinstance(value, str | bytes):
        data = value if isinstance(value, bytes) else value.encode()
        return repr(value) if len(value) <= SHORT else f"{len(value)} characters (sha256 {_digest(data)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen:
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return f"{type(value).__qualname__}({', '.join(f'{k}={v}' for k, v in fields.items() if v is not None)})"
    if isinstance(value, tuple | frozenset):
        texts = [_plain(each) for each in value]
        if all(text is not None for text in texts):
            return f"({', '.join(texts if isinstance(value, tuple) else sorted(texts))})"
    return None


def _code(code: types.CodeType, path: str) -> tuple[str, str]:
    """The key and the text of a function's code: its source, or where that cannot be read a hash of its bytecode."""
    try:
        source = _lambda(code) if code.co_name == "<lambda>" else textwrap.dedent(inspect.getsource(code)).strip()
    except (OSError, TypeError, SyntaxError):
        source = None
    if source:
        return f"{path}.@source", source
    version = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    return f"{path}.@bytecode", f"{_digest(_canonical(code).encode())} ({version})"


def _lambda(code: types.CodeType) -> str | None:
    """The source of a lambda: its own part of the lines that it stands in, or None if it is not found."""
    places = [p for p in code.co_positions() if None not in p and p[2:] != (0, 0)]
    if not places:
        return None
    begin, end = min((p[0], p[2]) for p in places), max((p[1], p[3]) for p in places)
    linecache.checkcache(code.co_filename)
    file, found = "".join(linecache.getlines(code.co_filename)), None
    for node in ast.walk(ast.parse(file)):  # outer ones before those inside them
        if isinstance(node, ast.Lambda):
            body = node.body
            if (body.lineno, body.col_offset) <= begin and end <= (body.end_lineno, body.end_col_offset):
                found = node
    return found and ast.get_source_segment(file, found)


def _canonical(code: types.CodeType) -> str:
    """The bytecode, constants and names as text. Not the line numbers, nor the order of a constant set."""

    def constant(value: Any) -> str:
        if isinstance(value, types.CodeType):
            return _canonical(value)
        return f"{{{', '.join(sorted(map(repr, value)))}}}" if isinstance(value, frozenset) else repr(value)

    return repr((code.co_code.hex(), [constant(each) for each in code.co_consts], code.co_names, code.co_varnames))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _normal(source: str) -> str:
    """The source without comments and in one layout, or as it is where it is no whole statement."""
    try:
        return ast.unparse(ast.parse(source))
    except SyntaxError:
        return source


def _also_source(old: Record, new: Record) -> str:
    sources = [each.get("@source") for each in (old, new)]
    return " (their sources differ)" if all(sources) and len(set(map(_normal, sources))) > 1 else ""


def _first_change(old: str, new: str) -> str:
    """The first line that differs, shortened, before and after."""
    lines = itertools.zip_longest(_normal(old).splitlines(), _normal(new).splitlines(), fillvalue="")
    was, now = (
        textwrap.shorten(line, 80, placeholder=" ...") for line in next(pair for pair in lines if len({*pair}) > 1)
    )
    return f"first `{was}` is now `{now}`"
