"""Files of settings: small regular files, which are read without waiting for another process."""

from __future__ import annotations

import os
import stat

from faccel.errors import ConfigError, short_text

MAX_BYTES = 1_000_000
"""The largest size of a file of settings. A larger one is another file, such as a model."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def read_small_file(path: str, description: str, *, fix: str) -> str:
    """Return the text of a file of settings, which is UTF-8 in every locale.

    A FIFO or a device is not opened: opening a FIFO waits for its writer, a device may never end,
    and some devices react to being opened.

    Effects: ambient. Reads the file.

    Args:
        path: The file; symbolic links are followed.
        description: What the file is, for the message, as in `"the configuration file"`.
        fix: What to do if the file is missing or unreadable.

    Raises:
        ConfigError: The file is missing, unreadable, not a regular file, larger than 1 MB, or not
            UTF-8.

    Examples:
        >>> read_small_file("/dev/zero", "the settings", fix="name a file")
        Traceback (most recent call last):
        faccel.errors.ConfigError: the settings `/dev/zero` must be a regular file. Got a device.
        To fix: name a file.
    """
    name = f"{description} `{short_text(path)}`"
    try:
        kind = kind_of(path)
        data = b""
        if kind is None:
            data = _first_bytes(path, MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character, or another encoding
        reason = getattr(error, "strerror", None) or short_text(str(error))
        raise ConfigError(f"{name} cannot be read", got=reason, fix=fix) from None
    if kind is not None:
        raise ConfigError(f"{name} must be a regular file", got=kind, fix=fix)
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"{name} is larger than 1 MB",
            got=f"more than {MAX_BYTES:,} bytes",
            fix="move the settings to a separate file",
        )
    try:
        return data.decode("utf-8-sig")  # editors of Windows write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8", got=str(error), fix="save it as UTF-8 in the editor"
        ) from None


def kind_of(path: str) -> str | None:
    """Return what the path is instead of a regular file, such as `"a device"`, or None.

    Effects: ambient. Reads the metadata of the file.

    Raises:
        OSError: It does not exist.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return None
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            return kind
    return "a special file"


def _first_bytes(path: str, count: int) -> bytes:
    # Not blocking, because a FIFO may have replaced the file since. The number of bytes is limited
    # here and not by `stat`, because files of /proc have the size 0.
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)  # Windows has none of the three
    with open(os.open(path, flags), "rb") as file:
        return file.read(count) or b""
