"""Where a progress is shown: a terminal, a notebook, or the lines of a log."""

from __future__ import annotations

import html
import math
import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from faccel.tracking.progress_text import Status, count_text, details, line_of, one_line
from faccel.tracking.screen import screen_of

if TYPE_CHECKING:
    from rich.console import Console

_BAR_INTERVAL_S = 0.1  # as fast as an eye needs
_LINE_INTERVAL_S = 30.0
_MAX_BAR_WIDTH = 40


class View(Protocol):
    """Shows a progress."""

    interval_s: float
    """A redraw is due this long after the last one."""

    def next_count(self, count: int, total: int | None) -> float:
        """Return the count at which a redraw is due, whatever the time."""
        ...

    def draw(self, status: Status) -> None:
        """Show how far it is."""
        ...

    def close(self, status: Status) -> None:
        """Show the end; `draw` may be called again afterwards, as in the next epoch."""
        ...


def view_of(file: TextIO | None) -> View:
    """Return the view for a file; None is standard error or the output of a cell.

    Effects: ambient. Reads where this process prints.
    """
    if file is None and _notebook_shell() is not None:
        return NotebookView()
    out = file
    if out is None:
        out = sys.stderr
    # A bar redraws its line with control characters, which would fill a log file.
    if out.isatty():
        # Imported here, because only rank 0 in a terminal draws a bar.
        from rich.console import Console

        screen = screen_of(out)
        console = Console(file=screen.file)
        if not console.is_dumb_terminal:
            return TerminalView(console)
    return LinesView(out)


def _notebook_shell() -> object | None:
    """Return the shell of a notebook's kernel, None elsewhere."""
    # Not imported: a process without it is no kernel.
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return None
    shell = ipython.get_ipython()
    # IPython in a terminal has no kernel.
    if hasattr(shell, "kernel"):
        return shell
    return None


class LinesView:
    """A line after each tenth, or after 1, 2, 4, ... items of an unknown total."""

    interval_s = _LINE_INTERVAL_S

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._has_started = False

    def next_count(self, count: int, total: int | None) -> float:
        """Return the count of the next line."""
        if total:
            # The smallest count with one tenth more, rounded up.
            tenths = 10 * count // total + 1
            return -(-tenths * total // 10)
        return max(1, 2 * count)  # log2(n) lines for a stream of n items

    def draw(self, status: Status) -> None:
        """Write a line; nothing before the first item."""
        if not self._has_started:
            self._has_started = True
            return
        self._file.write(f"{line_of(status)}\n")
        self._file.flush()

    def close(self, status: Status) -> None:
        """Write nothing: the last tenth has its line."""
        self._has_started = False


class TerminalView:
    """A bar, drawn with rich on the screen that all bars of the terminal have in common."""

    interval_s = _BAR_INTERVAL_S

    def __init__(self, console: Console) -> None:
        self._console = console
        self._screen = screen_of(console.file)  # pyright: ignore[reportArgumentType]

    def next_count(self, count: int, total: int | None) -> float:
        """Return no count: a bar is redrawn by the clock only."""
        return math.inf

    def draw(self, status: Status) -> None:
        """Redraw the bar."""
        # An earlier screen of this terminal may have ended, and a later one begun.
        self._screen = screen_of(self._screen.file)
        self._screen.draw(self, self._line(status))

    def close(self, status: Status) -> None:
        """Remove the bar; the outermost one leaves its last state."""
        self._screen.close(self, self._line(status))

    def _line(self, status: Status) -> str:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        texts = [count_text(status)]
        if status.percent is not None:
            texts.append(f"{status.percent}%")
        line = one_line(", ".join([*texts, *details(status)]))
        text = Text(line, no_wrap=True, overflow="ellipsis")
        # One column less than the terminal, so that the line does not wrap.
        width = self._console.width - 1
        description = one_line(str(status.description)) or "working"
        label = Text(description, no_wrap=True, overflow="ellipsis")
        bar_width = min(_MAX_BAR_WIDTH, max(4, width - len(label) - len(text) - 2))
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(status.total or None, status.count, width=bar_width)
        grid.add_row(label, bar, text)
        with self._console.capture() as capture:
            self._console.print(grid, width=width, crop=True)
        return capture.get().rstrip("\n")


class NotebookView:
    """A bar in the output of a cell, which is replaced instead of appended."""

    interval_s = _BAR_INTERVAL_S

    def __init__(self) -> None:
        self._handle: Any = None

    def next_count(self, count: int, total: int | None) -> float:
        """Return no count: a bar is redrawn by the clock only."""
        return math.inf

    def draw(self, status: Status) -> None:
        """Replace the output."""
        bundle = _bundle(status)
        if self._handle is None:
            from IPython.display import display

            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def close(self, status: Status) -> None:
        """Leave the last state; the next iteration has another output."""
        self.draw(status)
        self._handle = None


def _bundle(status: Status) -> dict[str, str]:
    """Return the output by MIME type: HTML, and text where no HTML is shown."""
    label = html.escape(status.description)
    text = html.escape(", ".join([count_text(status), *details(status)]))
    bar = "<progress></progress>"
    if status.total:
        bar = f'<progress value="{status.count}" max="{status.total}"></progress>'
    return {"text/plain": line_of(status), "text/html": f"<div>{label} {bar} {text}</div>"}
