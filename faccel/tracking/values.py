"""From the values and records of a user to what trackers write: numbers, text and JSON."""

from __future__ import annotations

import argparse
import json
import math
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, SupportsFloat

import attrs
import torch

from faccel.errors import ConfigError, short_repr
from faccel.tree import is_dtensor, is_sharded


def plain_value(value: object) -> object:
    """Return a number, or a tensor of one element, as a float; any other value as it is.

    Effects: ambient. Waits for the device of a tensor of one element.

    Raises:
        ConfigError: The value is a shard of a tensor.

    Examples:
        >>> plain_value(torch.ones(1, requires_grad=True)), plain_value(3), plain_value("warm-up")
        (1.0, 3.0, 'warm-up')
    """
    # First, because most values are numbers, and `SupportsFloat` below takes microseconds.
    if type(value) is float or type(value) is int:
        return float(value)
    if isinstance(value, str | bytes):  # before NumPy's strings are asked for their `item`
        return value
    if isinstance(value, torch.Tensor):
        # Detached: a tracker that keeps the tensor must not keep the graph of the step.
        value = full_tensor_of(value).detach()
    # A number has no shape, and the product of none is 1, as of `()`.
    num_elements = math.prod(getattr(value, "shape", ()))
    if num_elements != 1:
        return value
    item = getattr(value, "item", None)
    if item is not None:
        value = item()
    if isinstance(value, SupportsFloat):
        return float(value)
    return value


def full_tensor_of(tensor: Any) -> torch.Tensor:
    """Return a tensor without its placements, if that needs no other rank.

    Effects: pure.

    Raises:
        ConfigError: The value is a shard of a tensor.
    """
    # a DTensor that every rank has in full
    if is_dtensor(tensor) and all(placement.is_replicate() for placement in tensor.placements):
        return tensor.to_local()
    if not is_sharded(tensor):
        return tensor
    # Rank 0 alone converts values, so that a collective would wait for the other ranks forever.
    raise ConfigError(
        "the value is a shard of a tensor",
        got=type(tensor).__name__,
        fix="log `value.full_tensor()`, which every rank must call",
    )


def record_fields(record: object) -> dict[str, object] | None:
    """Return the fields of a mapping, a dataclass, an attrs record or a namespace; else None.

    Effects: pure. The values are not copied.

    Examples:
        >>> record_fields(argparse.Namespace(lr=0.1))
        {'lr': 0.1}
    """
    if isinstance(record, Mapping):
        return {str(key): value for key, value in record.items()}
    if isinstance(record, type):  # a class has the fields, but no values
        return None
    if isinstance(record, argparse.Namespace | types.SimpleNamespace):
        return dict(vars(record))
    names: Mapping[str, object] = {}
    if is_dataclass(record):
        names = record.__dataclass_fields__
    elif attrs.has(type(record)):
        names = attrs.fields_dict(type(record))
    else:
        return None
    return {name: getattr(record, name) for name in names if hasattr(record, name)}


def run_config(config: object) -> dict[str, object]:
    """Return the configuration of a run as a dict.

    Effects: pure. The values are not copied.

    Raises:
        ConfigError: It has no named fields.

    Examples:
        >>> run_config(3)
        Traceback (most recent call last):
        faccel.errors.ConfigError: `config` must have named fields. Got an object of type int.
        To fix: pass a dict, a dataclass or the `Namespace` of argparse.
    """
    if config is None:
        return {}
    fields = record_fields(config)
    # Objects of other libraries, such as the `TrainingArguments` of older transformers.
    if fields is None and hasattr(config, "__dict__") and not callable(config):
        fields = dict(vars(config))
    if fields is None:
        raise ConfigError(
            "`config` must have named fields",
            got=f"an object of type {type(config).__name__}",
            fix="pass a dict, a dataclass or the `Namespace` of argparse",
        )
    return fields


def to_json(value: Any) -> Any:
    """Return a value as JSON: records as objects, tensors as lists, anything else as its text.

    Effects: ambient. Waits for the device of a tensor.

    Examples:
        >>> to_json({"lr": 0.1, ("a", 1): torch.arange(2), "dtype": torch.float32})
        {'lr': 0.1, "('a', 1)": [0, 1], 'dtype': 'torch.float32'}
    """
    if type(value) is float or value is None or isinstance(value, str | bool | int | float):
        return value
    # Before the tests for other records, which take longer: each line of a log is one.
    if type(value) is dict:
        return {str(key): to_json(item) for key, item in value.items()}
    fields = record_fields(value)
    if fields is not None:
        return {key: to_json(item) for key, item in fields.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return _leaf(value)


def _leaf(value: Any) -> Any:
    """Return a tensor or an array as lists, anything else as its text."""
    # What has no values or no text, such as a tensor on `meta`, must not lose the other values.
    try:
        # The class `np.float32` has the method, too.
        if hasattr(value, "tolist") and not isinstance(value, type):
            return to_json(value.tolist())
        return str(value)
    except Exception:
        return short_repr(value)


def json_text(values: Mapping[str, object], *, indent: int | None = None) -> str:
    """Return values as an object of JSON. One that JSON cannot have is its shortened text.

    Effects: ambient. Waits for the device of a tensor.

    Examples:
        >>> parents: list[object] = [1]
        >>> parents.append(parents)
        >>> json_text({"lr": 0.1, "parents": parents})
        '{"lr": 0.1, "parents": "[1, [1, [1, [...]]]]"}'
    """
    try:
        return json.dumps(to_json(values), indent=indent)
    # A list that contains itself, or an integer of too many digits
    except (RecursionError, ValueError):
        return json.dumps(json_values(values), indent=indent)


def json_values(values: Mapping[str, object]) -> dict[str, Any]:
    """Return each value as JSON; one that JSON cannot have as its shortened text.

    Effects: ambient. Waits for the device of a tensor.
    """
    converted: dict[str, Any] = {}
    for name, value in values.items():
        try:
            converted[str(name)] = to_json(value)
            json.dumps(converted[str(name)])
        except (RecursionError, ValueError):
            converted[str(name)] = short_repr(value)
    return converted
