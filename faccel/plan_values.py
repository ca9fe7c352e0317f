"""A plan as values of a configuration file, or as one line of text for a flag or a variable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import attrs

from faccel.checks import shown
from faccel.errors import ConfigError, nearest, short_repr, short_text
from faccel.plan import (
    ActivationCheckpointing,
    Compile,
    DdpConfig,
    DeepSpeedConfig,
    Fp8,
    FsdpConfig,
    LayerwiseCasting,
    PipelineConfig,
    Plan,
    PowerSgdConfig,
)
from faccel.plan_units import TransformerEngineConfig

# The fields that are records, by the record that has them.
_RECORDS: Mapping[type, Mapping[str, type]] = {
    Plan: {
        "activation_checkpoint": ActivationCheckpointing,
        "compile": Compile,
        "ddp": DdpConfig,
        "deepspeed": DeepSpeedConfig,
        "fp8": Fp8,
        "fsdp": FsdpConfig,
        "layerwise_casting": LayerwiseCasting,
        "pipeline": PipelineConfig,
    },
    DdpConfig: {"powersgd": PowerSgdConfig},
    Fp8: {"te": TransformerEngineConfig},
}
_FIXES: Mapping[str, str] = {
    "compile": "write `compile: units`, or `--compile what=units,mode=max-autotune`",
    "plan": "write `plan: {units: Block, offload: true}` or `--plan units=Block,offload=true`",
}
_WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "none": None}


def to_plan(value: object) -> Plan:
    """Return the plan for a text, or for a mapping as a configuration file has it.

    Effects: pure.

    Args:
        value: A `Plan`, its fields as a mapping, or text such as
            `"units=Block,fsdp.prefetch=1,tensor.blocks.*.up=colwise"`. A list is in brackets:
            `"units=[Block,Head]"`.

    Raises:
        ConfigError: A field is unknown, or its value invalid.

    Examples:
        >>> to_plan("units=Block,offload=true") == to_plan({"units": "Block", "offload": True})
        True
        >>> to_plan("fsdp.prefetch=2").fsdp.prefetch
        2
    """
    return _converted(Plan, "plan", value)


def to_compile(value: object) -> Compile:
    """Return the compilation for `"whole"`, `"units"`, or the fields of `Compile`.

    Effects: pure.

    Raises:
        ConfigError: A field is unknown, or its value invalid.

    Examples:
        >>> to_compile("what=units,mode=max-autotune").mode
        'max-autotune'
    """
    if isinstance(value, str) and "=" not in value:
        value = {"what": value}
    return _converted(Compile, "compile", value)


def _converted(cls: type, name: str, value: object) -> Any:
    if isinstance(value, cls):
        return value
    if isinstance(value, str):
        value = _parsed(name, value)
    if not isinstance(value, Mapping):
        problem = f"`{name}` must be a `{cls.__name__}`, a mapping or text"
        raise ConfigError(problem, got=shown(value), fix=_FIXES[name])
    try:
        return _record(cls, value, name)
    except ConfigError as error:
        if error.problem.startswith(f"`{name}"):
            raise
        problem = f"`{name}` has an invalid value: {error.problem}"
        raise ConfigError(problem, got=error.got, fix=error.fix) from None


def _parsed(record: str, text: str) -> dict[str, Any]:
    """Return the values of `name=value,record.name=value`."""
    entries: list[tuple[str, object]] = []
    for entry in _entries_of(text):
        name, mark, value = entry.partition("=")
        # No name of a class begins with "=", and a bracket that is not closed is a typing error.
        is_value = not value.startswith("=") and value.count("[") == value.count("]")
        if not mark or not name.strip() or not is_value:
            problem = f"`{record}` must be entries `name=value`"
            raise ConfigError(problem, got=short_repr(entry), fix=_FIXES[record])
        entries.append((name.strip(), _scalar(value.strip())))
    return nested(entries, record=record)


def nested(entries: Iterable[tuple[str, object]], *, record: str = "plan") -> dict[str, Any]:
    """Return the section `plan` of a configuration file for values by dotted name.

    Effects: pure.

    Raises:
        ConfigError: A name occurs twice, or has both a value and fields.

    Examples:
        >>> nested([("offload", True), ("fsdp.prefetch", 1), ("tensor.blocks.*.up", "colwise")])
        {'offload': True, 'fsdp': {'prefetch': 1}, 'tensor': {'blocks.*.up': 'colwise'}}
    """
    values: dict[str, Any] = {}
    for name, value in entries:
        path = name.split(".")
        if path[0] == "tensor":  # whose keys are patterns of names, with dots
            path = ["tensor", ".".join(path[1:])]
        _set(values, path, value, record)
    return values


def _entries_of(text: str) -> list[str]:
    """Return the parts between commas, except those within brackets. Takes linear time."""
    entries: list[str] = []
    parts: list[str] = []
    num_open = 0
    for part in text.split(","):
        parts.append(part)
        num_open += part.count("[") - part.count("]")
        if num_open <= 0:
            entries.append(",".join(parts))
            parts, num_open = [], 0
    if parts:  # a bracket that is not closed
        entries.append(",".join(parts))
    return entries


def _set(values: dict[str, Any], path: list[str], value: object, record: str) -> None:
    # A mapping for each part of the name but the last one.
    fields = values
    for name in path[:-1]:
        child = fields.setdefault(name, {})
        if not isinstance(child, dict):
            raise _two_values(record, name, child, path)
        fields = child
    if path[-1] in fields:
        raise _two_values(record, path[-1], fields[path[-1]], path)
    fields[path[-1]] = value


def _two_values(record: str, name: str, value: object, path: list[str]) -> ConfigError:
    return ConfigError(
        f"`{record}` has two values for `{short_text(name)}`",
        got=f"{short_repr(value)} and `{short_text('.'.join(path))}`",
        fix="remove one of the two",
    )


def _scalar(text: str) -> object:
    if text.startswith("[") and text.endswith("]"):
        return tuple(_scalar(item.strip()) for item in text[1:-1].split(",") if item.strip())
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for parse in (int, float):
        with suppress(ValueError):
            return parse(text)
    return text


def _record(cls: type, values: Mapping[Any, Any], path: str) -> Any:
    """Return a record of `cls` for the values of its fields."""
    known = [field.name for field in attrs.fields(cls)]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(
                f"`{path}.{short_text(name)}` is not a field of `{cls.__name__}`",
                got=f"{short_text(name)}={short_repr(value)}",
                fix=nearest(str(name), known),
            )
        field_type = _RECORDS.get(cls, {}).get(name)
        if field_type is not None and isinstance(value, Mapping):
            value = _record(field_type, value, f"{path}.{name}")
        # A record that is left out has its defaults; YAML writes an empty value as null.
        if value is not None:
            arguments[name] = value
    try:
        return cls(**arguments)
    except TypeError as error:  # a field without a default is missing
        problem = f"`{path}` is incomplete"
        raise ConfigError(problem, got=str(error), fix=_FIXES["plan"]) from None


def plan_values(record: Plan | Compile) -> dict[str, Any]:
    """Return the fields that differ from the defaults, as a configuration file has them.

    Effects: pure.

    Examples:
        >>> plan_values(to_plan("units=Block,activation_checkpoint=full,fsdp.prefetch=1"))
        {'fsdp': {'prefetch': 1}, 'units': 'Block', 'activation_checkpoint': 'full'}
    """
    return _values(record)


def _values(record: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in attrs.fields(type(record)):
        value, default = getattr(record, field.name), field.default
        if field.name == "tensor":  # whose default is made by a factory
            default = {}
        if value != default:
            values[field.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    """Return a value of a field as YAML, JSON and TOML have it."""
    if isinstance(value, ActivationCheckpointing):
        fields = _values(value)
        if not fields:
            return "full"
        return fields
    if isinstance(value, Compile) and attrs.evolve(value, what="whole") == Compile():
        return value.what
    if attrs.has(type(value)):
        return _values(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    # One name is written without brackets; the fields accept both.
    if isinstance(value, tuple) and len(value) == 1:
        return value[0]
    if isinstance(value, tuple):
        return list(value)
    return value


def record_text(record: Plan | Compile) -> str:
    """Return a record as one line of text, which `to_plan` or `to_compile` parses.

    Effects: pure.

    Examples:
        >>> record_text(to_plan({"units": ["Block", "Head"], "fsdp": {"prefetch": 1}}))
        'fsdp.prefetch=1,units=[Block,Head]'
        >>> record_text(Compile("units"))
        'units'
    """
    plain = _plain(record)
    if isinstance(plain, str):
        return plain
    # The defaults of `Plan` are empty text, which is no value of a variable.
    return ",".join(_entries(plan_values(record), "")) or f"{type(record).__name__}()"


def _entries(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_text(value)}"


def _text(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):  # as in YAML
        return str(value).lower()
    return str(value)
