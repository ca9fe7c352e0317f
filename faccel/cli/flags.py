"""Flags that are the fields of `Config`, made from the record itself, so that the two cannot drift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from faccel.config import Config, config_fields, flag_of, unreadable
from faccel.errors import ConfigError, FaccelError


class UsageError(click.ClickException):
    """An error of faccel about how it was called: exit code 2, and no traceback."""

    exit_code = 2

    def __init__(self, error: FaccelError) -> None:
        super().__init__(str(error))


def config_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command a flag for each field of `Config`."""
    for field in reversed(config_fields()):
        flag, doc = flag_of(field.name), str(field.metadata["doc"])
        if isinstance(field.default, bool):
            option = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=doc)
        else:
            option = click.option(
                flag, field.name, default=None, metavar="VALUE", help=f"{doc} [{field.default}]"
            )
        command = option(command)
    return command


def given_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that were given as flags, parsed and checked.

    Raises:
        UsageError: One is not what the field takes.
    """
    given: dict[str, Any] = {}
    for field in config_fields():
        text = options[field.name]
        if text is None:
            continue
        try:
            given[field.name] = text if isinstance(text, bool) else field.metadata["parse"](text)
            Config(**{field.name: given[field.name]})
        except ConfigError as error:
            raise UsageError(error) from None
        except ValueError as error:
            raise UsageError(
                unreadable(f"`{flag_of(field.name)}`", field, str(text), error)
            ) from None
    return given
