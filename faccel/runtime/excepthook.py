"""How a process with open contexts ends after an uncaught exception or Ctrl-C.

While contexts are open, `sys.excepthook` is replaced. This is a process-wide effect, which `init`
declares. It is restored when the last context closes.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from faccel.config import LAUNCH
from faccel.errors import FaccelError, RankFailedError
from faccel.runtime.end_signals import context_file, end_by_interrupt, is_ended_by_signals
from faccel.runtime.user_traceback import hide_frames

GRACE_S = 3.0
"""A rank waits this long after the failure of another: the launcher must see the cause first."""

CONSEQUENCES = re.compile(
    "RankFailedError|gloo/transport|Dist(Network|Store|Backend)Error|nccl(Remote|System)Error"
)
"""Matches `class: message` of errors that a rank raises because another rank failed."""

AsRankError = Callable[[RuntimeError, TracebackType | None], Exception | None]
"""`as_rank_error(error, traceback)` for an error that nothing has caught."""
OnError = Callable[[BaseException], None]
"""`on_error(error)`, called first for an error that nothing has caught."""


def _ignore(error: BaseException) -> None:
    """Do nothing."""


class _Hook:
    """One installation of `sys.excepthook`. Once retired, it calls the previous hook only.

    Ctrl-C prints one line on rank 0 instead of a traceback on each rank. Any other exception is
    recorded for the launcher and passed to the previous hook.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        env: Mapping[str, str],
        as_rank_error: AsRankError,
        *,
        shows_frames: bool,
        on_error: OnError,
    ) -> None:
        self.previous: Callable[
            [type[BaseException], BaseException, TracebackType | None], object
        ] = sys.excepthook
        self.world_size = world_size
        self.is_retired = False
        self._pid = os.getpid()
        self._as_rank_error = as_rank_error
        self._shows_frames = shows_frames
        self._on_error = on_error
        self._rank = rank
        # PyTorch's elastic agent reads the failures of its ranks from this file.
        self._error_file = env.get("TORCHELASTIC_ERROR_FILE")
        # `faccel launch` prints the first failure of all ranks, so a rank prints its traceback only
        # to its own log, which exists with `--log-dir`.
        self._is_launched = bool(self._error_file) and LAUNCH in env
        folder = os.path.dirname(self._error_file or "")
        has_log = os.path.exists(os.path.join(folder, "stderr.log"))
        # Without `faccel launch` the rank itself is the only one that can print it.
        self._prints_traceback = not self._is_launched or has_log
        # Ctrl-C reaches all ranks of a terminal, and one line is enough.
        self._prints_interrupt = rank == 0 and not self._is_launched
        self._context_file: str | None = None
        if self._error_file and self._is_launched:
            self._context_file = context_file(self._error_file)

    def __call__(
        self,
        error_type: type[BaseException],
        error: BaseException,
        tb: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid:
            # A forked process, such as a worker of a DataLoader, does not report for its rank. At a
            # Ctrl-C the rank stops to receive tensors, and the threads that send them fail.
            if not issubclass(error_type, ConnectionError):
                self.previous(error_type, error, tb)
            return
        if self.is_retired:
            self.previous(error_type, error, tb)
            return
        if self.world_size > 1:
            end_by_interrupt()  # a Ctrl-C while this hook waits would print an error in the hook
        if issubclass(error_type, KeyboardInterrupt):
            if self._prints_interrupt:
                sys.stderr.write("interrupted\n")
            self._end_process(signal.SIGINT)
            return
        error = self._report(error, tb)
        if self._error_file and isinstance(error, RankFailedError):
            # The rank that caused this error ends first, and then the agent ends this one.
            time.sleep(GRACE_S)
        self._end_process(None)

    def _report(self, error: BaseException, tb: TracebackType | None) -> BaseException:
        """Record and print an error; return the one that names the failed rank, if one failed."""
        if isinstance(error, RuntimeError):
            error = self._as_rank_error(error, tb) or error
        self._on_error(error)
        if not self._shows_frames and isinstance(error, FaccelError):
            hide_frames(error)
            tb = error.__traceback__
        if self._error_file:
            write_error_file(error, self._error_file)
        if self._prints_traceback:
            self._print(error, tb)
        return error

    def _print(self, error: BaseException, tb: TracebackType | None) -> None:
        if self._is_launched or not isinstance(error, RankFailedError):
            self.previous(type(error), error, tb)
            return
        # Its cause is in another process, and that of this traceback would be frames of C++.
        lines = f"{type(error).__name__}: {error}".splitlines()
        sys.stderr.write("".join(f"[rank{self._rank}]: {line}\n" for line in lines))

    def _end_process(self, end_signal: signal.Signals | None) -> None:
        """End this process, unless it is alone, a thread failed, or a prompt would return."""
        if self.world_size > 1 and is_ended_by_signals():
            _exit_without_finalizing(end_signal)

    def create_context_file(self) -> None:
        """Let `faccel launch` forward Ctrl-C, which this hook reports."""
        if self._context_file is not None:
            with (
                suppress(OSError),
                open(self._context_file, "w", encoding="utf-8"),
            ):  # the launcher has ended
                pass

    def remove_context_file(self) -> None:
        """Let `faccel launch` send SIGTERM at Ctrl-C: no hook would report a KeyboardInterrupt."""
        if self._context_file is not None:
            with suppress(OSError):
                os.remove(self._context_file)


class ExceptHook:
    """Keeps a hook installed while there are open contexts."""

    def __init__(self) -> None:
        self._context_ids: set[int] = set()
        self._hook: _Hook | None = None

    @property
    def num_contexts(self) -> int:
        """The number of open contexts."""
        return len(self._context_ids)

    def install(
        self,
        context_id: int,
        rank: int,
        world_size: int,
        env: Mapping[str, str],
        as_rank_error: AsRankError = lambda error, traceback: None,
        *,
        shows_frames: bool = False,
        on_error: OnError = _ignore,
    ) -> None:
        """Install a hook for the first context, and a new one for a context of a larger world.

        Effects: ambient. Replaces `sys.excepthook`.

        Args:
            context_id: Identity of the context.
            rank: Rank of this process.
            world_size: Number of ranks.
            env: The environment.
            as_rank_error: Returns an error that names the failed rank, if one is the cause.
            shows_frames: Whether the traceback of an error of faccel has the frames inside of it.
            on_error: Called with an error that nothing has caught.
        """
        # Another library may have replaced it since.
        is_current = self._hook is not None and sys.excepthook is self._hook
        if self._hook is None or not is_current or self._hook.world_size < world_size:
            self._retire()
            self._hook = _Hook(
                rank, world_size, env, as_rank_error, shows_frames=shows_frames, on_error=on_error
            )
            sys.excepthook = self._hook
            self._hook.create_context_file()
        self._context_ids.add(context_id)

    def uninstall(self, context_id: int, error: BaseException | None) -> None:
        """Restore the previous hook with the last context.

        The hook stays if `error` is an exception that is about to end the process.

        Effects: ambient. Replaces `sys.excepthook`.
        """
        self._context_ids.discard(context_id)
        if not self._context_ids and error is None:
            self._retire()

    def _retire(self) -> None:
        if self._hook is None:
            return
        self._hook.remove_context_file()
        # Another library may have installed a hook that calls this one: it stays callable.
        self._hook.is_retired = True
        if sys.excepthook is self._hook:
            sys.excepthook = self._hook.previous
        # A later context installs a new hook with a new environment.
        self._hook = None


def write_error_file(error: BaseException, path: str) -> None:
    """Record an error in the JSON format of PyTorch's elastic agent.

    Effects: ambient. Writes the file.
    """
    lines = "".join(traceback.format_exception(error))
    # The keys are those of torch.distributed.elastic's ErrorHandler.
    details = {"py_callstack": lines, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": details}
    # Without the file the agent reports the exit code alone, which is better than a second
    # exception in the hook.
    with suppress(OSError):
        # Renamed when it is complete: the agent would raise for a part of it, as on a full disk.
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)
        os.replace(f"{path}.new", path)


def _exit_without_finalizing(end_signal: signal.Signals | None) -> NoReturn:
    """End this process with all exit handlers, but do not finalize the interpreter.

    Threads of gloo may still hold tensors of the interrupted collective. They release them when
    their group is destroyed, which needs the interpreter. During finalization the process would
    abort with a C++ message and exit code (5 of 30 runs).
    """
    if end_signal is not None:
        signal.signal(end_signal, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    # The two steps of the interpreter's exit: join threads that are not daemons, run the handlers.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or a pipe without a reader
            stream.flush()
    if end_signal is not None:
        os.kill(os.getpid(), end_signal)  # so that the shell sees the signal
    os._exit(1)
