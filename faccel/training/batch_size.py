"""The largest batch size that no rank runs out of memory with."""

from __future__ import annotations

import gc
from collections.abc import Callable

from faccel.checks import integer
from faccel.context import DistContext, require_context
from faccel.device_table import empty_cache
from faccel.effects import COLLECTIVE, effectful
from faccel.mesh import WORLD
from faccel.training.failures import (
    RAISE,
    RETRY,
    FailureReport,
    agree_on_failure,
    agreeing,
    check_recovery,
    described,
)
from faccel.training.out_of_memory import is_out_of_memory
from faccel.training.window_attempt import drop_gradients


@effectful(COLLECTIVE)
def find_batch_size(fn: Callable[[int], object], ctx: DistContext, *, start: int) -> int:
    """Return the first of `start`, `start // 2`, ... with which no rank runs out of memory.

    Effects: collective. Calls `fn` on all ranks; where one of them runs out of memory, all ranks
    call it again with half the size. Gradients of the models of `ctx` are dropped then. What else
    `fn` changes, such as parameters and random numbers, stays: build the model and the loader in
    it, or load a checkpoint afterwards.

    Args:
        fn: Trains for some steps with a batch size, in rows per rank. Its result is not used.
        ctx: The context.
        start: The first batch size.

    Raises:
        ConfigError: `start` is not a positive int, or the ranks cannot continue after a failure.
        RuntimeError: A rank runs out of memory with one row; the error of that rank.
        RankFailedError: Another rank has raised.

    Examples:
        >>> import torch
        >>> from faccel.testing import fake_context
        >>> def fn(batch_size):
        ...     if batch_size > 5:
        ...         raise torch.OutOfMemoryError("out of memory")
        >>> find_batch_size(fn, fake_context(0, 1), start=16)
        4
    """
    require_context(ctx, "faccel.find_batch_size(fn, ctx, start=256)")
    integer("start", start, at_least=1)
    check_recovery("`find_batch_size`", ctx)
    size, num_attempts = start, 0
    while not _succeeds(fn, size, num_attempts, ctx):
        size, num_attempts = size // 2, num_attempts + 1
        # The frames of the exception are freed only now, and with them their tensors.
        gc.collect()
        empty_cache(ctx.device)
    return size


def _succeeds(fn: Callable[[int], object], size: int, attempt: int, ctx: DistContext) -> bool:
    """Call `fn`; return whether no rank has run out of memory."""
    try:
        with agreeing(ctx):
            fn(size)
            ctx.comm.barrier(WORLD)  # no rank continues before all have succeeded
        return True
    except Exception as error:
        action = RAISE
        if size > 1 and is_out_of_memory(error):
            action = RETRY
        drop_gradients(ctx.lifetime.models(), ctx)
        report = FailureReport(ctx.rank, attempt, action, described(error))
        if agree_on_failure(error, report, "find_batch_size", ctx).action == RAISE:
            raise
    return False
