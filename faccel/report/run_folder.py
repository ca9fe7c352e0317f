"""Finds the run that a command names: a run folder, or the folder of a tracker or a meter in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import attrs

from faccel.checks import local_path
from faccel.errors import ConfigError, short_text
from faccel.observe.rank_file import FOLDER

_FILES = ("metrics.jsonl", "metrics.csv", "faccel.json")
_EVENTS = "events.out.tfevents"
_JOURNALS = "goodput"
_LOGS = "logs"
_MAX_DEPTH = 3  # names of runs may have slashes
_NUM_LISTED = 8


@attrs.frozen
class RunFolder:
    """The folders of one run.

    Args:
        path: What the user has named; the report is written into it.
        run_dir: The run folder, which has the files of the ranks and the logs.
        folder: The folder of trackers and meters, None where a script has neither.
    """

    path: Path
    run_dir: Path
    folder: Path | None

    @property
    def name(self) -> str:
        """The name of the run as users read it."""
        if self.folder is None:
            return self.run_dir.absolute().name
        if self.folder.absolute() == self.run_dir.absolute():
            return self.folder.absolute().name
        return os.path.relpath(self.folder, self.run_dir.absolute().parent)


def is_run(folder: Path) -> bool:
    """Return whether a tracker or a meter has written into a folder.

    Effects: ambient. Lists the folder.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    for name in names:
        if name in _FILES or name.startswith(_EVENTS):
            return True
    return _JOURNALS in names


def find_run(run: str, command: str) -> RunFolder:
    """Return the folders of the run that a command names.

    Effects: ambient. Lists folders.

    Args:
        run: The run folder, or one run in it.
        command: The command, as in `"faccel report"`, for the message of an error.

    Raises:
        ConfigError: There is no run, or there are several.
    """
    path = Path(local_path("RUN", run))
    fix = f"name the folder of `faccel launch --run-dir DIR`, as in `{command} DIR`"
    if not path.is_dir():
        got = f"`{short_text(run)}`, which is no folder"
        raise ConfigError("`RUN` must be a run folder", got=got, fix=fix)
    if is_run(path):
        return RunFolder(path, _run_dir_of(path), path)
    below = sorted(_runs_below(path, _MAX_DEPTH))
    if len(below) > 1:
        raise ConfigError(
            "`RUN` has several runs",
            got=_list_text(below, path),
            fix=f"name one of them, as in `{command} {short_text(str(below[0]))}`",
        )
    # Most scripts have one run, whose name need not be typed.
    if below:
        return RunFolder(path, _run_dir_of(below[0]), below[0])
    if (path / FOLDER).is_dir():
        return RunFolder(path, path, None)
    raise ConfigError("`RUN` has no run", got=f"`{short_text(run)}`", fix=fix)


def _list_text(folders: list[Path], path: Path) -> str:
    names = [short_text(str(folder.relative_to(path))) for folder in folders[:_NUM_LISTED]]
    if len(folders) > _NUM_LISTED:
        names.append(f"{len(folders) - _NUM_LISTED} more")
    return ", ".join(names)


def _runs_below(path: Path, depth: int) -> Iterator[Path]:
    """Yield the runs below a folder; a run in the folder of another one is a part of that."""
    if not depth:
        return
    try:
        entries = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except OSError:  # another user's
        return
    for name in entries:
        # Files of ranks, and logs, belong to the run folder.
        if name in (FOLDER, _LOGS):
            continue
        folder = path / name
        if is_run(folder):
            yield folder
        else:
            yield from _runs_below(folder, depth - 1)


def _run_dir_of(folder: Path) -> Path:
    """Return the nearest folder with files of ranks or logs: this one or one above it."""
    above = [folder.absolute(), *folder.absolute().parents[:_MAX_DEPTH]]
    # The nearest one, because a run folder may be in another one.
    for candidate in above:
        if (candidate / FOLDER).is_dir():
            return candidate
    for candidate in above:
        if (candidate / _LOGS).is_dir():
            return candidate
    return folder.absolute().parent
