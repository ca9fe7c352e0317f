"""Configuration files: a YAML, TOML or JSON file, or a section of the user's own file."""

from __future__ import annotations

import bisect
import os
import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any

import attrs

from faccel.checks import MAX_COUNT, instance_of, local_path, parse_count
from faccel.config_format import check_values, lines_of, parse, read_text
from faccel.errors import ConfigError, nearest, short_repr, short_text

VARIABLE = "FACCEL_CONFIG"
NPROC = "nproc"
"""The key of the processes per node, which `faccel launch` reads. It is no field of `Config`: the
world of a run is the processes that were started."""

NPROC_WORDS = ("auto", "cpu", "gpu")
"""The values of `nproc` that depend on the node."""

# Every version of Accelerate writes at least one of them.
_ACCELERATE_KEYS = ("compute_environment", "distributed_type")


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
            return f"file {short_text(self.name)}"
        path, _, _ = self.name.partition("#")
        return f"file {short_text(path)}:{self.lines[key]}"

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
        return short_text(value)

    @property
    def num_processes(self) -> int | None:
        """The processes per node as a number; None if `nproc` is a word or not set."""
        if self.nproc is None:
            return None
        return parse_count(self.nproc)

    def __attrs_post_init__(self) -> None:
        if self.nproc is None or self.nproc in NPROC_WORDS:
            return
        value = self.values[NPROC]
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < MAX_COUNT:
            return
        raise ConfigError(
            f"`{NPROC}` must be a number of processes, or one of {', '.join(NPROC_WORDS)}",
            got=f"{NPROC}={short_repr(value)}, from the {self.source(NPROC)}",
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
    # `exists`, because a folder or a FIFO of this name is a mistake, which `read` reports
    if path is not None and os.path.exists(path):
        return path
    return None


def read(reference: str) -> ConfigFile:
    """Read `path` or `path#section`; a section can be nested, as in `path#train.faccel`.

    Effects: ambient. Reads the file.

    Raises:
        ConfigError: The file or the section is missing or invalid, or is not a mapping.
    """
    path, _, section = reference.partition("#")
    text = read_text(local_path("config", path))
    values = parse(path, text)
    description = f"`{short_text(path)}`"
    if section:
        description = f"section `{short_text(section)}` of {description}"
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
    check_values(description, values)
    by_key: dict[str, Any] = {}
    for key, value in values.items():
        # YAML reads an unquoted `1` or `no` as a number or a bool, in keys, too.
        name = str(key)
        by_key[name] = value
    foreign_keys = [key for key in _ACCELERATE_KEYS if key in by_key]
    if foreign_keys:
        raise ConfigError(
            f"{description} is a configuration of Accelerate",
            got=f"the key `{foreign_keys[0]}`",
            fix=f"convert it with `faccel config import {shlex.quote(path)} -o faccel.yaml`",
        )
    return ConfigFile(reference, by_key, _find_lines(text, section, by_key))


# `key:` in YAML, `key =`, `key.axis` or `[key]` in TOML, `"key":` in JSON, at the start of a line
# or of an entry. A parser of each format would report lines too, but not all of them do.
_KEY = re.compile(r"""(?:^|(?<=[{,.\[]))\s*["']?([\w-]+)["']?(?=\s*[:=.\]])""")


def _find_lines(text: str, section: str, keys: Collection[str]) -> dict[str, int]:
    """Return the line of each key. A key in an unusual notation has none."""
    # One pass over the text, because a file of 1 MB can have 100,000 keys.
    rows_by_key: dict[str, list[int]] = {}
    for index, row in enumerate(lines_of(text)):
        for match in _KEY.finditer(row):
            rows_by_key.setdefault(match[1], []).append(index)
    start = 0
    for key in filter(None, section.split(".")):
        start = _first_row(rows_by_key, key, start) or start
    lines: dict[str, int] = {}
    for key in keys:
        index = _first_row(rows_by_key, key, start)
        if index is not None:
            lines[key] = index + 1
    return lines


def _first_row(rows_by_key: Mapping[str, list[int]], key: str, start: int) -> int | None:
    rows = rows_by_key.get(key, [])
    index = bisect.bisect_left(rows, start)
    if index == len(rows):
        return None
    return rows[index]


def read_accelerate(path: str) -> dict[str, Any]:
    """Read a configuration file of Accelerate.

    Effects: ambient. Reads the file.

    Raises:
        ConfigError: The file is missing or invalid, or is not a mapping.
    """
    values = parse(path, read_text(path))
    instance_of("file", values or {}, Mapping, fix="use a file that `accelerate config` wrote")
    check_values(f"`{short_text(path)}`", values)
    return dict(values or {})


def _section(values: object, key: str, path: str, section: str) -> object:
    known: list[str] = []
    if isinstance(values, Mapping):
        if key in values:
            return values[key]
        known = [short_text(name) for name in values]
    raise ConfigError(
        f"`{short_text(path)}` has no section `{short_text(section)}`", fix=nearest(key, known)
    )
