"""Ends all processes of a launch after its launcher was killed. As a script, it is that guard.

The kernel ends the ranks themselves (see `rank_process`). The guard also ends what they started, as
a shell script starts the rank, and processes of `faccel.launch` that still import the script. It
imports the standard library only, so that it is small.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator

# Processes that start in the block inherit it. Not `FACCEL_...`, which are fields of `Config`.
_VARIABLE = "_FACCEL_LAUNCH_ID"


@contextlib.contextmanager
def guarded(folder: str | None) -> Generator[None]:
    """Guard the processes that start in the body, also those that they start.

    Effects: ambient. Sets a variable of the environment, and starts a process, until the end of the
    block. Without Linux it does nothing.

    Args:
        folder: The temporary folder of the launch, which the guard removes too.
    """
    if sys.platform != "linux":
        yield
        return
    value, outer = secrets.token_hex(16), os.environ.pop(_VARIABLE, None)
    words = [sys.executable, "-I", "-S", __file__, str(os.getpid()), f"{_VARIABLE}={value}"]
    if folder is not None:
        words.append(folder)
    # In its own session, because a signal to the group of the launcher must not end it.
    guard = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ[_VARIABLE] = value
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if outer is not None:  # of the launch that started this launcher
            os.environ[_VARIABLE] = outer
        guard.kill()
        guard.wait()


def kill_marked(variable: bytes) -> None:
    """Kill the processes of this user that started with `NAME=value` in their environment.

    Effects: ambient.
    """
    for name in os.listdir("/proc"):
        # Other users' processes cannot be read, and a process may end at any time.
        with contextlib.suppress(OSError):
            if name.isdecimal() and variable in _environment(name):
                os.kill(int(name), signal.SIGKILL)


def _environment(pid: str) -> list[bytes]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read().split(b"\0")


def _main(launcher: int, variable: str, folders: list[str]) -> None:
    try:
        descriptor = os.pidfd_open(launcher)
    except ProcessLookupError:  # it has ended already
        descriptor = None
    if descriptor is not None:
        select.select([descriptor], [], [])  # readable when the process has ended
    # Twice: a process that was read before its parent may have started another one.
    for _ in range(2):
        kill_marked(variable.encode())
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
