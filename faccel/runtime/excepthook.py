"""How a process ends that an exception or Ctrl-C stopped while it had contexts."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from faccel.config import LAUNCH
from faccel.errors import RankFailedError

_GRACE_S = 3.0


class _Hook:
    """One installation of `sys.excepthook`; passes everything on once it is retired.

    Ctrl-C is one line of rank 0 instead of a traceback of each; anything else goes on to the hook that was there.
    """

    def __init__(self, rank: int, world_size: int, env: Mapping[str, str]) -> None:
        self.before: Any = sys.excepthook
        self.error_file = env.get(
            "TORCHELASTIC_ERROR_FILE"
        )  # where an agent of torch's reads what became of its ranks
        self.is_launched = (
            bool(self.error_file) and LAUNCH in env
        )  # `faccel launch` shows the first failure of all
        folder = os.path.dirname(self.error_file or "")
        self.is_logged = os.path.exists(
            os.path.join(folder, "stderr.log")
        )  # `--log-dir`: this rank has one of its own
        self.rank, self.world_size = rank, world_size
        self.is_retired = False

    def __call__(
        self, kind: type[BaseException], error: BaseException, at: TracebackType | None
    ) -> None:
        if self.is_retired:
            self.before(kind, error, at)
            return
        interrupted = issubclass(kind, KeyboardInterrupt)
        if not interrupted:
            if self.error_file:
                _record(error, self.error_file)
            if not self.is_launched or self.is_logged:
                self.before(kind, error, at)
        elif self.rank == 0:
            sys.stderr.write("interrupted\n")
        if self.error_file and isinstance(error, RankFailedError):
            time.sleep(
                _GRACE_S
            )  # whose failure it follows from ends first, and the agent ends this one
        is_prompt = sys.flags.inspect or hasattr(sys, "ps1")
        if (
            self.world_size > 1
            and not is_prompt
            and threading.current_thread() is threading.main_thread()
        ):
            _end(signal.SIGINT if interrupted else None)


class ExceptHook:
    """Keeps a hook for as long as there are contexts."""

    def __init__(self) -> None:
        self.users: set[int] = set()
        self.hook: _Hook | None = None

    def enter(self, user: int, rank: int, world_size: int, env: Mapping[str, str]) -> None:
        """Take the hook's place, for the first context and for one of a larger world."""
        if (
            self.hook is None
            or self.hook.world_size < world_size
            or sys.excepthook is not self.hook
        ):
            self._retire()
            self.hook = sys.excepthook = _Hook(rank, world_size, env)
        self.users.add(user)

    def leave(self, user: int, error: BaseException | None) -> None:
        """Give it back with the last context, but not while `error` is on its way up through a `with` block."""
        self.users.discard(user)
        if not self.users and error is None:
            self._retire()

    def _retire(self) -> None:
        if self.hook is None:
            return
        self.hook.is_retired = True
        if sys.excepthook is self.hook:
            sys.excepthook = self.hook.before
        self.hook = None


def _record(error: BaseException, path: str) -> None:
    """Leave word of an error for the agent of torch that started this process, in the form that it reads."""
    lines = "".join(traceback.format_exception(error))
    details = {"py_callstack": lines, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": details}
    with suppress(OSError), open(path, "w") as file:
        json.dump({"message": message}, file)


def _end(by: signal.Signals | None) -> NoReturn:
    """End this process as the interpreter does, exit handlers and all, but do not take the interpreter apart.

    gloo's threads still hold what the interrupted collective was given. They let go of it when their group is
    destroyed, which needs the interpreter; without it the process aborts (5 of 30 here) with a message and code of C++.
    """
    if by is not None:
        signal.signal(by, signal.SIG_DFL)  # another one does not wait for the rest
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            stream.flush()
    if by is not None:
        os.kill(os.getpid(), by)
    os._exit(1)
