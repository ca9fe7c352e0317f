"""A flag for each field of `Config`, derived from the record, so that the two always agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from faccel.checks import local_path
from faccel.config import Config, config_fields, flag_of, unreadable
from faccel.errors import ConfigError, FaccelError

CommandT = TypeVar("CommandT", bound=Callable[..., None] | click.Command)


class UsageError(click.ClickException):
    """A wrong command line: prints the message without a traceback and exits with code 2."""

    exit_code = 2

    def __init__(self, error: FaccelError) -> None:
        super().__init__(str(error))


class LocalPath(click.Path):
    """A path of this node: a URL such as `s3://bucket/run` is an error with a way to read it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or print the error and exit with code 2."""
        name = "path"
        if param is not None and param.name:
            name = param.name.upper()
        try:
            local_path(name, value)
        except ConfigError as error:
            raise UsageError(error) from None
        return super().convert(value, param, ctx)


def config_flags(command: CommandT) -> CommandT:
    """Add a flag for each field of `Config` to a command.

    Effects: pure.
    """
    # click lists options in the reverse of the order in which they are added
    for field in reversed(config_fields()):
        flag = flag_of(field.name)
        doc = str(field.metadata["doc"])
        if isinstance(field.default, bool):
            # None instead of False: a flag that is absent must not override other sources
            option = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=doc)
        else:
            doc = f"{doc} [{field.default}]"
            option = click.option(flag, field.name, default=None, metavar="VALUE", help=doc)
        command = option(command)
    return command


def parse_flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are set on the command line, parsed and validated.

    Effects: pure.

    Raises:
        UsageError: A value is invalid for its field.
    """
    values: dict[str, Any] = {}
    for field in config_fields():
        text = options[field.name]
        # The flag is absent, so that weaker sources apply.
        if text is None:
            continue
        try:
            value = text
            if not isinstance(text, bool):
                value = field.metadata["parse"](text)
            # With the single field, so that the error is about this flag.
            Config(**{field.name: value})  # validates
        except ConfigError as error:
            raise UsageError(error) from None
        except ValueError as error:
            name = f"`{flag_of(field.name)}`"
            raise UsageError(unreadable(name, field, str(text), error)) from None
        values[field.name] = value
    return values
