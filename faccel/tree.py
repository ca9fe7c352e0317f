"""Nested values: dicts, lists, tuples, named tuples, attrs records, dataclasses and TensorDicts, down to their leaves.

Dicts are walked in sorted key order, so that ranks which filled the same dict in another order still agree, and are
rebuilt in the order of the argument.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from faccel.errors import TreeError
from faccel.flat_shard import FlatShard

Tree = Any
"""A leaf, or any nesting of containers with leaves."""

_Make = Callable[[list[Any]], Any]


def is_tensordict(value: object) -> bool:
    """Whether `value` is a TensorDict; never imports tensordict."""
    module = sys.modules.get("tensordict")
    return module is not None and isinstance(value, module.TensorDictBase)


def _sorted_keys(mapping: Mapping[Any, Any]) -> list[Any]:
    try:
        return sorted(mapping.keys())
    except TypeError:
        return sorted(mapping.keys(), key=lambda key: (type(key).__name__, repr(key)))


def _make_mapping(node: Mapping[Any, Any], keys: list[Any]) -> _Make:
    if type(node) is dict:
        order = list(node)

        def make_dict(values: list[Any]) -> Any:
            by_key = dict(zip(keys, values, strict=True))
            return by_key if order == keys else {key: by_key[key] for key in order}

        return make_dict

    def make_same_class(values: list[Any]) -> Any:
        new = copy.copy(node)  # keeps a default factory, a tokenizer's encodings, ...
        for key, value in zip(keys, values, strict=True):
            new[key] = value  # type: ignore[index]
        return new

    return make_same_class


def _make_tensordict(node: Any, keys: list[Any]) -> _Make:
    def make(values: list[Any]) -> Any:
        num_dims = node.batch_dims
        first = next((v for v in values if v.ndim >= num_dims), None)
        batch_size = node.batch_size if first is None else first.shape[:num_dims]
        return type(node)(dict(zip(keys, values, strict=True)), batch_size=batch_size)

    return make


def _children(node: Any) -> tuple[list[Any], list[Any], _Make] | None:
    """Return `(keys, children, make)` of a container, None for a leaf."""
    if isinstance(node, torch.Tensor):
        return None
    kind = type(node)
    if kind is list or kind is tuple:
        return list(range(len(node))), list(node), kind
    if is_tensordict(node):
        keys = _sorted_keys(node)
        return keys, [node.get(key) for key in keys], _make_tensordict(node, keys)
    if isinstance(node, Mapping):
        keys = _sorted_keys(node)
        return keys, [node[key] for key in keys], _make_mapping(node, keys)
    if isinstance(node, tuple):
        names = getattr(node, "_fields", None)
        return list(names or range(len(node))), list(node), (lambda v: kind(*v)) if names else kind
    if isinstance(node, list):
        return list(range(len(node))), list(node), kind
    return _record_children(node)


def _record_children(node: Any) -> tuple[list[Any], list[Any], _Make] | None:
    """Return those of an attrs record or a dataclass, None for anything else."""
    kind: Any = type(node)
    if attrs.has(kind):
        names = {
            a.name: a.alias for a in attrs.fields(kind) if a.init
        }  # as an attribute, as an argument
        replace: Callable[..., Any] = attrs.evolve
    elif dataclasses.is_dataclass(kind):
        names = {f.name: f.name for f in dataclasses.fields(kind) if f.init}
        replace = dataclasses.replace
    else:
        return None
    return (
        list(names),
        [getattr(node, name) for name in names],
        lambda values: replace(node, **dict(zip(names.values(), values, strict=True))),
    )


def flatten(tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
    """Return the leaves of `tree` and a function that builds the same structure from other leaves.

    Effects: pure.

    Examples:
        >>> leaves, rebuild = flatten({"b": 1, "a": (2, [3])})
        >>> leaves, rebuild([x * 10 for x in leaves])
        ([2, 3, 1], {'b': 10, 'a': (20, [30])})
    """
    leaves: list[Any] = []
    build = _walk(tree, leaves)
    return leaves, lambda values: build(iter(values))


def _walk(node: Any, leaves: list[Any]) -> Callable[[Iterator[Any]], Any]:
    """Append the leaves of `node`, and return what builds it from an iterator over others.

    Not a closure that calls itself: it would be a cycle, and keep the leaves alive until the next garbage collection.
    """
    children = _children(node)
    if children is None:
        leaves.append(node)
        return next
    makers = [_walk(child, leaves) for child in children[1]]
    make = children[2]
    return lambda values: make([build(values) for build in makers])


def paths(tree: Tree, prefix: str = "") -> list[str]:
    """Return a name for each leaf, in the order of `flatten`; for error messages.

    Effects: pure.
    """
    children = _children(tree)
    if children is None:
        return [prefix or "the value itself"]
    return [
        path
        for key, child in zip(children[0], children[1], strict=True)
        for path in paths(child, f"{prefix}[{key!r}]")
    ]


def map_leaves(fn: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply `fn` to every leaf and return the same structure.

    Effects: pure, as far as `fn` is.
    """
    children = _children(tree)
    if children is None:
        return fn(tree)
    return children[2]([map_leaves(fn, child) for child in children[1]])


def reject(tree: Tree, leaf_number: int, what: str, fix: str) -> TreeError:
    """Return the error for leaf `leaf_number` of `tree`, with its path and type."""
    leaf = flatten(tree)[0][leaf_number]
    got = f"`{paths(tree)[leaf_number]}`, a {type(leaf).__name__}"
    shape = getattr(leaf, "shape", None)
    return TreeError(what, got=got if shape is None else f"{got} of shape {tuple(shape)}", fix=fix)


def is_dtensor(value: torch.Tensor) -> bool:
    """Whether a tensor is spread over ranks; never imports what can make one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(value: torch.Tensor) -> bool:
    """Whether this rank holds a part of a tensor only: of a DTensor, or of one that an engine has flattened."""
    return isinstance(value, FlatShard) or is_dtensor(value)


def local(value: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that is spread over ranks, sharing its memory; any other tensor itself."""
    if isinstance(value, FlatShard):
        return value.part
    return value.to_local() if is_dtensor(value) else value  # type: ignore[attr-defined]


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is spread over ranks as one, which is collective; any other itself."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


def empty_like(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return memory for another tensor that lies as `value` does, spread over the same ranks."""
    if isinstance(value, FlatShard):
        return value.like(torch.empty_like(value.part, dtype=dtype))
    return torch.empty_like(value.detach(), dtype=dtype)
