"""A configuration in a file: YAML, TOML or JSON of its own, or a section of the user's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import attrs

from faccel.errors import ConfigError, nearest

VARIABLE = "FACCEL_CONFIG"
_SUFFIXES = (".json", ".toml", ".yaml", ".yml")


@attrs.frozen
class ConfigFile:
    """What a file says.

    Args:
        name: As people name it: `training.yaml#faccel`.
        values: Its keys, as they were written.
    """

    name: str
    values: Mapping[str, Any]


def default_path(env: Mapping[str, str]) -> str | None:
    """Return where the user's own file is kept: in `$XDG_CONFIG_HOME`, else in `~/.config`; None without a home.

    Effects: pure.
    """
    base = env.get("XDG_CONFIG_HOME") or (os.path.join(env["HOME"], ".config") if env.get("HOME") else None)
    return base and os.path.join(base, "faccel", "config.yaml")


def find(env: Mapping[str, str]) -> str | None:
    """Return the file that counts where none is named: `$FACCEL_CONFIG`, else the user's own if there is one.

    Effects: ambient. Looks whether a file is there.
    """
    named = env.get(VARIABLE)
    default = default_path(env)
    return named or (default if default and os.path.isfile(default) else None)


def read(reference: str) -> ConfigFile:
    """Read `path` or `path#section`; a section may be nested, as in `path#train.faccel`.

    Effects: ambient. Reads the file.

    Raises:
        ConfigError: There is no such file or section, or it is not a mapping; names it.
    """
    path, _, section = reference.partition("#")
    values = _parse(path)
    for key in section.split(".") if section else ():
        if not isinstance(values, Mapping) or key not in values:
            known = sorted(map(str, values)) if isinstance(values, Mapping) else []
            raise ConfigError(f"`{path}` has no section `{section}`", fix=nearest(key, known))
        values = values[key]
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        what = f"section `{section}` of `{path}`" if section else f"`{path}`"
        raise ConfigError(
            f"{what} is not a mapping",
            saw=f"a {type(values).__name__}",
            fix="write `mixed_precision: bf16`, a key a line",
        )
    return ConfigFile(reference, {str(key): value for key, value in values.items()})


def _parse(path: str) -> Any:
    suffix = os.path.splitext(path)[1]
    if suffix not in _SUFFIXES:
        raise ConfigError(
            f"`{path}` is of no kind that can be read", saw=suffix or "no suffix", fix=nearest(suffix, _SUFFIXES)
        )
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        fix = "name another, or make it with `faccel config default`"
        raise ConfigError(
            f"the configuration `{path}` cannot be read", saw=error.strerror or str(error), fix=fix
        ) from None
    try:
        return _PARSERS[suffix](data.decode())
    except Exception as error:  # each parser has errors of its own
        saw = " ".join(str(error).split())
        raise ConfigError(f"`{path}` is not {suffix[1:].upper()}", saw=saw, fix="mend that line") from None


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


_PARSERS: Mapping[str, Any] = {".json": json.loads, ".toml": _toml, ".yaml": _yaml, ".yml": _yaml}
