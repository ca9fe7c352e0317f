"""Names, removal and leftovers of the folders in a directory of checkpoints."""

from __future__ import annotations

import os
import re
import secrets
import shutil

from faccel.checkpoint.manifest import TEMPORARY_PREFIX, folder_name

# The names of temporary folders, of the files in them, and of checkpoints that are being deleted.
_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}\d+-[0-9a-f]+")
_WRITTEN_NAME = re.compile(r"shard.*\.safetensors|manifest\.json|rank-\d+\.json(\.new)?")
_DELETED_NAME = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}old-[0-9a-f]{{8}}")


def unused_folder(path: str, step: int) -> str:
    """Return the path of a new checkpoint, which no file, folder or link has.

    Effects: ambient.
    """
    attempt = 0
    # also a link to nothing has the name
    while os.path.lexists(os.path.join(path, folder_name(step, attempt))):
        attempt += 1
    return os.path.join(path, folder_name(step, attempt))


def delete_folder(folder: str) -> None:
    """Delete a checkpoint, or a link to it; renaming it first makes that atomic.

    Effects: ambient.
    """
    name = f"{TEMPORARY_PREFIX}old-{secrets.token_hex(4)}"
    renamed = os.path.join(os.path.dirname(folder), name)
    os.rename(folder, renamed)
    _remove(renamed)


def _remove(folder: str) -> None:
    """Remove a folder with its files, or a link to a folder without them."""
    if os.path.islink(folder):
        os.unlink(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left_overs(path: str) -> None:
    """Delete what crashed saves have left in a directory; only one writer may call it at a time.

    Effects: ambient.
    """
    for entry in os.scandir(path):
        if _is_left_over(entry):
            _remove(entry.path)


def _is_left_over(entry: os.DirEntry[str]) -> bool:
    """Return whether a crashed save has left an entry of the directory."""
    if _DELETED_NAME.fullmatch(entry.name):
        return True
    if not _TEMPORARY_NAME.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
        return False
    # Another program may have used such a name: a folder of the save has files of these names only.
    return all(map(_WRITTEN_NAME.fullmatch, os.listdir(entry.path)))
