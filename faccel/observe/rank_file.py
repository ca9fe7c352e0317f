"""The file of each rank in the run folder: where its process is, and how it has ended."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from faccel.checks import is_finite
from faccel.errors import ConfigError, short_text
from faccel.observe.process import start_ticks

FOLDER = ".faccel"
"""In the run folder; a tracker cannot have this name."""
_PREFIX = "rank-"
LAUNCH_FILE = "launch.json"
"""What `faccel launch` writes there when a rank has failed."""
_MAX_RANKS = 10**6


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    # The ranks that have no file are listed: a number without a limit would never end.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_RANKS


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_end(value: object) -> bool:
    return isinstance(value, dict) and _has_types(value, {"error": _is_text, "time_s": is_finite})


_RANK_TYPES: Mapping[str, Callable[[object], bool]] = {
    "rank": _is_rank,
    "world_size": _is_rank,
    "world": _is_text,
    "coordinates": lambda value: isinstance(value, dict) and all(map(_is_int, value.values())),
    "host": _is_text,
    "pid": _is_int,
    "start_s": is_finite,
    "start_ticks": lambda value: value is None or _is_int(value),
    "folder": _is_text,
    "signal": _is_int,
}
_LAUNCH_TYPES: Mapping[str, Callable[[object], bool]] = {
    "rank": _is_int,
    "reason": _is_text,
    "time_s": is_finite,
}


def rank_path(run_dir: str, rank: int) -> Path:
    """Return the path of the file of a rank.

    Effects: ambient. Reads the current folder.
    """
    # Absolute, because a script may change its folder before the run ends.
    return Path(run_dir).absolute() / FOLDER / f"{_PREFIX}{rank:05}.json"


def facts_path(run_dir: str) -> Path:
    """Return the path of the file with the configuration of the run, which rank 0 writes.

    Effects: ambient. Reads the current folder.
    """
    return Path(run_dir).absolute() / FOLDER / "run.json"


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file of the folder atomically.

    Effects: ambient. Writes the file, and creates its folder.

    Raises:
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the process: launches on two nodes may write the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_text(json.dumps(values), encoding="utf-8")
    os.replace(temporary, path)


def running_process(run_dir: str, rank: int) -> int | None:
    """Return the other process of this node that is a rank of the run folder, None without one.

    Effects: ambient. Reads the file of the rank.
    """
    try:
        document = _read(rank_path(run_dir, rank))
    except OSError:
        return None
    if not _is_of_rank(document) or "end" in document or document["pid"] == os.getpid():
        return None
    if document["host"] != socket.gethostname():
        return None
    pid, ticks = document["pid"], document["start_ticks"]
    # Without /proc an earlier process is not found.
    if ticks is None or start_ticks(pid) != ticks:
        return None
    return int(pid)


def read_run(run: str) -> tuple[Path, list[dict[str, Any]]]:
    """Return the folder of a run and the files of its ranks, of its last attempt only.

    Effects: ambient. Reads the folder.

    Args:
        run: A run folder, or the folder of a tracker in it.

    Raises:
        ConfigError: There is no such folder, or no rank has written a file in it.
    """
    path = Path(run)
    if not path.is_dir():
        raise ConfigError(
            "`RUN` must be a run folder",
            got=f"`{short_text(run)}`, which is no folder",
            fix="name the folder of `faccel launch --run-dir DIR`, as in `faccel why DIR`",
        )
    # A tracker has its folder in the run folder, and users name either.
    for folder in (path, path.absolute().parent):
        documents = _documents(folder / FOLDER)
        if documents:
            return folder, _of_last_attempt(documents)
    below = [match.parent for match in sorted(path.glob(f"*/{FOLDER}"))]
    fix = "start it with `faccel launch --run-dir DIR`, or set `run_dir` in the configuration"
    if below:
        fix = f"write `faccel why {short_text(str(below[0]))}`"
    raise ConfigError(
        "`RUN` has no files of ranks, so the run is not observed",
        got=f"`{short_text(run)}`",
        fix=fix,
    )


def _documents(folder: Path) -> list[dict[str, Any]]:
    documents: list[dict[str, Any]] = []
    # Not `glob`, which hides that the folder is unreadable.
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in names:
        if not name.startswith(_PREFIX) or not name.endswith(".json"):
            continue
        document = _read(folder / name)
        if _is_of_rank(document):
            documents.append(document)
    return documents


def _read(path: Path) -> dict[str, Any]:
    """Return the object of a file; an empty one for the file of another program.

    Raises:
        OSError: It cannot be read.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    if isinstance(document, dict):
        return document
    return {}


def _has_types(
    document: Mapping[str, object], types: Mapping[str, Callable[[object], bool]]
) -> bool:
    return all(name in document and is_type(document[name]) for name, is_type in types.items())


def _is_of_rank(document: Mapping[str, object]) -> bool:
    """Return whether a rank has written this: another program may have a file of the name."""
    # A rank that runs has no end.
    if not _is_end(document.get("end", {"error": "", "time_s": 0})):
        return False
    return _has_types(document, _RANK_TYPES)


def _of_last_attempt(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the files of an earlier run in the same folder, or of an earlier attempt."""
    # A run on fewer ranks than the one before leaves files of the ranks that it does not have.
    newest = max(documents, key=lambda document: document["start_s"])
    return [document for document in documents if document["world"] == newest["world"]]


def read_launch(folder: Path) -> dict[str, Any]:
    """Return what `faccel launch` has written about the first failure, empty if nothing.

    Effects: ambient. Reads the file.
    """
    try:
        document = _read(folder / FOLDER / LAUNCH_FILE)
    except OSError:
        return {}
    if _has_types(document, _LAUNCH_TYPES):
        return document
    return {}
