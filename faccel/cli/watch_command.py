"""The command `faccel watch RUN`."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING

import click

from faccel.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

    from faccel.report.live import Frame, LiveMetric, RankRow

_EVERY_S = 1.0
_WIDTH = 100  # where there is no terminal
_LEAVE_SCREEN = b"\x1b[?1049l"
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-~=+*#"
_MAX_METRICS = 8
_MAX_RANKS = 16
_MIN_RANK_ROWS = 4
_MAX_BAR = 80
_MAX_SPARK = 60
_LOG_RATIO = 50.0
_EXIT_CODES = {"running": 0, "ended": 0, "failed": 5, "stopped": 5}
_STYLES = {
    "running": "bold blue",
    "ended": "bold green",
    "failed": "bold red",
    "stopped": "bold red",
}
_CATEGORY_STYLES = {
    "useful_s": "green",
    "data_wait_s": "yellow",
    "checkpoint_s": "magenta",
    "evaluation_s": "blue",
    "startup_s": "bright_black",
    "skipped_s": "bright_magenta",
    "lost_s": "red",
    "down_s": "bright_red",
}


@click.command()
@click.argument("run", type=click.Path())
@click.option("--once", is_flag=True, help="Print the run as it is now, and end.")
def watch(run: str, *, once: bool) -> None:
    """Show the run in the folder RUN while it trains, until it ends.

    RUN is the folder of `faccel launch --run-dir RUN`, or one run in it. Without a terminal the run
    is printed once.

    The exit code is 0 if the run trains or has ended, 5 if it has failed or was killed, 1 if there
    is no such run.
    """
    from faccel.report.live import LiveRun

    live = LiveRun(run)
    # A dumb terminal has no other screen.
    is_shown = sys.stdout.isatty() and not once and not _console().is_dumb_terminal
    frame = live.frame()
    if is_shown and not frame.is_over:
        frame = _show(live.frame)
    # The last one stays on the terminal.
    console = _console()
    console.print(rendered(frame, console, max_rows=None))
    sys.exit(_EXIT_CODES[frame.state])


def _show(read: Callable[[], Frame]) -> Frame:
    """Show frames on the other screen of the terminal until the run is over; return the last."""
    from rich.live import Live

    from faccel.launching.command_end import ending_by_signals

    console = _console()
    # Without a thread of rich: it would draw while a signal ends this process.
    live = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")
    with ending_by_signals(_leave_screen), live:
        while True:
            frame = read()
            live.update(rendered(frame, console, max_rows=console.size.height), refresh=True)
            if frame.is_over:
                return frame
            time.sleep(_EVERY_S)


def _leave_screen() -> None:
    # Not `live.stop`: the signal may have interrupted it while it draws.
    with suppress(OSError):
        os.write(1, _LEAVE_SCREEN)


def _console() -> Console:
    from rich.console import Console

    # Rich would take 80 columns for a pipe.
    width = None
    if not sys.stdout.isatty():
        width = _WIDTH
    # Numbers in the text are not marked, and `[x]` in a name is no style.
    return Console(width=width, highlight=False, markup=False, emoji=False)


def rendered(frame: Frame, console: Console, *, max_rows: int | None) -> Group:
    """Return a frame as rich draws it.

    Effects: pure.

    Args:
        frame: The run.
        console: Where it is drawn, for its width and encoding.
        max_rows: The height of the screen; None shows everything.
    """
    from rich.console import Group
    from rich.text import Text

    width = console.size.width
    head = [_title(frame), _shares_bar(frame, console), _numbers(frame)]
    head.append(Text(printable(frame.sentence), style="bold"))
    if frame.next_step:
        head.append(Text(printable(f"To fix: {frame.next_step}.")))
    # Lines wrap on a narrow terminal.
    num_used = sum(len(text.wrap(console, width)) for text in head) + 3
    metrics = frame.metrics[:_MAX_METRICS]
    ranks = _rank_lines(frame.ranks, width, grouped_above=_MAX_RANKS)
    # Metrics first: of many ranks, groups are shown.
    if max_rows is not None:
        num_free = max_rows - num_used
        metrics = metrics[: max(num_free - _MIN_RANK_ROWS, 1)]
        ranks = _rank_lines(frame.ranks, width, grouped_above=max(num_free - len(metrics), 1))
    metric_lines = _metric_lines(metrics, width, _blocks(console))
    blocks = [list(filter(None, head)), metric_lines, ranks]
    # An empty line between blocks, and none for what a run does not have.
    lines: list[Text] = []
    for block in filter(None, blocks):
        lines += [Text(), *block]
    return Group(*lines[1:])


def _title(frame: Frame) -> Text:
    from rich.text import Text

    from faccel.report.words import duration_text

    text = Text(printable(frame.name), style="bold")
    text.append(f"  {frame.state}", style=_STYLES[frame.state])
    text.append(f"  {duration_text(frame.elapsed_s)}", style="not bold")
    return text


def _numbers(frame: Frame) -> Text:
    """Return step, speed, and the last result of `rates`, in one line."""
    from rich.text import Text

    from faccel.report.words import count_text, number_text, percent_text
    from faccel.tracking.progress_text import bytes_text

    rates = dict(frame.rates)
    if frame.steps_s is not None:  # newer than that of `rates`
        rates["steps_s"] = frame.steps_s
    formats: dict[str, Callable[[float], str]] = {
        "steps_s": lambda value: f"{number_text(value)} steps/s",
        "samples_s": lambda value: f"{number_text(value)} samples/s",
        "tokens_s": lambda value: f"{number_text(value)} tokens/s",
        "mfu": lambda value: f"MFU {percent_text(value)}",
        "data_wait": lambda value: f"data wait {percent_text(value)}",
        "peak_bytes": lambda value: f"peak {bytes_text(value)}",
        "slowest_rank": lambda value: f"slowest rank {value:.0f}",
    }
    words: list[str] = []
    if frame.step is not None:
        words.append(f"step {frame.step:,}")
    for name, to_text in formats.items():
        # A loop that counts no tokens has 0 of them; rank 0 may be the slowest one.
        if rates.get(name) or (name == "slowest_rank" and name in rates):
            words.append(to_text(rates[name]))
    # Most runs have none.
    if frame.num_restarts:
        words.append(count_text(frame.num_restarts, "restart"))
    return Text("  ".join(words))


def _shares_bar(frame: Frame, console: Console) -> Text:
    """Return a bar of the time by category, and what its colours are."""
    from rich.text import Text

    from faccel.report.findings import CATEGORIES
    from faccel.report.words import percent_text

    text = Text()
    present = {name: share for name, share in frame.shares.items() if share >= 0.005}
    num_cells = min(console.size.width, _MAX_BAR)
    has_colours = console.color_system is not None
    if has_colours:
        for name, share in present.items():
            # Spaces with a background: not every terminal has blocks.
            text.append(" " * round(share * num_cells), style=f"on {_CATEGORY_STYLES[name]}")
        text.append("\n")
    for name, share in present.items():
        if has_colours:
            text.append("  ", style=f"on {_CATEGORY_STYLES[name]}")
            text.append(" ")
        text.append(f"{CATEGORIES[name]} {percent_text(share)}  ")
    text.rstrip()
    return text


def _metric_lines(metrics: Sequence[LiveMetric], width: int, blocks: str) -> list[Text]:
    from rich.text import Text

    from faccel.report.words import number_text
    from faccel.tracking.progress_text import one_line

    names = list(map(one_line, map(attrgetter("name"), metrics)))
    name_width = max(map(len, names), default=0)
    name_width = min(name_width, max(width // 3, 8))
    lines: list[Text] = []
    # Columns of equal width, or values would jump when they change.
    for name, metric in zip(names, metrics, strict=True):
        value = number_text(metric.last)
        text = Text(name[:name_width].ljust(name_width))
        text.append(f"  {value:>9}  ", style="bold")
        num_cells = min(width - name_width - 13, _MAX_SPARK)
        text.append(sparkline(metric.means, num_cells, blocks), style="cyan")
        text.no_wrap = True
        lines.append(text)
    return lines


def sparkline(values: Sequence[float], num_cells: int, blocks: str = _BLOCKS) -> str:
    """Return values as a line of blocks; a space where a value is not finite.

    Effects: pure.

    Examples:
        >>> sparkline([0.0, 1.0, 2.0, float("nan"), 7.0], 9)
        '▁▂▃ █'
        >>> sparkline([1.0, 1.0, 5.0, 5.0], 2)  # two values each: their means
        '▁█'
        >>> sparkline([1000.0, 100.0, 10.0, 1.0], 4)  # logarithms
        '█▆▃▁'
    """
    # A terminal of a few columns has no room for it.
    if num_cells < 1 or not values:
        return ""
    means: list[float] = []
    size = max(len(values) / num_cells, 1.0)
    for number in range(min(num_cells, len(values))):
        bucket = values[int(number * size) : max(int((number + 1) * size), int(number * size) + 1)]
        finite = list(filter(math.isfinite, bucket))
        mean = math.nan
        if finite:
            mean = sum(value / len(finite) for value in finite)  # a sum of huge values overflows
        means.append(mean)
    finite = list(filter(math.isfinite, means))
    # As the charts of a report: over orders of magnitude a line would be flat.
    if finite and min(finite) > 0 and max(finite) / min(finite) > _LOG_RATIO:
        means = list(map(math.log, means))
        finite = list(filter(math.isfinite, means))
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    text = ""
    for mean in means:
        if math.isnan(mean):
            text += " "
            continue
        level = 0.0
        if high > low:
            level = (mean / 2 - low / 2) / (high / 2 - low / 2)  # halves: 2e308 overflows
        text += blocks[round(level * (len(blocks) - 1))]
    return text


def _rank_lines(rows: Sequence[RankRow], width: int, *, grouped_above: int) -> list[Text]:
    """Return a line per rank; of more ranks than there is room, a line per group that is equal."""
    from rich.text import Text

    from faccel.report.live_ranks import grouped

    if len(rows) > grouped_above:
        rows = grouped(rows)[:grouped_above]
    label_width = max(map(len, map(attrgetter("label"), rows)), default=0)
    lines: list[Text] = []
    for row in rows:
        text = Text(row.label.ljust(label_width + 2), style="bold")
        step = ""
        if row.step is not None:
            step = f"step {row.step:,}"
        text.append(f"{step:<12}", style="not bold")
        text.append(printable(row.activity), style="not bold")
        # One line each, so that rows do not jump when a clause changes.
        text.truncate(width, overflow="ellipsis")
        lines.append(text)
    return lines


def _blocks(console: Console) -> str:
    """Return the characters of a sparkline that the terminal can show."""
    if "utf" in console.encoding.lower():
        return _BLOCKS
    return _ASCII_BLOCKS
