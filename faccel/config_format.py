"""The formats of a configuration file: YAML, TOML and JSON, by the suffix of the path."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import attrs

from faccel.errors import ConfigError, nearest, short_text
from faccel.small_file import read_small_file
from faccel.unique_keys import load_json

_SUFFIXES = (".json", ".toml", ".yaml", ".yml")
_MAX_DEPTH = 20  # a configuration of Accelerate has three levels
_MAX_INT_BITS = 1024  # Python prints no int of more than 14,000 bits
_BARE_KEY = re.compile(r"[\w-]+", re.ASCII)  # in TOML; others are quoted
# tomllib takes quadratic time and memory for the parts of one key: minutes for 200 kB.
# The part before must be complete, so that the search itself takes linear time.
_LONG_TOML_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){100}""")


def suffix_of(path: str) -> str:
    """Return the suffix of a configuration file, which names its format.

    Effects: pure.

    Raises:
        ConfigError: It names no format.
    """
    suffix = os.path.splitext(path)[1]
    if suffix in _SUFFIXES:
        return suffix
    got = "no suffix"
    if suffix:
        got = short_text(suffix)
    raise ConfigError(
        f"`{short_text(path)}` must end with one of {', '.join(_SUFFIXES)}",
        got=got,
        fix=nearest(suffix, _SUFFIXES),
    )


def read_text(path: str) -> str:
    """Return the text of a configuration file.

    Effects: ambient. Reads the file.

    Raises:
        ConfigError: The file is missing, unreadable, not a regular file, larger than 1 MB, or not
            UTF-8, or its suffix is unknown.
    """
    suffix_of(path)  # raises before a file of another format is read
    fix = "name an existing file, or create one with `faccel config default`"
    return read_small_file(path, "the configuration file", fix=fix)


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, without their ends.

    Effects: pure.

    Examples:
        >>> lines_of("seed: 1\\r\\nrun_dir: a\\n")
        ['seed: 1', 'run_dir: a']
    """
    # Not `splitlines`, which also splits at form feeds and U+2028, as the formats do not.
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def parse(path: str, text: str) -> Any:
    """Return the document of a text in the format of the suffix of `path`.

    Effects: pure.

    Raises:
        ConfigError: The text is invalid, or a mapping has a key twice.
    """
    try:
        return FORMATS[suffix_of(path)].load(text)
    except RecursionError:
        _raise_syntax_error(path, "values that are nested too deeply")
    except ConfigError as error:  # a key that occurs twice
        problem = f"in `{short_text(path)}` {error.problem}"
        raise ConfigError(problem, got=error.got, fix=error.fix) from None
    except Exception as error:  # each parser has its own errors
        _raise_syntax_error(path, " ".join(str(error).split()))  # messages span several lines


def check_values(description: str, values: object) -> None:
    """Raise for values that no configuration has, and that would break messages about them.

    Effects: pure.

    Args:
        description: The file or section, for the message.
        values: What it contains.

    Raises:
        ConfigError: Values are nested too deeply, or an int has thousands of digits.
    """
    level: list[object] = [values]
    # Level by level: a recursion would fail for the very values that this function refuses.
    for _ in range(_MAX_DEPTH):
        children: list[object] = []
        for value in level:
            _check_int(description, value)
            children += _children(value)
        level = children
    if level:
        raise ConfigError(
            f"{description} is nested too deeply",
            got=f"more than {_MAX_DEPTH} levels",
            fix="write one `key: value` per line",
        )


def _check_int(description: str, value: object) -> None:
    if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
        raise ConfigError(
            f"{description} has a number that is too large",
            got=f"an int of {value.bit_length()} bits",
            fix="write a smaller number",
        )


def _children(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set):
        return list(value)
    return []


def _raise_syntax_error(path: str, reason: str) -> NoReturn:
    raise ConfigError(
        f"`{short_text(path)}` is not {suffix_of(path)[1:].upper()}",
        got=short_text(reason),
        fix="correct that line",
    ) from None


# Parsers are imported where they are used: most runs have no configuration file.


def _load_yaml(text: str) -> Any:
    from faccel.bounded_yaml import load

    return load(text)


def _load_toml(text: str) -> Any:
    import tomllib

    if _LONG_TOML_KEY.search(text):
        raise ValueError("a key of 100 parts")
    return tomllib.loads(text)


def _to_yaml(values: Mapping[str, Any]) -> str:
    import yaml

    if not values:
        return "{}\n"
    return yaml.safe_dump(dict(values), sort_keys=False)


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), indent=2) + "\n"


def _to_toml(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {scalar(value)}\n" for key, value in _dotted_keys(values, ""))


def _dotted_keys(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    """Yield the leaves of nested mappings under TOML's dotted keys, such as `mesh.tp`."""
    for name, value in values.items():
        if not _BARE_KEY.fullmatch(name):  # such as a pattern of module names
            name = scalar(name)
        key = prefix + name
        if isinstance(value, Mapping):
            yield from _dotted_keys(value, f"{key}.")
        else:
            yield key, value


def scalar(value: object) -> str:
    """Return a scalar as JSON, which is valid in YAML and TOML, too.

    Effects: pure.

    Examples:
        >>> scalar("é"), scalar(True)
        ('"é"', 'true')
    """
    # Without ASCII escapes: JSON writes an emoji as two surrogates, which are invalid in TOML.
    return json.dumps(value, ensure_ascii=False)


@attrs.frozen
class Format:
    """How a format is read and written.

    Args:
        load: Returns the document of a text, or raises.
        dump: Returns the text of values.
    """

    load: Callable[[str], Any]
    dump: Callable[[Mapping[str, Any]], str]


_YAML = Format(_load_yaml, _to_yaml)
FORMATS: Mapping[str, Format] = {
    ".json": Format(load_json, _to_json),
    ".toml": Format(_load_toml, _to_toml),
    ".yaml": _YAML,
    ".yml": _YAML,
}
"""The formats by suffix."""
