"""The tree of arrays in a checkpoint: restored by name, also where an earlier version stored it in another layout."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rmr1_jax.errors import InputError
from rmr1_jax.model.qwen import Params


def restored(path: Path, like: Any) -> Any:
    """Restore the tree in `path` with the structure, shapes, dtypes and shardings of `like`, which may be a part of it.
    Raises InputError if the stored arrays have other names or shapes, and names them, which Orbax does not."""
    wanted = _as_stored(path, like)
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    tree = ocp.PyTreeCheckpointer().restore(path, args=args)
    return tree if wanted is like else _map_params(_nested_layers, like, tree)


def deferred(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Check as `restored` does, and return a tree with a function in place of each array, which restores it alone.
    like: dicts within dicts."""
    _as_stored(path, like)

    def restore(keys: list[str], leaf: Any) -> jax.Array:
        tree = restored(path, functools.reduce(lambda tree, key: {key: tree}, reversed(keys), leaf))
        return functools.reduce(operator.getitem, keys, tree)

    return jax.tree_util.tree_map_with_path(
        lambda k, leaf: functools.partial(restore, [part.key for part in k], leaf), like
    )


def _as_stored(path: Path, like: Any) -> Any:
    """`like` itself, or in the layout of the first version where `path` has that. Raises InputError, see `restored`."""
    stored = _shapes(ocp.PyTreeCheckpointer().metadata(path).item_metadata.tree)
    flat = _map_params(_flat_layers, like)
    wanted = flat if _shapes(flat).keys() <= stored.keys() and _shapes(flat) != _shapes(like) else like
    expected = _shapes(wanted).items()
    if wrong := [f"{k}: is {stored.get(k)}, expected {shape}" for k, shape in expected if stored.get(k) != shape]:
        named = "; ".join(wrong[:3]) + (f", and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise InputError(f"{path} is of another model: {named}; give the model that the run began with")
    return wanted


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array by its dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="."): tuple(x.shape) for k, x in leaves}


def _map_params(function: Callable[..., Params], *states: Any) -> Any:
    """Apply `function` to each tree of parameters (the weights, and Adam's two moments) of states of one structure. All
    other arrays are those of the last state."""

    def is_params(x: Any) -> bool:
        return isinstance(x, dict) and isinstance(x.get("layers"), dict)

    return jax.tree.map(lambda *x: function(*x) if is_params(x[0]) else x[-1], *states, is_leaf=is_params)


def _flat_layers(params: Params) -> Params:
    """The layout of the first version: a layer's parameters in one dict, not in the dicts of its parts."""
    layers = {}
    for name, part in params["layers"].items():
        layers |= part if isinstance(part, dict) else {name: part}
    return params | {"layers": layers}


def _nested_layers(like: Params, flat: Params) -> Params:
    """The parameters of `_flat_layers` in the layout of `like`."""
    layers, parts = flat["layers"], like["layers"].items()
    nested = {k: {name: layers[name] for name in part} if isinstance(part, dict) else layers[k] for k, part in parts}
    return flat | {"layers": nested}
