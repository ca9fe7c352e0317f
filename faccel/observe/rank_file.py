"""The file of each rank in the run folder: where its process is, and how it has ended."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faccel.errors import ConfigError, short_text
from faccel.observe.process import start_ticks

FOLDER = ".faccel"
"""In the run folder; a tracker cannot have this name."""
_PREFIX = "rank-"
LAUNCH_FILE = "launch.json"
"""What `faccel launch` writes there when a rank has failed."""


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
        document = json.loads(rank_path(run_dir, rank).read_text(encoding="utf-8"))
        pid, ticks = document["pid"], document["start_ticks"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another program
        return None
    if document.get("host") != socket.gethostname() or "end" in document or pid == os.getpid():
        return None
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
        try:
            document = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError:  # another program's file
            continue
        # Another program may have a file of this name; a rank writes these in any version.
        if isinstance(document, dict) and {"rank", "pid", "world", "start_s"} <= document.keys():
            documents.append(document)
    return documents


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
        document = json.loads((folder / FOLDER / LAUNCH_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(document, dict):
        return document
    return {}
