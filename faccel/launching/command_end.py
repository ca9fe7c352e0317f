"""How the command line ends by a signal: one line, the terminal as before, 128 + signal.

This imports nothing heavy: it is the first that the command line imports, because a Ctrl-C during
the other imports would print a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from faccel.runtime.end_signals import END_SIGNALS

_SHOW_CURSOR = b"\x1b[?25h"


def open_standard_streams() -> None:
    """Open closed standard streams, as of `faccel launch ... <&- >&- 2>&-`, on the null device.

    A file or socket that is opened later would get the number of such a stream, and messages would
    be written into it. Python has no objects for closed streams.

    Effects: ambient.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the smallest number that is free: this one
            os.set_inheritable(number, True)
    # They stay open until the process ends.
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


class CommandEnd:
    """Ends this process by a signal. Takes the settings of the terminal when it is created.

    Args:
        clean_up: Called before the process ends.
    """

    def __init__(self, clean_up: Callable[[], object] = lambda: None) -> None:
        self._clean_up = clean_up
        self._terminal = _terminal_settings()

    def handle(self, number: int, frame: FrameType | None) -> NoReturn:
        """End the process. Python calls this for a signal.

        An exception instead could be lost: in a callback of C++, or in an `except` of an import.
        """
        for other in END_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        self._clean_up()
        os._exit(self.report(number))

    def report(self, number: int) -> int:
        """Print the line for a signal, and return the exit code."""
        self.restore_terminal()
        line = "interrupted\n"
        if number != signal.SIGINT:
            line = f"ended by {signal.Signals(number).name}\n"
        with suppress(OSError):  # the terminal is closed
            # Not `sys.stderr`, whose buffer the interrupted code may be writing to.
            os.write(2, line.encode())
        return 128 + number

    def restore_terminal(self) -> None:
        """Undo what ended ranks have left: a hidden cursor, input that is not echoed."""
        with suppress(OSError):
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)
            _set_terminal(self._terminal)

    def install(self) -> dict[int, Any]:
        """Install the handlers, and return the previous ones. Ignored signals stay ignored."""
        previous = {}
        for number in END_SIGNALS:
            # `nohup` ignores SIGHUP, and shells ignore SIGINT for processes in the background.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, self.handle)
        return previous


@contextmanager
def ending_by_signals(clean_up: Callable[[], object]) -> Generator[CommandEnd]:
    """End this process by a signal in the body.

    Effects: ambient. Installs signal handlers, and restores the previous ones.
    """
    end = CommandEnd(clean_up)
    previous = end.install()
    try:
        yield end
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _terminal_settings() -> list[Any] | None:
    if os.name != "posix" or not os.isatty(0):
        return None
    import termios

    return termios.tcgetattr(0)


def _set_terminal(settings: list[Any] | None) -> None:
    # A process in the background that sets its terminal is stopped.
    if settings is None or os.tcgetpgrp(0) != os.getpgrp():
        return
    import termios

    termios.tcsetattr(0, termios.TCSANOW, settings)
