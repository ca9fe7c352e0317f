"""A configuration in a file: YAML, TOML or JSON of its own, or a section of the user's."""

from __future__ import annotations

import json
import os
import re
import tempfile
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
    base = env.get("XDG_CONFIG_HOME") or (
        os.path.join(env["HOME"], ".config") if env.get("HOME") else None
    )
    return base and os.path.join(base, "faccel", "config.yaml")


def absolute(reference: str) -> str:
    """Return `path#section` with the path from the root, so that it means the same in another folder.

    Effects: ambient. Asks for the current folder.
    """
    path, mark, section = reference.partition("#")
    return os.path.abspath(path) + mark + section


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
            got=f"a {type(values).__name__}",
            fix="write `mixed_precision: bf16`, a key a line",
        )
    return ConfigFile(reference, {str(key): value for key, value in values.items()})


def write(path: str, values: Mapping[str, Any], comment: str = "") -> None:
    """Write `values` as the file's suffix says; of a file that is there, comments and order of the lines stay.

    Effects: ambient. The file is whole at every moment: old or new.

    Raises:
        ConfigError: The suffix is unknown, the file cannot be written, or not be changed without losing its form.
    """
    target = os.path.realpath(path)  # a link stays a link
    suffix = _suffix(path)
    try:
        before = _read_text(target)
        note = comment if suffix != ".json" else ""  # which has no comments
        text = (
            note + _RENDERERS[suffix](values)
            if comment or before is None
            else _edited(before, suffix, values)
        )
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=os.path.dirname(target), prefix=".faccel-", delete=False
        ) as file:
            file.write(text)
        os.chmod(file.name, 0o644 if before is None else os.stat(target).st_mode)
        try:
            os.replace(file.name, target)
        except OSError:
            os.unlink(file.name)
            raise
    except OSError as error:
        got = error.strerror or str(error)
        raise ConfigError(
            f"the configuration `{path}` cannot be written", got=got, fix="name another"
        ) from None


def _read_text(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def _edited(text: str, suffix: str, values: Mapping[str, Any]) -> str:
    """Return `text` with the lines of its keys changed, so that it says `values`, and nothing else in it."""
    if suffix == ".json":
        return _to_json(values)
    before = _PARSERS[suffix](text) or {}
    mark = "=" if suffix == ".toml" else ":"
    lines = [] if text.strip() == "{}" else text.splitlines()
    for key in {**before, **values}:
        if key in before and before[key] == values.get(key, before):
            continue
        new = (
            [f"{key}{' ' if mark == '=' else ''}{mark} {json.dumps(values[key])}"]
            if key in values
            else []
        )
        at = [
            i
            for i, line in enumerate(lines)
            if re.match(rf"[\"']?{re.escape(key)}[\"']?\s*{mark}", line)
        ]
        if at:
            note = re.search(r"\s+#.*$", lines[at[0]]) if new else None
            lines[at[0] : at[0] + 1] = [new[0] + (note[0] if note else "")] if new else []
        else:
            lines += new
    result = "".join(f"{line}\n" for line in lines) if values else "{}\n" if mark == ":" else ""
    try:
        says = _PARSERS[suffix](result) or {}
    except Exception:  # each parser has errors of its own
        says = None
    if says != dict(values):  # a value of several lines, for instance
        raise ConfigError(
            "the file cannot be changed line by line", got=f"`{suffix}`", fix="change it by hand"
        )
    return result


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1]
    if suffix not in _SUFFIXES:
        got = suffix or "no suffix"
        raise ConfigError(
            f"`{path}` is of no kind that can be read", got=got, fix=nearest(suffix, _SUFFIXES)
        )
    return suffix


def _parse(path: str) -> Any:
    suffix = _suffix(path)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        fix = "name another, or make it with `faccel config default`"
        raise ConfigError(
            f"the configuration `{path}` cannot be read", got=error.strerror or str(error), fix=fix
        ) from None
    try:
        return _PARSERS[suffix](data.decode())
    except Exception as error:  # each parser has errors of its own
        got = " ".join(str(error).split())
        raise ConfigError(
            f"`{path}` is not {suffix[1:].upper()}", got=got, fix="mend that line"
        ) from None


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _to_yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False) if values else "{}\n"


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), indent=2) + "\n"


def _to_toml(values: Mapping[str, Any]) -> str:
    flat = {f"{key}.{name}": one for key, each in values.items() for name, one in _pairs(each)}
    return "".join(
        f"{key.removesuffix('.')} = {json.dumps(value)}\n" for key, value in flat.items()
    )


def _pairs(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else [("", value)]


_RENDERERS: Mapping[str, Any] = {
    ".json": _to_json,
    ".toml": _to_toml,
    ".yaml": _to_yaml,
    ".yml": _to_yaml,
}
_PARSERS: Mapping[str, Any] = {".json": json.loads, ".toml": _toml, ".yaml": _yaml, ".yml": _yaml}
