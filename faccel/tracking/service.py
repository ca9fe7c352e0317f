"""What the trackers of services have in common: import, options, the identity of a run."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from faccel.errors import ConfigError, nearest, short_repr, short_text


def import_service(module: str, tracker: str, package: str) -> Any:
    """Import the library of a tracker.

    Effects: ambient.

    Args:
        module: Its module.
        tracker: Name of the tracker, for the message.
        package: What pip installs.

    Raises:
        ConfigError: It is not installed.

    Examples:
        >>> import_service("svc", "a", "svc")
        Traceback (most recent call last):
        faccel.errors.ConfigError: the tracker `a` is not installed. Got No module named 'svc'.
        To fix: run `pip install svc`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the tracker `{tracker}` is not installed",
            got=short_text(str(error)),
            fix=f"run `pip install {package}`",
        ) from None


def takes_any_keyword(fn: Callable[..., object]) -> bool:
    """Return whether a function has a parameter `**options`.

    Effects: pure.

    Examples:
        >>> takes_any_keyword(lambda folder, config, **options: None)
        True
    """
    parameters = inspect.signature(fn).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def keyword_names(fn: Callable[..., object]) -> list[str]:
    """Return the named parameters that a function takes as keywords.

    Effects: pure.

    Examples:
        >>> keyword_names(lambda folder, *, lr=0.1, **options: None)
        ['folder', 'lr']
    """
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(fn).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in by_keyword]


def check_options(tracker: str, options: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise for an option that a tracker does not have.

    Effects: pure.

    Examples:
        >>> check_options("aim", {"rep": "r"}, ["repo", "run_hash"])
        Traceback (most recent call last):
        faccel.errors.ConfigError: `options` has an unknown option of the tracker `aim`. Got 'rep'.
        To fix: use `repo` (allowed: `repo`, `run_hash`).
    """
    names = set(allowed)
    for option in options:
        if option in names:
            continue
        fix = nearest(option, names)
        # nothing is near in an empty list
        if not names:
            fix = f"remove it: `{tracker}` has no options"
        raise ConfigError(
            f"`options` has an unknown option of the tracker `{tracker}`",
            got=short_repr(option),
            fix=fix,
        )


def read_run_id(folder: Path, tracker: str) -> str | None:
    """Return the identity of the service's run that the folder belongs to; None for a new one.

    Effects: ambient. Reads a file.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_run_id(folder, "wandb", "8vpckiwx")
        >>> read_run_id(folder, "wandb"), read_run_id(folder, "aim")
        ('8vpckiwx', None)
    """
    try:
        text = _id_file(folder, tracker).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    # An empty file is what a full disk leaves.
    return text or None


def write_run_id(folder: Path, tracker: str, run_id: str) -> None:
    """Store the identity of the service's run, so that a resumed run continues it.

    Effects: ambient. Writes a file.
    """
    _id_file(folder, tracker).write_text(f"{run_id}\n", encoding="utf-8")


def _id_file(folder: Path, tracker: str) -> Path:
    return folder / f"{tracker}.id"


def same_run(folder: Path, tracker: str, options: Mapping[str, object], option: str) -> str | None:
    """Return the stored identity of a run; an option must not name another run.

    Effects: ambient. Reads a file.

    Args:
        folder: Of the run.
        tracker: Name of the tracker.
        options: Of the user.
        option: Which of them is the identity.

    Raises:
        ConfigError: The folder belongs to another run.
    """
    stored = read_run_id(folder, tracker)
    requested = options.get(option)
    if stored is None or requested is None or str(requested) == stored:
        return stored
    where = short_text(str(folder))
    raise ConfigError(
        f"the folder of the run belongs to another run of `{tracker}`",
        got=f"{option}={short_repr(requested)}, and {short_repr(stored)} in {where}",
        fix=f"remove `{option}` to continue the stored run, or pass another `run`",
    )
