"""Codec of records: attrs classes, dataclasses and named tuples.

A checkpoint cannot name a class to import, because that would execute code. So the class is the
target's, except for faccel's own records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import attrs

from faccel.checkpoint.codec import (
    Codec,
    Decoder,
    Encoder,
    Node,
    Restore,
    mismatch,
    restore_all,
)
from faccel.checkpoint.tensor_names import child_name
from faccel.checks import shown
from faccel.data.order import Cursor
from faccel.errors import CheckpointError, short_text
from faccel.training.precision import ScalerState
from faccel.tree import Tree

_FACCEL_RECORDS: dict[str, type] = {"Cursor": Cursor, "ScalerState": ScalerState}
_TRANSIENT_FIELDS = {"ScalerState": ("stepped", "unscaled", "has_skipped_window")}
# Fields that were added: without a value, a checkpoint is the one of earlier versions.
_OPTIONAL_FIELDS = {"ScalerState": ("max_rows",)}


def field_values(record: object) -> dict[str, Tree] | None:
    """Return the fields of an attrs record, dataclass or named tuple; None for any other value.

    Effects: pure.
    """
    names = _field_names(type(record))
    if names is None:
        return None
    return {name: getattr(record, name) for name in names}


def _field_names(cls: type) -> Sequence[str] | None:
    if issubclass(cls, tuple):
        return getattr(cls, "_fields", None)
    if attrs.has(cls):
        fields = attrs.fields(cls)
    elif dataclasses.is_dataclass(cls):
        fields = dataclasses.fields(cls)
    else:
        return None
    # A field that `__init__` does not accept is derived from the others.
    return [field.name for field in fields if field.init]


def _is_record(value: object) -> bool:
    return _field_names(type(value)) is not None


def _is_left_out(name: str, field: str, value: object) -> bool:
    """Return whether a checkpoint does not have a field of a record of faccel."""
    # A transient field belongs to the current step, which ends with the process.
    if field in _TRANSIENT_FIELDS.get(name, ()):
        return True
    return value is None and field in _OPTIONAL_FIELDS.get(name, ())


def _encode_record(value: object, path: str, encoder: Encoder) -> Node:
    name = type(value).__name__
    is_faccel, is_tuple = _FACCEL_RECORDS.get(name) is type(value), isinstance(value, tuple)
    # A named tuple can come back as a tuple; any other record needs its class.
    if encoder.is_inside_stateful and not is_faccel and not is_tuple:
        raise CheckpointError(
            f"`{path}` is a record inside a `state_dict`, whose class is unknown when it is loaded",
            got=f"an object of type {name}",
            fix="return its fields as a dict from that object's `state_dict`",
        )
    nodes: dict[str, Node] = {}
    for field, child in (field_values(value) or {}).items():
        if is_faccel and _is_left_out(name, field, child):
            continue
        nodes[field] = encoder.encode(child, child_name(path, field))
    return {"!": "record", "class": name, "own": is_faccel, "tuple": is_tuple, "v": nodes}


def _decode_record(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    cls = type(target)
    if node.get("own"):
        cls = _FACCEL_RECORDS.get(node["class"])
        if cls is None:
            got = f"a record of the unknown class `{short_text(node['class'])}`"
            raise mismatch(path, got, "update faccel")
    targets = field_values(target) or {}
    restores: dict[str, Restore] = {}
    for field, child in node["v"].items():
        restores[field] = decoder.decode(child, targets.get(field), child_name(path, field))
    if node.get("own"):
        return lambda: _build_faccel_record(cls, restores, path)
    if cls.__name__ == node["class"]:
        return lambda: _build_record(cls, restore_all(restores))
    if node.get("tuple"):  # without its class, a named tuple becomes an equal tuple
        return lambda: tuple(restore_all(restores).values())
    raise mismatch(
        path,
        f"a {node['class']} in the checkpoint, a {cls.__name__} in the state",
        f"put a {node['class']} into the state, so that its class is known",
    )


def _build_faccel_record(cls: type, restores: Mapping[str, Restore], path: str) -> object:
    """Return a record of faccel, after a check of the types of its fields."""
    defaults: dict[str, object] = {}
    for field in attrs.fields(cls):
        defaults[field.name] = field.default
    values = restore_all(restores)
    for name, value in values.items():
        default = defaults.get(name)
        expected = (type(default),)
        if isinstance(default, float):
            expected = (int, float)
        # a default of None may stand for any value
        is_valid = default is None or type(value) in expected
        if name not in defaults or not is_valid:
            raise mismatch(child_name(path, name), f"{shown(value)}, in a {cls.__name__}")
    return _build_record(cls, values)


def _build_record(cls: type, arguments: dict[str, Tree]) -> object:
    if attrs.has(cls):  # it strips leading underscores from the names of arguments
        for field in attrs.fields(cls):
            if field.name in arguments:
                arguments[field.alias] = arguments.pop(field.name)
    return cls(**arguments)


RECORD = Codec(("record",), _is_record, _encode_record, _decode_record)
