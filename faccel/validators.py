"""Validators for the fields of attrs records, made from `faccel.checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import attrs

from faccel.checks import finite, instance_of, integer, local_path, one_of, positive, shown
from faccel.errors import ConfigError, short_repr

R = TypeVar("R")
# A text, because `attrs.Attribute` cannot be subscripted at run time.
Validator = Callable[[object, "attrs.Attribute[Any]", Any], None]


def _validator(check: Callable[[str, Any], object], *, optional: bool) -> Validator:
    def validate(record: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value is None and optional:
            return
        # attrs calls a validator with the field, so that one check serves fields of any name
        check(attribute.name, value)

    return validate


def choice(*allowed: object, optional: bool = False) -> Validator:
    """Return a validator for a field that must be one of `allowed`, or None if it is `optional`.

    Effects: pure.
    """
    return _validator(lambda name, value: one_of(name, value, allowed), optional=optional)


def positive_number(*, optional: bool = False) -> Validator:
    """Return a validator for a field that must be a number above 0.

    Effects: pure.
    """
    return _validator(lambda name, value: positive(name, value), optional=optional)


def int_at_least(minimum: int, *, optional: bool = False) -> Validator:
    """Return a validator for a field that must be an int.

    Effects: pure.

    Args:
        minimum: The smallest valid int.
        optional: Whether None is valid.
    """
    return _validator(lambda name, value: integer(name, value, at_least=minimum), optional=optional)


def float_at_least(minimum: float, *, optional: bool = False) -> Validator:
    """Return a validator for a field that must be a finite number.

    Effects: pure.

    Args:
        minimum: The smallest valid number.
        optional: Whether None is valid.
    """
    return _validator(lambda name, value: finite(name, value, at_least=minimum), optional=optional)


def boolean(*, optional: bool = False) -> Validator:
    """Return a validator for a field that must be a bool.

    Effects: pure.

    Args:
        optional: Whether None is valid.
    """

    def check(name: str, value: object) -> None:
        # not `value in (True, False)`, which 0 and 1 pass
        if not isinstance(value, bool):
            raise ConfigError(
                f"`{name}` must be True or False", got=short_repr(value), fix=f"write `{name}=True`"
            )

    return _validator(check, optional=optional)


def text(example: str, *, optional: bool = False) -> Validator:
    """Return a validator for a field that must be a non-empty str.

    Effects: pure.

    Args:
        example: A value for the fix of the error.
        optional: Whether None is valid.
    """

    def check(name: str, value: object) -> None:
        instance_of(name, value, str, fix=f'write `{name}="{example}"`')
        if not value:
            raise ConfigError(
                f"`{name}` must not be empty", got="''", fix=f'write `{name}="{example}"`'
            )

    return _validator(check, optional=optional)


def folder(example: str) -> Validator:
    """Return a validator for a field that must be the path of a folder of this node.

    Effects: pure.

    Args:
        example: A value for the fix of the error.
    """
    check_text = text(example)

    def validate(record: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        check_text(record, attribute, value)
        local_path(attribute.name, value)

    return validate


def patterns(value: object) -> tuple[str, ...]:
    """Return a tuple of patterns for one pattern or several.

    Effects: pure.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable):
        return tuple(value)
    raise ConfigError(
        "name patterns must be a str or a tuple of str",
        got=shown(value),
        fix='write `"blocks.*"` or `("blocks.*", "head")`',
    )


def bool_field(*, default: bool) -> bool:
    """Return a field of an attrs record that must be a bool.

    Effects: pure.
    """
    return attrs.field(default=default, validator=boolean())


def construct(cls: Callable[..., R], fields: Mapping[str, object]) -> R:
    """Return a record from its fields; for `__reduce__`: a `MappingProxyType` has no pickle.

    Effects: pure.
    """
    return cls(**fields)
