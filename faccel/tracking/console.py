"""Saying things once: print, a logger, a progress bar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from faccel.context import DistContext
from faccel.effects import AMBIENT, effectful

T = TypeVar("T")


@effectful(AMBIENT)
def print(
    *values: object, ctx: DistContext, sep: str = " ", end: str = "\n", file: TextIO | None = None
) -> None:
    """Print on rank 0 of the world, nowhere else.

    Effects: ambient. The line goes out in one write, so that lines of several processes never mix.

    Args:
        *values: What the builtin `print` takes, as do `sep`, `end` and `file` (default: standard output).
        ctx: The world.
        sep: Between the values.
        end: After them.
        file: Where to.

    Examples:
        >>> from faccel.testing import simulate
        >>> _ = simulate(lambda ctx: print("rank", ctx.rank, ctx=ctx), 3)
        rank 0
    """
    if ctx.is_main:
        out = sys.stdout if file is None else file
        out.write(sep.join(map(str, values)) + end)
        out.flush()


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger that speaks on rank 0, and everywhere with `every_rank=True`.

    Each record has `rank`, `world_size` and `step` (None where none was given), for your own format.
    """

    def __init__(self, logger: logging.Logger, ctx: DistContext) -> None:
        super().__init__(logger, {})
        self.ctx = ctx

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log like `logging.Logger.log`; also takes `every_rank=` and `step=`."""
        every_rank, step = kwargs.pop("every_rank", False), kwargs.pop("step", None)
        if (self.ctx.is_main or every_rank) and self.isEnabledFor(level):
            text = (
                f"[rank {self.ctx.rank}] {msg}" if every_rank and self.ctx.world_size > 1 else msg
            )
            extra = {"rank": self.ctx.rank, "world_size": self.ctx.world_size, "step": step}
            kwargs["extra"] = {**extra, **kwargs.get("extra", {})}
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            self.logger.log(level, text, *args, **kwargs)


@effectful(AMBIENT)
def get_logger(name: str, ctx: DistContext) -> RankLogger:
    """Return a logger of the standard library that speaks on rank 0 only.

    Effects: ambient. `logging.getLogger(name)`; neither its level nor its handlers nor the root logger are touched.

    Args:
        name: Usually `__name__`.
        ctx: The world.

    Examples:
        >>> from faccel.testing import fake_context
        >>> log = get_logger(__name__, fake_context(1, 2))
        >>> log.warning("not said on rank 1", step=3)
    """
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
    """Yield the items, and show on rank 0 how far it has come: a bar in a terminal, plain lines elsewhere.

    Effects: ambient.

    Args:
        items: Any iterable.
        ctx: The world.
        total: How many there are; None takes `len(items)` where there is one.
        description: What is going on.
        file: Where to; default: standard error.

    Examples:
        >>> from faccel.testing import fake_context
        >>> list(progress([1, 2], fake_context(1, 2)))
        [1, 2]
    """
    if not ctx.is_main:
        return iter(items)
    out = sys.stderr if file is None else file
    number = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    return (
        _bar(items, number, description, out)
        if out.isatty()
        else _lines(items, number, description, out)
    )


def _bar(items: Iterable[T], total: int | None, description: str, out: TextIO) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track

    return iter(
        track(items, description=description or "working", total=total, console=Console(file=out))
    )


def _lines(items: Iterable[T], total: int | None, description: str, out: TextIO) -> Iterator[T]:
    """Say a line at every tenth of a known total, else at 1, 2, 4, 8, ..."""
    start, said, due = time.monotonic(), 0, 1
    for count, item in enumerate(items, 1):
        yield item
        tenths = 10 * count // total if total else 0
        if tenths > said or (not total and count == due):
            said, due = tenths, due * 2
            of = f"/{total}" if total else ""
            out.write(
                f"{description + ': ' if description else ''}{count}{of} in {time.monotonic() - start:.1f} s\n"
            )
            out.flush()
