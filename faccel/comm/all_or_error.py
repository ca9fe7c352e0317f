"""Doing something on every rank of which all must know whether it went well."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

from faccel.comm.objects import gather_objects
from faccel.context import DistContext
from faccel.errors import CheckpointError, FaccelError
from faccel.protocols import WORLD

T = TypeVar("T")


def all_or_error(fn: Callable[[], T], ctx: DistContext, what: str) -> list[T]:
    """Run `fn` on every rank and return all results in order; where one fails, every rank raises.

    Effects: collective. `fn` may call `together` itself: an error on a rank that has not come so far ends that call
    on the others, and this one on all.

    Raises:
        CheckpointError: Rank r could not do `what`; the rank itself has its own error as the cause.
    """
    own: Exception | None = None
    result: T | None = None
    try:
        result = fn()
    except (
        Exception
    ) as error:  # whatever it is, the others must hear of it, unless they have in a call inside
        if getattr(error, _KNOWN, False):
            raise
        own = error
    told = (own is None, result if own is None else _tell(own))
    outcomes = gather_objects(told, ctx, axis=WORLD)
    _raise_first(own, outcomes, ctx, what)
    return [result for _, result in outcomes]  # type: ignore[misc]


def failures(own: BaseException | None, ctx: DistContext, what: str) -> None:
    """Raise on every rank where a rank has an error of its own.

    Effects: collective.
    """
    _raise_first(
        own,
        gather_objects((own is None, None if own is None else _tell(own)), ctx, axis=WORLD),
        ctx,
        what,
    )


def _raise_first(
    own: BaseException | None, outcomes: list[tuple[bool, Any]], ctx: DistContext, what: str
) -> None:
    failed = [(rank, told) for rank, (fine, told) in enumerate(outcomes) if not fine]
    if not failed:
        return
    if isinstance(own, FaccelError):
        raise _known(own)
    if own is not None and ctx.world_size == 1:
        raise _known(as_checkpoint_error(own, what))
    rank, (got, fix) = failed[0]
    raise _known(CheckpointError(f"rank {rank} could not {what}", got=got, fix=fix)) from own


def _known(error: FaccelError) -> FaccelError:
    """Mark an error that every rank raises."""
    setattr(error, _KNOWN, True)
    return error


_KNOWN = "_faccel_is_known_to_all"


def as_checkpoint_error(error: BaseException, what: str) -> FaccelError:
    """Return an error of this rank as one of faccel, with the error itself as its cause."""
    if isinstance(error, FaccelError):
        return error
    got, fix = _tell(error)
    wrapped = CheckpointError(f"this rank could not {what}", got=got, fix=fix)
    wrapped.__cause__ = error
    return wrapped


def _tell(error: BaseException) -> tuple[str, str]:
    if isinstance(error, FaccelError):
        return f"{error.problem}. {error.got}".strip(), error.fix
    fix = "make room" if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{type(error).__name__}: {error}", fix
