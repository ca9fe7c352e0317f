"""Checks of the arguments of `save`, `load` and the exports."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from faccel.checkpoint.json_values import json_problem
from faccel.checks import local_path, shown
from faccel.errors import CheckpointError, ConfigError, short_repr


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
        return _absolute("path", path)
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


def folder_argument(path: str | os.PathLike[str], name: str = "path") -> str:
    """Return the argument `name` of a function that lists checkpoints as an absolute path.

    Effects: ambient. Reads the current directory.

    Raises:
        ConfigError: `path` is not a local path.
    """
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        fix = f'pass a directory, as in `{name}="runs/first"`'
        raise ConfigError(f"`{name}` must be a str or an os.PathLike", got=shown(path), fix=fix)
    return _absolute(name, path)


def _absolute(name: str, path: str | os.PathLike[str]) -> str:
    text = local_path(name, path)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):  # else a folder of this name would be made here
        raise ConfigError(
            f"`{name}` is below the home directory of an unknown user",
            got=short_repr(text),
            fix=f"write `{name}={short_repr(os.path.join('.', text))}` for a folder of this name",
        )
    return os.path.abspath(expanded)


def check_encodable(path: str) -> None:
    """Raise unless UTF-8 can encode a path, which the readers of the files require.

    Effects: pure.

    Raises:
        ConfigError: It contains other bytes.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "`path` must be a text that UTF-8 can encode",
            got=ascii(path)[:200],
            fix='rename the directory, as in `path="runs/first"`',
        ) from None


def metadata_argument(metadata: object) -> dict[str, Any]:
    """Return the argument `metadata` of `save` as it is when JSON has stored it.

    Effects: pure.

    Raises:
        CheckpointError: It cannot; the message names the value.
    """
    if metadata is None:
        return {}
    fix = 'pass a dict of numbers and strings, as in `metadata={"loss": float(loss)}`'
    if not isinstance(metadata, Mapping):
        raise CheckpointError("`metadata` must be a dict", got=shown(metadata), fix=fix)
    problem = json_problem(dict(metadata), "metadata")
    if problem is not None:
        raise CheckpointError("`metadata` cannot be stored as JSON", got=problem, fix=fix)
    return json.loads(json.dumps(dict(metadata)))


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
