"""The signals that end a process, and whether a rank has a context that reacts to them.

`faccel launch` reads that from a file, because a signal cannot be asked about: without a context
Ctrl-C prints a traceback, or has no effect while the rank waits in C++.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
# Windows has no SIGHUP.
END_SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
"""What a terminal, a cluster and a closed terminal send."""


def context_file(error_file: str) -> str:
    """Return the path of the file that exists while a rank has a context.

    Effects: pure.

    Args:
        error_file: The file for the error of the rank; PyTorch's agent names one for each rank.

    Examples:
        >>> context_file("/tmp/run/attempt_0/1/error.json")
        '/tmp/run/attempt_0/1/context'
    """
    return os.path.join(os.path.dirname(error_file), "context")


def is_ended_by_signals() -> bool:
    """Whether a signal may end this process: not at a prompt, nor on a thread of a test.

    Effects: ambient.
    """
    is_interactive = bool(sys.flags.inspect) or hasattr(sys, "ps1")
    # Python installs handlers, and runs them, on the main thread only.
    return threading.current_thread() is threading.main_thread() and not is_interactive


@contextmanager
def ended_by_signals(*, also_handled: bool) -> Generator[None]:
    """Let signals end the process in the body at once, and without a message.

    Python runs its handlers between two bytecodes of the main thread: not while that waits in C++
    for another rank, which may have ended by the same signal.

    Effects: ambient. Replaces signal handlers, and restores them.

    Args:
        also_handled: Whether handlers of the script are replaced too, or only that of Python, which
            raises `KeyboardInterrupt`.
    """
    handlers: dict[int, Any] = {}
    if is_ended_by_signals():
        for number in END_SIGNALS:
            handler = signal.getsignal(number)
            # SIG_IGN is no function, and stays: `nohup` and shells ignore signals for a process.
            is_replaced = callable(handler) and (
                also_handled or handler is signal.default_int_handler
            )
            if is_replaced:
                handlers[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_by_interrupt() -> None:
    """Let a Ctrl-C end the process from now on, instead of raising `KeyboardInterrupt`.

    Effects: ambient. Replaces a signal handler.
    """
    if is_ended_by_signals() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
