"""Raise an exception of one rank on every rank, so that no rank waits for one that has failed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TypeVar
from weakref import WeakSet

import attrs

from faccel.comm.objects import gather_json, gather_objects
from faccel.context import DistContext
from faccel.errors import FaccelError, RankFailedError
from faccel.mesh import WORLD

T = TypeVar("T")


@attrs.frozen
class Failure:
    """Summary of an exception of one rank, for the other ranks; picklable for any exception.

    Args:
        rank: Rank of the world on which it was raised.
        got: Type and message of the exception.
        fix: The fix of a `FaccelError`, or advice for a full disk; empty if there is none.
    """

    rank: int
    got: str
    fix: str = ""

    @classmethod
    def of(cls, error: BaseException, ctx: DistContext) -> Failure:
        """Summarize an exception of this rank."""
        got, fix = _got_and_fix(error)
        return cls(ctx.rank, got, fix)


def _got_and_fix(error: BaseException) -> tuple[str, str]:
    if isinstance(error, FaccelError):
        # Its fix stays a separate attribute: `str(error)` would put it in the middle of `got`.
        return f"{error.problem}. {error.got}".strip(), error.fix
    # A full disk or quota has the same remedy in every call, and no advice in its message.
    fix = ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free disk space"
    return f"{type(error).__name__}: {error}", fix


# Errors that every rank has raised already. An outer `all_or_error` lets them pass, because the
# other ranks are not waiting in its collective: they are raising, too. A strong set would
# keep their tracebacks, and so all local values of the user's functions, alive.
_raised_on_all_ranks: WeakSet[FaccelError] = WeakSet()


def all_or_error(
    fn: Callable[[], T],
    ctx: DistContext,
    doing: str,
    *,
    error: type[FaccelError] = RankFailedError,
    axis: str = WORLD,
) -> list[T]:
    """Run `fn` on every rank, return all results in rank order; if one rank fails, all raise.

    Effects: collective. `fn` may itself call `all_or_error`.

    Args:
        fn: A function without arguments. Its result must be picklable.
        ctx: The world.
        doing: What `fn` does, as the end of the sentence "rank 1 could not ...".
        error: Class of the error that is raised on the other ranks.
        axis: The axis whose ranks exchange their results and failures.

    Raises:
        FaccelError: A rank failed. That rank raises its own error if it is a `FaccelError`, else
            one of class `error` with its own as the cause.

    Examples:
        >>> from faccel.testing import fake_context
        >>> all_or_error(lambda: 3, fake_context(0, 1), "count")
        [3]
        >>> all_or_error([].pop, fake_context(0, 1), "pop")
        Traceback (most recent call last):
        faccel.errors.RankFailedError: this rank could not pop. Got IndexError: pop from empty list.
    """
    own_error: Exception | None = None
    failure: Failure | None = None
    result: T | None = None
    try:
        result = fn()
    except Exception as caught:  # of any kind: the other ranks wait in the gather below
        # The class first: other exceptions, such as dataclasses, may not be hashable.
        if isinstance(caught, FaccelError) and caught in _raised_on_all_ranks:
            raise
        own_error, failure = caught, Failure.of(caught, ctx)
    # One exchange for results and failures: a rank that failed takes part in it like the others.
    outcomes = gather_objects((result, failure), ctx, axis=axis)
    failures = [failure for _, failure in outcomes]
    raise_first(failures, own_error, ctx, doing, error=error)
    # Without a failure each `result` is a `T`. None may be a valid one, so no check for it here.
    return [result for result, _ in outcomes]  # type: ignore[misc]


def raise_on_all_ranks(
    own_error: BaseException | None,
    ctx: DistContext,
    doing: str,
    *,
    error: type[FaccelError] = RankFailedError,
    axis: str = WORLD,
) -> None:
    """Raise on every rank if any rank passes an error.

    Effects: collective.

    Args:
        own_error: The error of this rank, None if it has succeeded.
        ctx: See `all_or_error`.
        doing: See `all_or_error`.
        error: See `all_or_error`.
        axis: See `all_or_error`.
    """
    failure = None
    if own_error is not None:
        failure = Failure.of(own_error, ctx)
    # Also on a rank without an error: the others cannot continue before they have its answer.
    failures = gather_failures(failure, ctx, axis=axis)
    raise_first(failures, own_error, ctx, doing, error=error)


def gather_failures(
    failure: Failure | None, ctx: DistContext, *, axis: str = WORLD
) -> list[Failure | None]:
    """Return the failure of every rank of the axis, None for a rank without one.

    Effects: collective.
    """
    fields = None
    if failure is not None:
        fields = attrs.asdict(failure)
    all_fields = gather_json(fields, ctx, axis=axis)
    return [Failure(**values) if values else None for values in all_fields]


def raise_first(
    failures: Iterable[Failure | None],
    own_error: BaseException | None,
    ctx: DistContext,
    doing: str,
    *,
    error: type[FaccelError] = RankFailedError,
) -> None:
    """Raise the first of the failures that all ranks have exchanged; return if there is none.

    Effects: pure. Every rank must call it, with the same failures.

    Args:
        failures: One per rank, None for a rank that has succeeded.
        own_error: The error of this rank, if it has one.
        ctx: See `all_or_error`.
        doing: See `all_or_error`.
        error: See `all_or_error`.
    """
    # The lowest failed rank, the same on every rank: all ranks report one cause.
    actual_failures = [failure for failure in failures if failure is not None]
    if not actual_failures:
        return
    first = actual_failures[0]
    if own_error is not None and (ctx.world_size == 1 or isinstance(own_error, FaccelError)):
        # A `FaccelError` keeps its class on the rank that raised it, for `except DataError`. A
        # single rank needs no number in the message.
        raised = as_faccel_error(own_error, doing, error)
    else:
        raised = error(f"rank {first.rank} could not {doing}", got=first.got, fix=first.fix)
        # This rank may have failed, too, in another way: its traceback shows that.
        raised.__cause__ = own_error
    _raised_on_all_ranks.add(raised)
    raise raised


def as_faccel_error(own_error: BaseException, doing: str, error: type[FaccelError]) -> FaccelError:
    """Return a `FaccelError` unchanged, and any other exception as the cause of an `error`.

    Effects: pure.
    """
    if isinstance(own_error, FaccelError):
        return own_error
    got, fix = _got_and_fix(own_error)
    wrapped = error(f"this rank could not {doing}", got=got, fix=fix)
    wrapped.__cause__ = own_error
    return wrapped
