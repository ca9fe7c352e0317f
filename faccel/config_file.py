"""Configuration files: a YAML, TOML or JSON file, or a section of the user's own file."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import attrs

from faccel.checks import instance_of, local_path
from faccel.errors import ConfigError, nearest

VARIABLE = "FACCEL_CONFIG"
NPROC = "nproc"
"""The key of the processes per node, which `faccel launch` reads. It is no field of `Config`: the
world of a run is the processes that were started."""

NPROC_WORDS = ("auto", "cpu", "gpu")
"""The values of `nproc` that depend on the node."""

# Every version of Accelerate writes at least one of them.
_ACCELERATE_KEYS = ("compute_environment", "distributed_type")
_SUFFIXES = (".json", ".toml", ".yaml", ".yml")


@attrs.frozen
class ConfigFile:
    """The content of a configuration file.

    Args:
        name: Path and section, for messages: `training.yaml#faccel`.
        values: Values by key, as the file contains them.
        lines: The line of each key, counted from 1, where it was found.

    Raises:
        ConfigError: `nproc` is neither a number nor one of `NPROC_WORDS`.
    """

    name: str
    values: Mapping[str, Any]
    lines: Mapping[str, int] = attrs.field(factory=dict)

    def source(self, key: str) -> str:
        """Return the file and line of a key, as in `"file training.yaml:3"`."""
        if key not in self.lines:
            return f"file {self.name}"
        path, _, _ = self.name.partition("#")
        return f"file {path}:{self.lines[key]}"

    @property
    def settings(self) -> dict[str, Any]:
        """The values of fields of `Config`: all but `nproc`."""
        return {key: value for key, value in self.values.items() if key != NPROC}

    @property
    def nproc(self) -> str | None:
        """The processes per node: a number, `"auto"`, `"cpu"` or `"gpu"`; None if it is not set."""
        value = self.values.get(NPROC)
        if value is None:
            return None
        return str(value)

    def __attrs_post_init__(self) -> None:
        if self.nproc is None or self.nproc in NPROC_WORDS:
            return
        value = self.values[NPROC]
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return
        raise ConfigError(
            f"`{NPROC}` must be a number of processes, or one of {', '.join(NPROC_WORDS)}",
            got=f"{NPROC}={value!r}, from the {self.source(NPROC)}",
            fix=f"write for example `{NPROC}: 2`",
        )


def default_path(env: Mapping[str, str]) -> str | None:
    """Return the path of the user's configuration: in `$XDG_CONFIG_HOME`, else in `~/.config`.

    Effects: pure. None if the environment has neither `XDG_CONFIG_HOME` nor `HOME`.
    """
    # https://specifications.freedesktop.org/basedir-spec. Not `os.path.expanduser`: it would read
    # the environment of the process instead of `env`.
    folder = env.get("XDG_CONFIG_HOME")
    if not folder and env.get("HOME"):
        folder = os.path.join(env["HOME"], ".config")
    if not folder:
        return None
    return os.path.join(folder, "faccel", "config.yaml")


def absolute(reference: str) -> str:
    """Return `path#section` with an absolute path, for a process in another folder.

    Effects: ambient. Reads the current folder.
    """
    path, mark, section = reference.partition("#")
    return os.path.abspath(local_path("config", path)) + mark + section


def find(env: Mapping[str, str]) -> str | None:
    """Return the configuration file of the environment: `$FACCEL_CONFIG`, else `default_path`.

    Effects: ambient. None if the variable is unset and the default file is missing.
    """
    # Only the default file may be missing: a file that the variable names must exist, and `read`
    # raises if it does not.
    if env.get(VARIABLE):
        return env[VARIABLE]
    path = default_path(env)
    if path is not None and os.path.isfile(path):
        return path
    return None


def read(reference: str) -> ConfigFile:
    """Read `path` or `path#section`; a section can be nested, as in `path#train.faccel`.

    Effects: ambient. Reads the file.

    Raises:
        ConfigError: The file or the section is missing, or is not a mapping.
    """
    path, _, section = reference.partition("#")
    text = _decoded(local_path("config", path))
    values = _parse(path, text)
    description = f"`{path}`"
    if section:
        description = f"section `{section}` of `{path}`"
        for key in section.split("."):
            values = _section(values, key, path, section)
    if values is None:  # an empty file or section
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{description} is not a mapping",
            got=f"a {type(values).__name__}",
            fix="write one `key: value` per line, such as `mixed_precision: bf16`",
        )
    # `str`, because YAML reads an unquoted `1` or `no` as a number or a bool, in keys, too.
    by_key = {str(key): value for key, value in values.items()}
    foreign_keys = [key for key in _ACCELERATE_KEYS if key in by_key]
    if foreign_keys:
        raise ConfigError(
            f"{description} is a configuration of Accelerate",
            got=f"the key `{foreign_keys[0]}`",
            fix=f"convert it with `faccel config import {path} -o faccel.yaml`",
        )
    return ConfigFile(reference, by_key, _find_lines(text, section, by_key))


def _find_lines(text: str, section: str, keys: Iterable[str]) -> dict[str, int]:
    """Return the line of each key. A key in an unusual notation has none."""
    rows = text.splitlines()
    start = 0
    for key in filter(None, section.split(".")):
        start = _find_line(rows, key, start) or start
    lines: dict[str, int] = {}
    for key in keys:
        index = _find_line(rows, key, start)
        if index is not None:
            lines[key] = index + 1
    return lines


def _find_line(rows: list[str], key: str, start: int) -> int | None:
    # `key:` in YAML, `key =`, `key.axis` or `[key]` in TOML, `"key":` in JSON, at the start of a
    # line or of an entry. A parser of each format would report lines too, but not all of them do.
    pattern = re.compile(rf"""(?:^|[{{,.\[])\s*["']?{re.escape(key)}["']?\s*[:=.\]]""")
    for index in range(start, len(rows)):
        if pattern.search(rows[index]):
            return index
    return None


def read_accelerate(path: str) -> dict[str, Any]:
    """Read a configuration file of Accelerate.

    Effects: ambient. Reads the file.

    Raises:
        ConfigError: The file is missing or is not a mapping.
    """
    values = _parse(path, _decoded(path))
    instance_of("file", values or {}, Mapping, fix="use a file that `accelerate config` wrote")
    return dict(values or {})


def _section(values: object, key: str, path: str, section: str) -> object:
    known: list[str] = []
    if isinstance(values, Mapping):
        if key in values:
            return values[key]
        known = sorted(map(str, values))
    raise ConfigError(f"`{path}` has no section `{section}`", fix=nearest(key, known))


def write(path: str, values: Mapping[str, Any], comment: str = "") -> None:
    """Write `values` in the format of the suffix.

    Comments and line order of an existing file are kept.

    Effects: ambient. Atomic: a reader gets the old file or the new one.

    Args:
        path: File to write.
        values: All values that the file has afterwards.
        comment: First lines. The file is then written anew.

    Raises:
        ConfigError: The suffix is unknown, the file is not writable, or one of its values spans
            several lines.
    """
    path = local_path("path", path)
    target = os.path.realpath(path)  # of a symbolic link, the file is replaced and not the link
    suffix = _suffix(path)
    try:
        previous = _read_text(target)
        if previous is None or comment:
            text = _FORMATS[suffix].dump(values)
            if suffix != ".json":  # JSON has no comments
                text = comment + text
        else:
            text = _edited(previous, suffix, values)
        _replace(target, text, is_new=previous is None)
    except OSError as error:
        _raise_os_error("written", path, error, "write to another path")


def _replace(target: str, text: str, *, is_new: bool) -> None:
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    # In the folder of the target: `os.replace` fails across file systems.
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".faccel-", delete=False) as file:
        file.write(text)
    mode = 0o644  # a temporary file is readable by its owner only
    if not is_new:
        mode = os.stat(target).st_mode
    os.chmod(file.name, mode)
    try:
        os.replace(file.name, target)
    except OSError:  # the target is a folder, for example
        os.unlink(file.name)
        raise


def _raise_os_error(action: str, path: str, error: OSError, fix: str) -> NoReturn:
    raise ConfigError(
        f"the configuration file `{path}` cannot be {action}",
        got=error.strerror or str(error),
        fix=fix,
    ) from None


def _read_text(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def _edited(text: str, suffix: str, values: Mapping[str, Any]) -> str:
    """Return `text` with only the lines of changed keys edited, so that it parses to `values`."""
    if suffix == ".json":  # has no comments to keep
        return _to_json(values)
    previous = _FORMATS[suffix].load(text) or {}
    lines: list[str] = []
    # `{}` is an empty mapping in YAML's flow style. A line `key: value` after it is invalid.
    if text.strip() != "{}":
        lines = text.splitlines()
    for key in {**previous, **values}:  # in the order of the file, new keys last
        if key not in values:
            _remove_key(lines, key, suffix)
        elif key not in previous or previous[key] != values[key]:
            _set_key(lines, key, values[key], suffix)
    result = "".join(f"{line}\n" for line in lines)
    if not values and suffix != ".toml":
        result = "{}\n"  # an empty YAML file is null, not a mapping
    if not _parses_to(values, result, suffix):
        raise ConfigError(
            "the configuration file cannot be edited line by line",
            got=f"a `{suffix}` file with other values than one per line",
            fix="edit it by hand",
        )
    return result


def _parses_to(values: Mapping[str, Any], text: str, suffix: str) -> bool:
    # A value over several lines, for example, breaks an edit by line: check instead of guessing.
    try:
        return (_FORMATS[suffix].load(text) or {}) == dict(values)
    except Exception:  # each parser has its own errors
        return False


def _set_key(lines: list[str], key: str, value: object, suffix: str) -> None:
    separator = ": "
    if suffix == ".toml":
        separator = " = "
    # A scalar in JSON is valid YAML and TOML, too, with strings quoted.
    line = f"{key}{separator}{json.dumps(value)}"
    index = _line_of(lines, key, suffix)
    if index is None:
        lines.append(line)
        return
    # the user's comment on the line stays
    comment = re.search(r"\s+#.*$", lines[index])
    if comment:
        line += comment[0]
    lines[index] = line


def _remove_key(lines: list[str], key: str, suffix: str) -> None:
    index = _line_of(lines, key, suffix)
    if index is not None:
        del lines[index]


def _line_of(lines: list[str], key: str, suffix: str) -> int | None:
    mark = ":"
    if suffix == ".toml":
        mark = "="
    pattern = re.compile(rf"[\"']?{re.escape(key)}[\"']?\s*{mark}")
    for index, line in enumerate(lines):
        # `match` starts in the first column: a nested key of the same name is indented
        if pattern.match(line):
            return index
    return None


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1]
    if suffix in _SUFFIXES:
        return suffix
    raise ConfigError(
        f"`{path}` must end with one of {', '.join(_SUFFIXES)}",
        got=suffix or "no suffix",
        fix=nearest(suffix, _SUFFIXES),
    )


def _decoded(path: str) -> str:
    """Return the text of a file."""
    _suffix(path)  # raises before a large file of another kind is read
    # Bytes, decoded as UTF-8: text mode would decode in the locale of the process.
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        fix = "name an existing file, or create one with `faccel config default`"
        _raise_os_error("read", path, error, fix)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        _raise_syntax_error(path, error)


def _parse(path: str, text: str) -> Any:
    try:
        return _FORMATS[_suffix(path)].load(text)
    except Exception as error:  # each parser has its own errors
        _raise_syntax_error(path, error)


def _raise_syntax_error(path: str, error: Exception) -> NoReturn:
    raise ConfigError(
        f"`{path}` is not {_suffix(path)[1:].upper()}",
        got=" ".join(str(error).split()),  # messages of parsers span several lines
        fix="correct that line",
    ) from None


# Parsers are imported where they are used: most runs have no configuration file.


def _load_yaml(text: str) -> Any:
    import yaml

    # `yaml.load` would construct any Python object that the file names
    return yaml.safe_load(text)


def _load_toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _to_yaml(values: Mapping[str, Any]) -> str:
    import yaml

    if not values:
        return "{}\n"
    return yaml.safe_dump(dict(values), sort_keys=False)


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), indent=2) + "\n"


def _to_toml(values: Mapping[str, Any]) -> str:
    # A mesh is the only nested value; TOML writes it as dotted keys: `mesh.tp = 2`.
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{key}.{name} = {json.dumps(item)}\n" for name, item in value.items()]
        else:
            lines.append(f"{key} = {json.dumps(value)}\n")
    return "".join(lines)


@attrs.frozen
class _Format:
    load: Callable[[str], Any]
    dump: Callable[[Mapping[str, Any]], str]


_YAML = _Format(_load_yaml, _to_yaml)
_FORMATS: Mapping[str, _Format] = {
    ".json": _Format(json.loads, _to_json),
    ".toml": _Format(_load_toml, _to_toml),
    ".yaml": _YAML,
    ".yml": _YAML,
}
