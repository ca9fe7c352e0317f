"""Saying things once."""

from __future__ import annotations

import sys
from typing import TextIO

from faccel.context import DistContext
from faccel.effects import AMBIENT, effectful


@effectful(AMBIENT)
def print(*values: object, ctx: DistContext, sep: str = " ", end: str = "\n", file: TextIO | None = None) -> None:
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
