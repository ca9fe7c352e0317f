"""Ends a rank with its launcher. As a script, it does so for any command.

`python -I -S rank_process.py PID COMMAND...` becomes the command, which Linux kills when the
launcher PID ends. It imports the standard library only, so that it takes milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# As a shell: the command exists and cannot be executed.
_NOT_EXECUTABLE = 126


def end_with_launcher(launcher: int) -> None:
    """Let this process, a child of the launcher, be killed when the launcher ends.

    A handler in Python would not run during `init`, a collective or any other call in C.

    Effects: ambient. Without Linux it does nothing.

    Args:
        launcher: Process id of the launcher.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have ended before the call.
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def with_launcher(command: str, args: list[str]) -> tuple[str, list[str]]:
    """Return the executable and its arguments that end the command with this process.

    Effects: ambient.
    """
    if sys.platform != "linux":
        return command, args
    return sys.executable, ["-I", "-S", __file__, str(os.getpid()), command, *args]


def _main(launcher: int, command: list[str]) -> None:
    # Until the command has replaced this script, Ctrl-C must print no traceback. For a command in
    # the background of a shell the signal is ignored, and stays so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_launcher(launcher)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        # In the format of PyTorch's agent, which reads it for the launcher.
        message = {"message": str(error), "errno": error.errno, "extraInfo": {"timestamp": "0"}}
        path = os.environ[_ERROR_FILE]
        # Without the file, as on a full disk, the agent reports the exit code. It would raise for a
        # part of the file.
        with contextlib.suppress(OSError):
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                json.dump({"message": message}, file)
            os.replace(f"{path}.new", path)
        sys.exit(_NOT_EXECUTABLE)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
