"""Writes configuration files, and edits lines of existing ones."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from faccel.checks import local_path
from faccel.config_format import FORMATS, lines_of, parse, read_text, scalar, suffix_of
from faccel.errors import ConfigError, short_repr, short_text


def write(
    path: str, values: Mapping[str, Any], comment: str = "", *, is_replaced: bool = False
) -> None:
    """Write `values` in the format of the suffix.

    Comments and line order of an existing file are kept, unless it is replaced.

    Effects: ambient. Atomic: a reader gets the old file or the new one.

    Args:
        path: File to write.
        values: All values that the file has afterwards.
        comment: Text of the first lines, without `#`. The file is then replaced.
        is_replaced: Whether the content of an existing file is dropped, valid or not.

    Raises:
        ConfigError: The suffix is unknown, the file is not writable or not a regular file, or one
            of its values spans several lines or is not UTF-8.
    """
    path = local_path("path", path)
    suffix = suffix_of(path)
    target = os.path.realpath(path)  # of a symbolic link, the file is replaced and not the link
    is_new = not os.path.lexists(target)
    if not is_new and not os.path.isfile(target):  # a FIFO or a device would be replaced
        raise _unwritable(path, "another kind of file")
    if is_new or comment or is_replaced:
        text = FORMATS[suffix].dump(values)
        if suffix != ".json":  # JSON has no comments
            text = _as_comment(comment) + text
    else:
        text = _edited(path, read_text(target), values)
    _check_text(path, text, values)
    try:
        replace_file(target, text.encode())
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None


def _unwritable(path: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the configuration file `{short_text(path)}` cannot be written",
        got=reason,
        fix="write to another path",
    )


def _as_comment(text: str) -> str:
    # Each line gets a `#`: a file name or a host name may contain a line break.
    return "".join(f"# {line}\n" for line in text.splitlines())


def _check_text(path: str, text: str, values: Mapping[str, Any]) -> None:
    """Raise unless the text is UTF-8 and parses to `values`: a file is never written half."""
    is_utf8 = True
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name of Linux can be any bytes
        is_utf8 = False
    if is_utf8 and _parses_to(values, text, suffix_of(path)):
        return
    raise ConfigError(
        f"the values cannot be written to `{short_text(path)}`",
        got=short_repr(dict(values)),
        fix="use values that are UTF-8 and have one line each, or edit the file by hand",
    )


def replace_file(target: str, data: bytes) -> None:
    """Write a file, or replace one, atomically: a failure leaves the old file as it is.

    Effects: writes the file and creates its folder.

    Args:
        target: Path of the file. A link stays, and the file that it names is replaced.
        data: The new content.
    """
    target = os.path.realpath(target)
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    mode = 0o644  # a temporary file is readable by its owner only
    if os.path.exists(target):
        mode = os.stat(target).st_mode
    # In the folder of the target: `os.replace` fails across file systems.
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".faccel-")
    try:
        # A full disk is reported by the write, or when the file is closed.
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except OSError:  # the target is a folder, for example
        os.unlink(temporary)
        raise


def _edited(path: str, text: str, values: Mapping[str, Any]) -> str:
    """Return `text` with only the lines of changed keys edited, so that it parses to `values`."""
    suffix = suffix_of(path)
    if suffix == ".json":  # has no comments to keep
        return FORMATS[suffix].dump(values)
    previous = parse(path, text) or {}
    lines: list[str] = []
    # `{}` is an empty mapping in YAML's flow style. A line `key: value` after it is invalid.
    if text.strip() != "{}":
        lines = lines_of(text)
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
        return (FORMATS[suffix].load(text) or {}) == dict(values)
    except Exception:  # each parser has its own errors
        return False


def _set_key(lines: list[str], key: str, value: object, suffix: str) -> None:
    separator = ": "
    if suffix == ".toml":
        separator = " = "
    line = f"{key}{separator}{scalar(value)}"
    index = _line_of(lines, key, suffix)
    if index is None:
        lines.append(line)
        return
    # the user's comment on the line stays
    comment = re.search(r"(?<!\s)\s+#.*$", lines[index])
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
