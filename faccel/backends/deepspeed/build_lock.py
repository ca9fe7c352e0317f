"""Locks that remain after a build of an operator of DeepSpeed was killed.

DeepSpeed builds its operators when they are first used. While it builds, PyTorch holds the file
`lock` in the folder of the operator open; a process that finds the file waits until it is removed.
A build that is killed does not remove it, so later runs would wait forever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from faccel.context import DistContext
from faccel.errors import BackendError

MAX_BUILD_S = 900
"""A build on another node, whose processes are not visible here, is taken as killed after this."""


def check_no_stale_lock(op_names: Iterable[str], ctx: DistContext) -> None:
    """Raise if a killed build has left its lock.

    Effects: ambient. Reads the cache of built operators.

    Args:
        op_names: The names of the operators.
        ctx: The context.

    Raises:
        BackendError: There is a lock that no process holds.
    """
    for lock in _locks(op_names, os.environ):
        check_lock(lock, ctx)


def check_lock(lock: Path, ctx: DistContext) -> None:
    """Raise if no process holds a lock. Effects: ambient; reads the file system.

    Raises:
        BackendError: The build that made it was killed.
    """
    try:
        age_s = time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # the build of another rank has ended since the search
        return
    # A node of this run may be building in a cache that all nodes have.
    if ctx.num_nodes > 1 and age_s < MAX_BUILD_S:
        return
    # `exists` comes last: a build that ends closes the file before it removes it.
    if not is_held_open(lock) and lock.exists():
        raise BackendError(
            "a build of an operator of DeepSpeed was killed, and left a lock that later runs "
            "wait for",
            got=str(lock),
            fix=f"delete the folder, as in `rm -r {lock.parent}`, unless a process on another "
            "node is building there now",
        )


def _locks(op_names: Iterable[str], env: Mapping[str, str]) -> list[Path]:
    from torch.utils.cpp_extension import get_default_build_root  # slow to import

    root = env.get("TORCH_EXTENSIONS_DIR")
    pattern = "{}/lock"
    if root is None:
        root = get_default_build_root()
        pattern = "*/{}/lock"  # one folder for each version of Python and of the device
    locks: list[Path] = []
    for name in op_names:
        locks += Path(root).glob(pattern.format(name))
    return locks


def is_held_open(path: Path) -> bool:
    """Whether a process of this user on this node has the file open; True where that is unknown.

    Effects: ambient. Reads `/proc`.
    """
    processes = Path("/proc")
    if not (processes / "self" / "fd").exists():
        return True
    for descriptor in processes.glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == str(path.resolve()):
                return True
        except OSError:  # the process has ended, or is of another user
            continue
    return False
