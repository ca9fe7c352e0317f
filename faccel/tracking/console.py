"""Output on one rank: print."""

from __future__ import annotations

import sys
from typing import TextIO

from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful
from faccel.tracking.screen import above_bars


@effectful(AMBIENT)
def print(
    *values: object, ctx: DistContext, sep: str = " ", end: str = "\n", file: TextIO | None = None
) -> None:
    """Print on rank 0 only.

    Effects: ambient. One write per call, so that lines of several processes do not mix. Progress
    bars in a terminal stay below.

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
    with above_bars():
        out.write(sep.join(map(str, values)) + end)
        out.flush()  # a pipe is buffered: a killed process would lose its last lines
