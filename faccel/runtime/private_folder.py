"""Temporary folders of one process, and the removal of those that killed processes have left."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Generator

_LOCK = "owner.lock"


@contextlib.contextmanager
def private_folder(prefix: str) -> Generator[str]:
    """Create a temporary folder that only this user can read, and remove it at the end.

    Folders with this prefix are removed first if their process was killed.

    Effects: ambient. Writes into the folder for temporary files.
    """
    lock = None
    # Windows has no `flock`: there a killed process leaves its folder.
    if sys.platform != "win32":
        _remove_leftovers(tempfile.gettempdir(), prefix)
    folder = tempfile.mkdtemp(prefix=prefix)
    try:
        if sys.platform != "win32":
            lock = _create_locked(os.path.join(folder, _LOCK))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


class TemporaryFiles:
    """Puts temporary files of this process into a folder, until `restore` or the end of a block.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: str) -> None:
        self.previous = tempfile.tempdir
        tempfile.tempdir = folder

    def restore(self) -> None:
        """Put temporary files where they were before."""
        tempfile.tempdir = self.previous

    def __enter__(self) -> TemporaryFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def _remove_leftovers(parent: str, prefix: str) -> None:
    """Remove the folders of this user whose lock no process holds."""
    with os.scandir(parent) as entries:
        paths = [entry.path for entry in entries if entry.name.startswith(prefix)]
    for path in paths:
        # Without a lock the folder is not one of these.
        lock = None
        if _is_of_this_user(path):
            lock = _lock(os.path.join(path, _LOCK), os.O_RDWR)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _is_of_this_user(path: str) -> bool:
    """Whether `path` is a folder of this user, and no symbolic link to one."""
    try:
        status = os.lstat(path)
    except OSError:  # removed since
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _create_locked(path: str) -> int | None:
    """Create a file that is locked before another process can see it under this name."""
    lock = _lock(path + ".new", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    if lock is not None:
        os.rename(path + ".new", path)
    return lock


def _lock(path: str, flags: int) -> int | None:
    """Open and lock a file; None if it does not exist, or another process has locked it.

    The lock ends with the process, however that ends.
    """
    import fcntl

    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also a file system without locks
        os.close(descriptor)
        return None
    return descriptor
