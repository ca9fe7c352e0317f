"""Output on one rank: print, a logger, a progress bar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

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


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger that logs on rank 0 only, or on every rank with `every_rank=True`.

    Each record has the attributes `rank`, `world_size` and `step` (None by default), for a format.
    """

    def __init__(self, logger: logging.Logger, ctx: DistContext) -> None:
        super().__init__(logger, {})
        self.ctx = ctx

    # `Any` as in the method that it overrides
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log as `logging.Logger.log` does; takes `every_rank=` and `step=`, too."""
        every_rank = kwargs.pop("every_rank", False)
        step = kwargs.pop("step", None)
        # Before `msg` is formatted: most records of most ranks are not logged.
        if not self.isEnabledFor(level) or not (self.ctx.is_main or every_rank):
            return
        if every_rank and self.ctx.world_size > 1:
            msg = f"[rank {self.ctx.rank}] {msg}"
        rank_fields = {"rank": self.ctx.rank, "world_size": self.ctx.world_size, "step": step}
        kwargs["extra"] = {**rank_fields, **kwargs.get("extra", {})}
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # the caller's line, not this one
        self.logger.log(level, msg, *args, **kwargs)


@effectful(AMBIENT)
def get_logger(name: str, ctx: DistContext) -> RankLogger:
    """Return a logger of the standard library that logs on rank 0 only.

    Effects: ambient. Calls `logging.getLogger(name)`; changes no level, handler or root logger.

    Args:
        name: Name of the logger, usually `__name__`.
        ctx: The context.

    Examples:
        >>> from faccel.testing import fake_context
        >>> log = get_logger(__name__, fake_context(1, 2))
        >>> log.warning("not logged: this is rank 1", step=3)
    """
    require_context(ctx, "faccel.get_logger(name, ctx)")
    return RankLogger(logging.getLogger(name), ctx)


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
