"""Whether the nodes of a state have the fields of their kinds.

`save` checks what it is about to write, `load` what it has read: both refuse the same nodes, so
that `save` never writes what `load` cannot read. Any program may have written what `load` reads.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs

from faccel.checkpoint.codec import Node, kind_of
from faccel.checkpoint.json_values import MAX_INT_BITS
from faccel.checkpoint.tensor_names import MAX_DEPTH, child_name, item_name
from faccel.errors import short_text

# The dtypes of numpy whose items are numbers, as `dtype.str` returns them.
_ARRAY_DTYPE = re.compile(r"[<>|=][biufc]\d{1,2}")
_KEY_KINDS = ("plain", "float", "bytes", "dtype", "tuple")

Children = Iterable[tuple[str, Node]]
"""Nodes inside of a node, each with its path."""


@attrs.frozen
class _Kind:
    """A kind of nodes.

    Args:
        checks: For each field that it must have, whether a value is valid.
        optional: The same for fields that may be missing.
        children: Returns the nodes inside of a valid one, from it and its path.
        tensors: Returns the names of its tensors in the files, from it and its path.
    """

    checks: Mapping[str, Callable[[Node], bool]] = attrs.field(factory=dict)
    optional: Mapping[str, Callable[[Node], bool]] = attrs.field(factory=dict)
    children: Callable[[Node, str], Children] = lambda node, path: ()
    tensors: Callable[[Node, str], Iterable[str]] = lambda node, path: ()


def check_nodes(state: Node) -> set[str]:
    """Raise unless all nodes are valid; return the names of their tensors in the files.

    Effects: pure. Nodes of an unknown kind, which a newer version may have written, are left out:
    they raise when they are loaded.

    Raises:
        ValueError: A node has wrong fields, or is nested too deeply; the message names it.

    Examples:
        >>> sorted(check_nodes({"x": {"!": "tensor"}, "lr": 0.1, "y": [{"!": "complex"}]}))
        ['x', 'y/0']
        >>> check_nodes({"x": {"!": "tuple", "v": 3}})
        Traceback (most recent call last):
        ValueError: `x`: the field `v` of a tuple is invalid
    """
    tensors: set[str] = set()
    # A list and not a recursion: the nesting is what is checked.
    pending: list[tuple[str, Node, int]] = [("", state, 0)]
    while pending:
        path, node, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"`{short_text(path)}` is nested more than {MAX_DEPTH} levels deep")
        kind = _checked_kind(node, path)
        if kind is None:
            continue
        tensors.update(kind.tensors(node, path))
        for child_path, child in kind.children(node, path):
            pending.append((child_path, child, depth + 1))
    return tensors


def _checked_kind(node: Node, path: str) -> _Kind | None:
    """Return the kind of a node after a check of its fields; None if it is unknown."""
    name = kind_of(node)
    if not _is_text(name):  # it comes from a file
        raise ValueError(f"`{short_text(path)}`: the kind is no string")
    if name == "plain":
        if not _is_plain(node):
            raise ValueError(f"`{short_text(path)}`: {type(node).__name__} that JSON cannot store")
        return _PLAIN
    if "!" not in node:  # a JSON list or object
        return _LIST if isinstance(node, list) else _ENTRIES
    kind = KINDS.get(name)
    if kind is not None:
        _check_fields(node, name, kind, path)
    return kind


def _check_fields(node: Node, name: str, kind: _Kind, path: str) -> None:
    for field, is_valid in {**kind.checks, **kind.optional}.items():
        is_needed = field in node or field in kind.checks
        if is_needed and not (field in node and is_valid(node[field])):
            raise ValueError(f"`{short_text(path)}`: the field `{field}` of a {name} is invalid")


# Checks of fields.


def _is_plain(value: Node) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return value.bit_length() <= MAX_INT_BITS
    return value is None or type(value) in (bool, str)


def _is_any(value: Node) -> bool:
    return True


def _is_bool(value: Node) -> bool:
    return type(value) is bool


def _is_text(value: Node) -> bool:
    return type(value) is str


def _is_text_or_none(value: Node) -> bool:
    return value is None or type(value) is str


def _is_count(value: Node) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: Node) -> bool:
    return _is_count(value) and value != 0


def _is_list(value: Node) -> bool:
    return type(value) is list


def _is_counts(value: Node) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_entries(value: Node) -> bool:
    # A key `"!"` makes a dict a node of another kind, which has no entries.
    if not isinstance(value, dict) or "!" in value:
        return False
    return all(isinstance(key, str) for key in value)


def _is_versions(value: Node) -> bool:
    return _is_entries(value) and all(map(_is_plain, value.values()))


def _is_base64(value: Node) -> bool:
    try:
        base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return False
    return True


def _is_not_finite(value: Node) -> bool:
    return value in ("nan", "inf", "-inf")


def _is_complex(value: Node) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_text, value)):
        return False
    try:
        for text in value:
            float.fromhex(text)
    except (ValueError, OverflowError):
        return False
    return True


def _is_array_dtype(value: Node) -> bool:
    return isinstance(value, str) and _ARRAY_DTYPE.fullmatch(value) is not None


def _is_tensor(value: Node) -> bool:
    return isinstance(value, dict) and value.get("!") in ("tensor", "complex", "bits")


def _is_keys(value: Node) -> bool:
    return isinstance(value, list) and all(map(_is_key, value))


def _is_key(node: Node) -> bool:
    if kind_of(node) not in _KEY_KINDS:
        return False
    _checked_kind(node, "a key")
    if kind_of(node) == "tuple":
        return all(kind_of(item) != "tuple" and _is_key(item) for item in node["v"])
    return True


def _is_optimizer(value: Node) -> bool:
    if not _is_entries(value) or value.keys() != {"state", "param_groups", "rest"}:
        return False
    groups = value["param_groups"]
    return isinstance(groups, list) and all(map(_is_group, groups))


def _is_group(value: Node) -> bool:
    if not _is_entries(value):
        return False
    names = value.get("params")
    return isinstance(names, list) and all(map(_is_text, names)) and len(set(names)) == len(names)


def _is_ema_options(value: Node) -> bool:
    if not isinstance(value, dict) or value.keys() != {"decay", "warmup", "buffers"}:
        return False
    decay = value["decay"]
    if type(decay) not in (int, float) or not 0 <= decay <= 1:
        return False
    return _is_bool(value["warmup"]) and value["buffers"] in ("copy", "average")


# Nodes inside of nodes. Their paths are those that the codecs give them.


def _value(node: Node, path: str) -> Children:
    return [(path, node["v"])]


def _items(node: Node, path: str) -> Children:
    return _items_of_list(node["v"], path)


def _items_of_list(nodes: list[Node], path: str) -> Children:
    return [(item_name(path, index), child) for index, child in enumerate(nodes)]


def _entries(node: Node, path: str) -> Children:
    return _entries_of_dict(node["v"], path)


def _entries_of_dict(nodes: Mapping[str, Node], path: str) -> Children:
    return [(child_name(path, key), child) for key, child in nodes.items()]


def _keyed(node: Node, path: str) -> Iterator[tuple[str, Node]]:
    keys, nodes = node["k"], node["v"]
    if len(keys) != len(nodes):
        raise ValueError(f"`{short_text(path)}` has {len(keys)} keys and {len(nodes)} values")
    for key in keys:
        yield path, key
    for key, child in zip(keys, nodes, strict=True):
        yield child_name(path, _key(key)), child


def _key(node: Node) -> object:
    """Return a key of a mapping, to name its value by."""
    kind = kind_of(node)
    if kind == "plain":
        return node
    if kind == "tuple":
        return tuple(map(_key, node["v"]))
    if kind == "bytes":
        return base64.b64decode(node["v"])
    if kind == "float":
        return float(node["v"])
    return _DtypeName(node["v"])


@attrs.frozen
class _DtypeName:
    """The name of a dtype, with the `repr` of the dtype."""

    name: str

    def __repr__(self) -> str:
        return f"torch.{self.name}"


def _per_rank(node: Node, path: str) -> Children:
    children: list[tuple[str, Node]] = []
    for rank, child in enumerate(node["v"]):
        children.append((_rank_name(path, rank), child))
    return children


def _rank_name(path: str, rank: int) -> str:
    return child_name(path, f"rank-{rank:05d}")


def _wrapper(node: Node, path: str) -> Iterator[tuple[str, Node]]:
    yield from _entries(node, path)
    if "context" in node:
        yield child_name(path, "context"), node["context"]


def _own_path(node: Node, path: str) -> Iterable[str]:
    return (path,)


_TENSOR = _Kind(tensors=_own_path)
_PLAIN = _Kind()
_LIST = _Kind(children=_items_of_list)
_ENTRIES = _Kind(children=_entries_of_dict)
_SEQUENCE = _Kind({"v": _is_list}, children=_items)
_MAPPING = _Kind({"k": _is_keys, "v": _is_list}, children=_keyed)

KINDS: dict[str, _Kind] = {
    "tensor": _TENSOR,
    "complex": _TENSOR,
    "bits": attrs.evolve(_TENSOR, checks={"dtype": _is_text}),
    "array": _Kind(
        {"v": _is_tensor, "dtype": _is_array_dtype, "scalar": _is_bool}, children=_value
    ),
    "float": _Kind({"v": _is_not_finite}),
    "bytes": _Kind({"v": _is_base64}),
    "complex number": _Kind({"v": _is_complex}),
    "dtype": _Kind({"v": _is_text}),
    "device": _Kind({"v": _is_text}),
    "list": _SEQUENCE,
    "tuple": _SEQUENCE,
    "set": _SEQUENCE,
    "frozenset": _SEQUENCE,
    "Size": _Kind({"v": _is_counts}, children=_items),
    "dict": _MAPPING,
    "OrderedDict": _MAPPING,
    "Counter": _MAPPING,
    "record": _Kind(
        {"class": _is_text, "v": _is_entries},
        {"own": _is_bool, "tuple": _is_bool},
        children=_entries,
    ),
    "module": _Kind(
        {"v": _is_entries},
        {"versions": _is_versions, "trained_only": _is_bool, "imported": _is_bool},
        children=_entries,
    ),
    "stateful": _Kind({"v": _is_any}, {"imported": _is_bool}, children=_value),
    "optimizer": _Kind({"v": _is_optimizer}, children=_entries),
    "rng": _Kind({"ranks": _is_positive, "device": _is_bool}, {"device_type": _is_text}),
    "ema": _Kind(
        {"v": _is_entries, "num_updates": _is_count, "options": _is_ema_options},
        children=_entries,
    ),
    "tensordict": _Kind({"batch_size": _is_counts, "v": _is_entries}, children=_entries),
    "per_rank": _Kind({"v": _is_list}, children=_per_rank),
    "wrapper": _Kind(
        {
            "class": _is_text,
            "shape": _is_counts,
            "stride": _is_counts,
            "context_text": _is_text_or_none,
            "v": _is_entries,
        },
        {"context": _is_any},
        children=_wrapper,
    ),
}
"""The kinds of all codecs."""
