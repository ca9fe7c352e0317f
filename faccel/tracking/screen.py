"""The lines at the bottom of a terminal that progress bars redraw, and what is printed above.

Not rich's `Live`: it hides the cursor, which stays hidden after `kill -9`, holds back text without
the end of its line, and ends the line where such text is flushed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO, cast

# Control sequences of ECMA-48.
_ERASE_LINE = "\r\x1b[2K"
_UP = "\x1b[1A"

_open_screens: list[Screen] = []


class Screen:
    """The bars of one terminal, one below the other.

    While a bar is open, `sys.stdout` and `sys.stderr` are replaced if they are terminals: text is
    written above the bars. The cursor is never hidden, so a killed process leaves no trace.

    Args:
        file: The terminal.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self._lines: dict[object, str] = {}
        self._num_drawn = 0
        self._is_line_start = True
        self._num_pauses = 0
        # Another thread may print. Reentrant, because a signal handler may print in the middle.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._streams: dict[str, tuple[_StreamAbove, TextIO]] = {}

    def draw(self, bar: object, line: str) -> None:
        """Show the line of a bar, below those of older bars."""
        with self._lock:
            if not self._lines:
                self._open()
            self._lines[bar] = line
            self._redraw()

    def close(self, bar: object, line: str) -> None:
        """Remove a bar. The oldest one leaves its line; those inside of it leave nothing."""
        with self._lock:
            if bar not in self._lines:
                return
            is_oldest = next(iter(self._lines)) is bar
            del self._lines[bar]
            above = ""
            if is_oldest:
                above = f"{line}\n"
                if not self._is_line_start:
                    above = f"\n{above}"
                self._is_line_start = True
            self._redraw(above)
            if not self._lines:
                self._close()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Erase the bars, and draw them again after the body, which prints whole lines."""
        # In a forked process, such as a worker of a loader, the bars are the parent's.
        if os.getpid() != self._pid:
            yield
            return
        with self._lock:
            self._erase()
            self._num_pauses += 1
            try:
                yield
            finally:
                self._num_pauses -= 1
                self._redraw()

    def write_above(self, stream: TextIO, text: str) -> int:
        """Write to a stream of the same terminal, above the bars."""
        if not text or not self._lines or os.getpid() != self._pid:
            return stream.write(text)
        with self._lock:
            self._erase()
            num_chars = stream.write(text)
            stream.flush()  # before the bars are drawn through another stream
            # `print("a", "b")` writes four times: bars appear after the end of the line only.
            self._is_line_start = text.endswith("\n")
            self._redraw()
            return num_chars

    def _open(self) -> None:
        _open_screens.append(self)
        for name in ("stdout", "stderr"):
            stream: TextIO | None = getattr(sys, name)
            # A file must get its text even if the bars are in a terminal.
            if stream is not None and stream.isatty():
                proxy = _StreamAbove(stream, self)
                self._streams[name] = (proxy, stream)
                setattr(sys, name, proxy)

    def _close(self) -> None:
        _open_screens.remove(self)
        for name, (proxy, stream) in self._streams.items():
            # Another program may have replaced it since; the proxy passes text on without bars.
            if getattr(sys, name) is proxy:
                setattr(sys, name, stream)
        self._streams.clear()

    def _redraw(self, above: str = "") -> None:
        if self._num_pauses or not self._is_line_start:
            return
        # One write, so that the bars do not flicker.
        lines = "\n".join(self._lines.values())
        self._write(self._erasure() + above + lines)
        self._num_drawn = len(self._lines)

    def _erase(self) -> None:
        if self._num_drawn:
            self._write(self._erasure())
            self._num_drawn = 0

    def _erasure(self) -> str:
        """Return the sequences that erase the bars, and leave the cursor where they began."""
        if not self._num_drawn:
            return ""
        return _ERASE_LINE + (_UP + _ERASE_LINE) * (self._num_drawn - 1)

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


class _StreamAbove:
    """A stream of the terminal whose text appears above the bars."""

    def __init__(self, stream: TextIO, screen: Screen) -> None:
        self._stream = stream
        self._screen = screen

    def write(self, text: str) -> int:
        return self._screen.write_above(self._stream, text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    # `Any` as the attributes of a stream: `fileno`, `encoding`, `buffer` and others
    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def screen_of(file: TextIO) -> Screen:
    """Return the screen of a terminal, which all bars of the process have in common.

    Effects: ambient. Reads which bars are open.
    """
    for screen in _open_screens:
        # `sys.stderr` is a proxy while a bar is open.
        if file is screen.file or getattr(file, "_screen", None) is screen:
            return screen
    return Screen(cast("TextIO", getattr(file, "_stream", file)))


def above_bars() -> AbstractContextManager[None]:
    """Erase all progress bars of this process while the body prints whole lines.

    Effects: ambient.
    """
    # Usually there is none.
    if not _open_screens:
        return nullcontext()
    return _open_screens[0].paused()
