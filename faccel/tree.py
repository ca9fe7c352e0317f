"""Nested values: dicts, lists, tuples, named tuples, attrs records, dataclasses and TensorDicts.

Dicts are traversed in sorted key order, so that ranks agree on the order of the leaves although
they filled a dict in different orders. They are rebuilt in the order of the argument.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import attrs
import torch

from faccel.errors import TreeError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = ["find_batch_size", "map_leaves", "to_device"]  # the public ones

# Python's types cannot express "any nesting, records of the user included".
Tree = Any
"""A leaf, or any nesting of containers with leaves."""

_Build = Callable[[list[Tree]], Tree]
_IsLeaf = Callable[[Tree], bool]


class _Node(NamedTuple):
    """A container, taken apart: `build(children)` returns an equal one."""

    keys: Sequence[object]
    children: Sequence[Tree]
    build: _Build


def is_tensordict(value: object) -> bool:
    """Return whether `value` is a TensorDict; does not import tensordict."""
    # A TensorDict can only exist after the user has imported tensordict.
    module = sys.modules.get("tensordict")
    return module is not None and isinstance(value, module.TensorDictBase)


def _sorted_keys(mapping: Mapping[Tree, Tree]) -> list[Tree]:
    try:
        return sorted(mapping.keys())
    except TypeError:  # keys of several types
        return sorted(mapping.keys(), key=lambda key: (type(key).__name__, repr(key)))


def _mapping_builder(mapping: Mapping[Tree, Tree], keys: list[Tree]) -> _Build:
    # A mapping that cannot be changed becomes a dict.
    is_dict = type(mapping) is dict or not hasattr(mapping, "__setitem__")
    if not is_dict:
        return _mapping_subclass_builder(mapping, keys)
    order = list(mapping)

    def build(values: list[Tree]) -> Tree:
        by_key = dict(zip(keys, values, strict=True))
        if order == keys:  # no second dict for keys that are sorted already
            return by_key
        return {key: by_key[key] for key in order}

    return build


def _mapping_subclass_builder(mapping: Mapping[Tree, Tree], keys: list[Tree]) -> _Build:
    def build(values: list[Tree]) -> Tree:
        # A copy, because the constructor of a subclass may take other arguments than a mapping. It
        # keeps what is not a key: a default factory, the encodings of a tokenizer, ...
        result: Tree = copy.copy(mapping)
        for key, value in zip(keys, values, strict=True):
            result[key] = value
        return result

    return build


def _tensordict_builder(tensordict: Tree, keys: list[Tree]) -> _Build:
    def build(values: list[Tree]) -> Tree:
        # The batch size follows the leaves: a function of them may have changed the leading dims.
        num_dims = tensordict.batch_dims
        batch_size = tensordict.batch_size
        for value in values:
            if value.ndim >= num_dims:
                batch_size = value.shape[:num_dims]
                break
        return type(tensordict)(dict(zip(keys, values, strict=True)), batch_size=batch_size)

    return build


def _split(value: Tree) -> _Node | None:
    """Return a container's keys, children and builder; None for a leaf."""
    # First, because most leaves are tensors, and `isinstance` with `Mapping`, an ABC, is slower.
    if isinstance(value, torch.Tensor):
        return None
    cls = type(value)
    if cls is list or cls is tuple:  # the most frequent containers first
        return _Node(range(len(value)), list(value), cls)
    # Before `Mapping`, which a TensorDict is, too: its builder sets the batch size.
    if is_tensordict(value):
        keys = _sorted_keys(value)
        return _Node(keys, [value.get(key) for key in keys], _tensordict_builder(value, keys))
    if isinstance(value, Mapping):
        keys = _sorted_keys(value)
        return _Node(keys, [value[key] for key in keys], _mapping_builder(value, keys))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        # a named tuple takes its fields one by one, other tuples take an iterable
        return _Node(cls._fields, list(value), lambda values: cls(*values))
    if isinstance(value, tuple | list):
        return _Node(range(len(value)), list(value), cls)
    return _split_record(value)


def _split_record(value: Tree) -> _Node | None:
    """Return the node of an attrs record or a dataclass; None for anything else."""
    cls = type(value)
    # The name of each argument of the constructor, by field. Fields without one are left out: the
    # constructor computes them from the others.
    arguments: dict[str, str] = {}
    if attrs.has(cls):
        for attribute in attrs.fields(cls):
            if attribute.init:
                arguments[attribute.name] = attribute.alias  # an attribute `_x` is the argument `x`
        replace: Callable[..., Tree] = attrs.evolve
    elif dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            if field.init:
                arguments[field.name] = field.name
        replace = dataclasses.replace
    else:
        return None

    def build(values: list[Tree]) -> Tree:
        return replace(value, **dict(zip(arguments.values(), values, strict=True)))

    return _Node(list(arguments), [getattr(value, name) for name in arguments], build)


def flatten(
    tree: Tree, *, is_leaf: _IsLeaf | None = None
) -> tuple[list[Tree], Callable[[Sequence[Tree]], Tree]]:
    """Return the leaves of `tree` and a function that builds the same structure from other leaves.

    Effects: pure.

    Args:
        tree: A leaf or a container.
        is_leaf: Which containers are leaves; None is no container.

    Examples:
        >>> leaves, rebuild = flatten({"b": 1, "a": (2, [3])})
        >>> leaves, rebuild([x * 10 for x in leaves])
        ([2, 3, 1], {'b': 10, 'a': (20, [30])})
    """
    leaves: list[Tree] = []
    build = _collect(tree, leaves, is_leaf)
    return leaves, lambda values: build(iter(values))


def _collect(
    tree: Tree, leaves: list[Tree], is_leaf: _IsLeaf | None
) -> Callable[[Iterator[Tree]], Tree]:
    """Append the leaves of `tree`, and return what builds it from an iterator over other leaves.

    Not a closure that calls itself: that is a reference cycle, and would keep the leaves alive
    until the next garbage collection.
    """
    node = None
    if is_leaf is None or not is_leaf(tree):
        node = _split(tree)
    if node is None:
        leaves.append(tree)
        return next  # builds a leaf: the iterator yields the leaves in the order of `flatten`
    builders = [_collect(child, leaves, is_leaf) for child in node.children]
    build_node = node.build
    return lambda values: build_node([build(values) for build in builders])


def paths(tree: Tree, prefix: str = "") -> list[str]:
    """Return the path of each leaf, in the order of `flatten`; for error messages.

    Effects: pure.

    Examples:
        >>> paths({"x": [1, 2]})
        ["['x'][0]", "['x'][1]"]
    """
    # Not part of `flatten`: texts for each leaf would slow down every call for the rare error.
    node = _split(tree)
    if node is None:
        return [prefix or "the value itself"]
    result: list[str] = []
    for key, child in zip(node.keys, node.children, strict=True):
        result += paths(child, f"{prefix}[{key!r}]")
    return result


def map_leaves(fn: Callable[[Tree], Tree], tree: Tree) -> Tree:
    """Apply `fn` to every leaf and return the same structure.

    Effects: pure, as far as `fn` is.

    Examples:
        >>> map_leaves(lambda x: x + 1, {"x": [1, 2]})
        {'x': [2, 3]}
    """
    node = _split(tree)
    if node is None:
        return fn(tree)
    return node.build([map_leaves(fn, child) for child in node.children])


def to_device(tree: Tree, device: torch.device | str, *, non_blocking: bool = False) -> Tree:
    """Return the same structure with its tensors on a device; other leaves stay as they are.

    Effects: pure. Tensors that are on the device already are not copied.

    Args:
        tree: A tensor, or any nesting of them. Whatever else has a method `to` is moved by it, such
            as a `PackedSequence`.
        device: Where to, for example `ctx.device`.
        non_blocking: Whether copies from pinned memory may overlap with computation.

    Examples:
        >>> batch = to_device({"x": torch.zeros(2), "text": ["a", "b"]}, "meta")
        >>> batch["x"].device, batch["text"]
        (device(type='meta'), ['a', 'b'])
    """
    # A mapping with such a method, as a tokenizer's `BatchEncoding`, would move itself in place.
    moves_in_place = isinstance(tree, Mapping) and not is_tensordict(tree)
    move: Tree = getattr(tree, "to", None)
    if move is not None and not moves_in_place:
        return move(device, non_blocking=non_blocking)
    node = _split(tree)
    if node is None:
        return tree
    return node.build(
        [to_device(child, device, non_blocking=non_blocking) for child in node.children]
    )


def find_batch_size(tree: Tree) -> int:
    """Return the number of rows of a batch: the length along dim 0 of its tensors and arrays.

    Effects: pure.

    Args:
        tree: A batch. Leaves without a dim 0 have no rows, such as numbers and 0-d tensors.

    Raises:
        TreeError: It has no tensor with rows, or one with another number of rows; names it.

    Examples:
        >>> find_batch_size({"x": torch.zeros(4, 2), "y": torch.zeros(4), "epoch": 3})
        4
    """
    size: int | None = None
    for index, leaf in enumerate(flatten(tree)[0]):
        # Arrays of NumPy as well, which a `collate_fn` may keep.
        if getattr(leaf, "ndim", 0) == 0:
            continue
        if size is not None and len(leaf) != size:
            problem = f"the tensors of a batch must have one number of rows; another one has {size}"
            raise leaf_error(tree, index, problem, "pass the tensors with a row for each sample")
        size = len(leaf)
    if size is None:
        raise TreeError(
            "a batch without a tensor has no number of rows",
            got=f"a {type(tree).__name__}",
            fix="pass the batch that a loader yields, such as `batch.data`",
        )
    return size


def leaf_error(tree: Tree, index: int, problem: str, fix: str) -> TreeError:
    """Return the error for leaf `index` of `tree`, with its path, type and shape.

    Effects: pure.

    Examples:
        >>> leaf_error({"x": torch.zeros(2)}, 0, "`gather` expects numbers", "pass a float").got
        "`['x']`, a Tensor of shape (2,)"
    """
    leaf = flatten(tree)[0][index]
    got = f"`{paths(tree)[index]}`, a {type(leaf).__name__}"
    shape = None
    if not getattr(leaf, "is_nested", False):  # such a tensor raises for its shape
        shape = getattr(leaf, "shape", None)
    if shape is not None:
        got = f"{got} of shape {tuple(shape)}"
    return TreeError(problem, got=got, fix=fix)


class ShardedTensor(Protocol):
    """What a `DTensor` and a `FlatShard` have in common."""

    def to_local(self) -> torch.Tensor:
        """Return this rank's shard; aliases the tensor."""
        ...

    def full_tensor(self) -> torch.Tensor:
        """Return the full tensor on every rank. Collective."""
        ...


def is_sharded(value: object) -> TypeIs[ShardedTensor]:
    """Return whether this rank stores only a shard of a tensor: a DTensor or a `FlatShard`.

    Effects: pure. True for a DTensor that is replicated, too.
    """
    # The class, because under torch.compile (2.13) `hasattr` of a DTensor itself is False. And not
    # `isinstance` of the protocol, which takes 1 µs.
    return hasattr(type(value), "full_tensor")


def is_dtensor(value: object) -> bool:
    """Return whether a tensor is a DTensor; does not import `torch.distributed.tensor`."""
    # A DTensor can only exist after its module was imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def has_inner_tensors(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a wrapper of other tensors, such as a quantized one of torchao.

    Effects: pure. False for a DTensor, whose shards are stored.
    """
    if type(tensor) is torch.Tensor or is_sharded(tensor):
        return False
    return hasattr(tensor, "__tensor_flatten__") and hasattr(type(tensor), "__tensor_unflatten__")


def local_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a sharded tensor, which it aliases; any other tensor itself.

    Of weights that FSDP2 gathers in fp8 it is a plain, detached tensor of the stored elements.
    """
    if not is_sharded(value):
        return value
    # The attribute: `to_local` of such a weight makes a copy of the wrapper, and writing into that
    # does not change the version of the weight.
    local = getattr(value, "_local_tensor", None)
    if is_cast_shard(local):
        return plain_tensor(local)
    return value.to_local()


def is_cast_shard(local: object) -> TypeIs[torch.Tensor]:
    """Return whether FSDP2 casts a shard before it gathers it, such as to fp8.

    Effects: pure.
    """
    return hasattr(type(local), "fsdp_pre_all_gather")  # the method of FSDP2's protocol


def plain_tensor(local: torch.Tensor) -> torch.Tensor:
    """Return the elements of a shard that FSDP2 casts, which it aliases; any other shard itself.

    Effects: pure.
    """
    if is_cast_shard(local):
        return getattr(local, "_tensor", local)  # of torchao's class
    return local


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor in full, which is collective; any other tensor itself."""
    if is_sharded(value):
        return value.full_tensor()
    return value
