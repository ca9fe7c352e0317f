"""Output on one rank: print, a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful

T = TypeVar("T")


@effectful(AMBIENT)
def print(
    *values: object, ctx: DistContext, sep: str = " ", end: str = "\n", file: TextIO | None = None
) -> None:
    """Print on rank 0 only.

    Effects: ambient. One write per call, so that lines of several processes do not mix.

    Args:
        *values: As for the builtin `print`.
        ctx: The context.
        sep: Text between the values.
        end: Text after the values.
        file: Where to print; None is standard output.

    Examples:
        >>> from faccel.testing import simulate
        >>> _ = simulate(lambda ctx: print("rank", ctx.rank, ctx=ctx), 3)
        rank 0
    """
    require_context(ctx, "faccel.print(value, ctx=ctx)")
    if not ctx.is_main:
        return
    out = file
    if out is None:  # not a default argument: tests and notebooks replace it
        out = sys.stdout
    out.write(sep.join(map(str, values)) + end)
    out.flush()  # a pipe is buffered: a killed process would lose its last lines


@effectful(AMBIENT)
def progress(
    items: Iterable[T],
    ctx: DistContext,
    *,
    total: int | None = None,
    description: str = "",
    file: TextIO | None = None,
) -> Iterator[T]:
    """Yield the items, and print the progress on rank 0: a bar in a terminal, otherwise lines.

    Effects: ambient.

    Args:
        items: Any iterable.
        ctx: The context.
        total: Number of items; None takes `len(items)`, if it has a length.
        description: Label of the bar or the lines.
        file: Where to print; None is standard error.

    Examples:
        >>> from faccel.testing import fake_context
        >>> list(progress([1, 2], fake_context(1, 2)))
        [1, 2]
    """
    require_context(ctx, "faccel.progress(items, ctx)")
    # The items are not touched: each rank iterates over them at its own speed.
    if not ctx.is_main:
        return iter(items)
    out = file
    if out is None:
        out = sys.stderr
    if total is None and isinstance(items, Sized):
        total = len(items)
    # A bar redraws its line with control characters, which would fill a log file.
    if out.isatty():
        return _bar(items, total, description, out)
    return _lines(items, total, description, out)


def _bar(items: Iterable[T], total: int | None, description: str, file: TextIO) -> Iterator[T]:
    # Imported here, because only rank 0 in a terminal draws a bar.
    from rich.console import Console
    from rich.progress import track

    console = Console(file=file)
    return iter(track(items, description=description or "working", total=total, console=console))


def _lines(items: Iterable[T], total: int | None, description: str, file: TextIO) -> Iterator[T]:
    """Print a line after each tenth of a known total, else after 1, 2, 4, 8, ... items."""
    start_s = time.monotonic()
    prefix = ""
    if description:
        prefix = f"{description}: "
    suffix = ""
    if total:
        suffix = f"/{total}"
    tenths_printed = 0
    next_count = 1
    for count, item in enumerate(items, 1):
        yield item  # first, so that an item counts after the caller has processed it
        if total:
            tenths = 10 * count // total
            is_due = tenths > tenths_printed
            tenths_printed = tenths
        else:
            is_due = count == next_count  # log2(n) lines for a stream of n items
        if is_due:
            next_count *= 2
            file.write(f"{prefix}{count}{suffix} in {time.monotonic() - start_s:.1f} s\n")
            file.flush()
