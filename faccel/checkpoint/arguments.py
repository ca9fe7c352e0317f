"""Checks of the arguments of `save`, `load` and the exports."""

from __future__ import annotations

import os

from faccel.checks import local_path, shown
from faccel.errors import ConfigError, short_repr


def path_argument(name: str, value: object, path: object, call: str) -> str:
    """Return `path` as an absolute path, for a function whose arguments are `(value, path, ctx)`.

    Effects: ambient. Reads the current directory.

    Args:
        name: Name of the first argument, for the message.
        value: The first argument.
        path: The second argument.
        call: The correct call, for the message.

    Raises:
        ConfigError: `path` is not a local path, for example because both arguments are swapped.

    Examples:
        >>> path_argument("state", "runs", {"step": 3}, "faccel.load(state, path, ctx)")
        Traceback (most recent call last):
        faccel.errors.ConfigError: `state` and `path` are swapped. Got state='runs', path=<dict>.
        To fix: write `faccel.load(state, path, ctx)`.
    """
    if isinstance(path, (str, os.PathLike)):
        return os.path.abspath(local_path("path", path))
    # The order of `torch.save` is `(obj, path)`; Accelerate and older versions have the path first.
    if isinstance(value, (str, os.PathLike)):
        raise ConfigError(
            f"`{name}` and `path` are swapped",
            got=f"{name}={short_repr(os.fspath(value))}, path=<{type(path).__name__}>",
            fix=f"write `{call}`",
        )
    raise ConfigError(
        "`path` must be a str or an os.PathLike", got=shown(path), fix=f"write `{call}`"
    )


def folder_argument(path: str | os.PathLike[str]) -> str:
    """Return the argument `path` of a function that lists checkpoints as an absolute path.

    Effects: ambient. Reads the current directory.

    Raises:
        ConfigError: `path` is not a local path.
    """
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        fix = 'pass a directory, as in `path="runs/first"`'
        raise ConfigError("`path` must be a str or an os.PathLike", got=shown(path), fix=fix)
    return os.path.abspath(local_path("path", path))


def check_step(step: object) -> None:
    """Raise unless `step` is an int of at least 0.

    Effects: pure.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConfigError(
            "`step` must be an int of at least 0",
            got=short_repr(step),
            fix="pass the number of updates so far, as in `step=100`",
        )
