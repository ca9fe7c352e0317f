"""How a process ends that an exception or Ctrl-C stopped while it had contexts."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any, NoReturn


class ExceptHook:
    """`sys.excepthook` for as long as there are contexts.

    Ctrl-C is one line of rank 0 instead of a traceback of each; anything else goes on to the hook that was there.
    """

    def __init__(self) -> None:
        self.users: set[int] = set()
        self.before: Any = None
        self.rank, self.world_size = 0, 1

    def enter(self, user: int, rank: int, world_size: int) -> None:
        """Take the hook's place, for the first context."""
        if sys.excepthook != self._report:
            self.before = sys.excepthook
            sys.excepthook = self._report
        self.rank, self.world_size = rank, max(world_size, self.world_size)
        self.users.add(user)

    def leave(self, user: int) -> None:
        """Give it back with the last context, but not while an exception is on its way up through a `with` block."""
        self.users.discard(user)
        if not self.users and sys.excepthook == self._report and sys.exc_info()[0] is None:
            sys.excepthook = self.before
            self.world_size = 1

    def _report(self, kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        interrupted = issubclass(kind, KeyboardInterrupt)
        if not interrupted:
            self.before(kind, error, at)
        elif self.rank == 0:
            sys.stderr.write("interrupted\n")
        if self.world_size > 1 and not sys.flags.inspect:
            _end(signal.SIGINT if interrupted else None)


def _end(by: signal.Signals | None) -> NoReturn:
    """End this process as the interpreter does, exit handlers and all, but do not take the interpreter apart.

    gloo's threads still hold what the interrupted collective was given. They let go of it when their group is
    destroyed, which needs the interpreter; without it the process aborts (5 of 30 here) with a message and code of C++.
    """
    if by is not None:
        signal.signal(by, signal.SIG_DFL)  # another one does not wait for the rest
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    sys.stdout.flush()
    sys.stderr.flush()
    if by is not None:
        os.kill(os.getpid(), by)
    os._exit(1)
