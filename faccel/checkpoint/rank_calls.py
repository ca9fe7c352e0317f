"""Calls whose error on one rank is a `CheckpointError` on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from faccel.comm.all_or_error import all_or_error
from faccel.context import DistContext
from faccel.errors import CheckpointError

T = TypeVar("T")


def on_all_ranks(fn: Callable[[], T], ctx: DistContext, doing: str) -> list[T]:
    """Run `fn` on every rank; return all results in rank order.

    Effects: collective.

    Args:
        fn: What to run. Its result must be picklable.
        ctx: The world.
        doing: What `fn` does, as the end of the sentence "rank 1 could not ...".
    """
    return all_or_error(fn, ctx, doing, error=CheckpointError)


def on_rank_0(fn: Callable[[], T], ctx: DistContext, doing: str) -> T:
    """Run `fn` on rank 0; return its result on every rank.

    Effects: collective.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: on_rank_0(lambda: f"from rank {ctx.rank}", ctx, "count"), 2)
        ('from rank 0', 'from rank 0')
    """

    # The other ranks join the exchange of errors: without it they would continue after a failure.
    def run() -> T | None:
        if ctx.is_main:
            return fn()
        return None

    result = on_all_ranks(run, ctx, doing)[0]
    return result  # type: ignore[return-value]  (rank 0 ran it)
