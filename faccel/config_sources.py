"""Merges the sources of a configuration: file, environment, flags of the launcher, arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from faccel.config import (
    LAUNCH,
    PREFIX,
    Config,
    config_fields,
    flag_of,
    is_given,
    text_of,
    unreadable,
)
from faccel.errors import ConfigError, nearest, short_repr, short_text, with_source

if TYPE_CHECKING:
    from faccel.config_file import ConfigFile


class _Setting(NamedTuple):
    """The value of a field and its source, such as `"environment FACCEL_SEED"`, `"flag --seed"`."""

    value: Any
    source: str


def _environment_settings(env: Mapping[str, str]) -> dict[str, _Setting]:
    from faccel.config_file import VARIABLE  # imported at the first configuration, not before

    fields = {PREFIX + field.name.upper(): field for field in config_fields()}
    settings: dict[str, _Setting] = {}
    # Sorted, so that of several mistakes every rank reports the same one.
    for variable in sorted(env):
        is_other = not variable.startswith(PREFIX) or variable in (LAUNCH, VARIABLE)
        if is_other or not env[variable]:  # an empty variable is unset, as in a shell
            continue
        # An error, because a misspelled variable would otherwise have no effect.
        if variable not in fields:
            raise ConfigError(
                f"the environment variable `{short_text(variable)}` is unknown",
                got=f"{short_text(variable)}={short_repr(env[variable])}",
                fix=nearest(variable, fields),
            )
        field = fields[variable]
        try:
            value = field.metadata["parse"](env[variable])
        except ValueError as error:
            name = f"the environment variable `{variable}`"
            raise unreadable(name, field, env[variable], error) from None
        settings[field.name] = _Setting(value, f"environment {variable}")
    return settings


def _file_settings(file: ConfigFile | None) -> dict[str, _Setting]:
    if file is None:
        return {}
    return {name: _Setting(value, file.source(name)) for name, value in file.settings.items()}


def _flag_settings(env: Mapping[str, str]) -> dict[str, _Setting]:
    flags = launcher_flags(env)
    flags.pop("config", None)  # `--config` names the file, which `faccel.init` has read already
    settings: dict[str, _Setting] = {}
    for name, value in flags.items():
        settings[name] = _Setting(value, f"flag {flag_of(short_text(name))}")
    return settings


def launcher_flags(env: Mapping[str, str]) -> dict[str, Any]:
    """Return the flags of `faccel launch`: fields, and `config`, the configuration file.

    Effects: pure.

    Raises:
        ConfigError: The variable was not set by the launcher.
    """
    # `or`, because an empty variable is unset, as the other variables are
    text = env.get(LAUNCH) or "{}"
    flags = None
    with suppress(ValueError, RecursionError):
        flags = json.loads(text)
    if isinstance(flags, dict):
        return flags
    raise ConfigError(
        f"the environment variable `{LAUNCH}` must be a JSON object",
        got=short_repr(text),
        fix="unset it: `faccel launch` sets it for its ranks",
    )


def _record_settings(config: Config | Mapping[str, object] | None) -> dict[str, _Setting]:
    if config is None:
        return {}
    values: dict[str, Any] = {}
    if isinstance(config, Config):
        # A record has a value for every field. Its defaults must not replace the environment.
        for field in config_fields():
            if is_given(config, field.name):
                values[field.name] = getattr(config, field.name)
    elif isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        values = dict(config)
    else:
        raise ConfigError(
            "`config` must be a `Config` or a mapping of its fields",
            got=short_repr(config),
            fix="write `faccel.init(faccel.Config(seed=1))` or `faccel.init(seed=1)`",
        )
    return {name: _Setting(value, "argument config") for name, value in values.items()}


def resolve(
    config: Config | Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    file: ConfigFile | None = None,
) -> Config:
    """Merge the sources of a configuration into one record.

    From weakest to strongest: defaults, `file`, environment, launcher flags, `config`, `overrides`.
    A value of None counts as not given.

    Effects: pure. Neither reads nor writes the process environment or a file.

    Args:
        config: A record or a mapping. Of a resolved record only the fields with a source count, of
            another record those that differ from the defaults.
        env: The environment. Names that start with `FACCEL_` are read; an empty value is unset.
        overrides: Single fields.
        file: The content of a configuration file.

    Returns:
        The record. Its `sources` store where each value comes from, and which one it replaced.

    Raises:
        ConfigError: A name is unknown, a value is invalid, or an argument contradicts a flag of the
            launcher. The message names the source, and the nearest valid name.

    Examples:
        >>> resolve({"grad_accum": 4}, env={"FACCEL_GRAD_ACCUM": "2"}).sources["grad_accum"]
        'argument config, over environment FACCEL_GRAD_ACCUM 2'
    """
    values: dict[str, Any] = {field.name: field.default for field in config_fields()}
    sources = dict.fromkeys(values, "default")
    flags = _flag_settings(env or {})
    arguments = {name: _Setting(value, "argument") for name, value in (overrides or {}).items()}
    # from the weakest source to the strongest
    layers = (
        _file_settings(file),
        _environment_settings(env or {}),
        flags,
        _record_settings(config),
        arguments,
    )
    for layer in layers:
        for name, setting in layer.items():
            _check_name(name, setting, values)
            # Scripts pass each option of their command line on, whether the user set it or not.
            if setting.value is None:
                continue
            if name in flags and setting.source.startswith("argument"):
                _check_agreement(name, flags[name], setting)
            # Only the source that is replaced is named, not those that it replaced before.
            weaker = sources[name].partition(",")[0]
            sources[name] = f"{setting.source}, over {weaker} {text_of(values[name])}"
            values[name] = setting.value
    # Validated once, after the merge: a weak source may have an invalid value that a stronger one
    # replaces.
    try:
        return Config(**values, sources=sources)
    except ConfigError as error:
        raise _with_source(error, sources) from None


def _check_name(name: str, setting: _Setting, fields: Mapping[str, object]) -> None:
    if name in fields:
        return
    problem = f"`{short_text(name)}` is not a field of the configuration"
    # For an argument the traceback shows the line; a file or a variable must be named.
    if not setting.source.startswith("argument"):
        problem += f" ({setting.source})"
    raise ConfigError(
        problem, got=f"{short_text(name)}={short_repr(setting.value)}", fix=nearest(name, fields)
    )


def _check_agreement(name: str, flag: _Setting, argument: _Setting) -> None:
    """Raise if an argument of the script contradicts a flag of the launcher.

    Which one should win depends on the user, so neither does.
    """
    flag_value = getattr(Config(**{name: flag.value}), name)  # both as converted by the record
    argument_value = getattr(Config(**{name: argument.value}), name)
    if flag_value == argument_value:
        return
    raise ConfigError(
        f"the script and the launcher contradict each other about `{name}`",
        got=f"{flag.source} {text_of(flag_value)}, {argument.source} {text_of(argument_value)}",
        fix=f"leave out `{flag_of(name)}`, or remove `{name}` from the call of `faccel.init`",
    )


def _with_source(error: ConfigError, sources: Mapping[str, str]) -> ConfigError:
    """Return the error of a field with the source of its value."""
    # The validators see a value without its source. They begin a message with the field's name.
    field = "mesh"  # whose errors name an axis
    for name in sources:
        if error.problem.startswith(f"`{name}` "):
            field = name
    return with_source(error, sources[field])
