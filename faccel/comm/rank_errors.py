"""A `RuntimeError` that ended a collective becomes an error that names the rank which caused it."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch.distributed as dist

from faccel.errors import DesyncError, RankFailedError, causes

if TYPE_CHECKING:
    from faccel.protocols import Collectives


def raise_naming_rank(error: RuntimeError, doing: str, axis: str, comm: Collectives) -> NoReturn:
    """Raise `error` again, as an error that names the failed rank if communication ended in it.

    Effects: ambient. Reads the status of the other ranks from the store of the world.

    Hot paths call this in their `except RuntimeError`, which costs nothing unless there is an
    error; everything else uses `naming_failed_rank`.

    Args:
        error: The exception that is being handled.
        doing: What this rank was doing, such as `"backward"`.
        axis: The axis over which it communicated.
        comm: The collectives of the world.

    Raises:
        RankFailedError: Another rank left, failed, or called something else.
        RuntimeError: Any other `error`, unchanged.
    """
    # May wait for seconds: the status of a rank that is just failing takes time to arrive.
    failure = comm.as_rank_error(error, doing, axis)
    if failure is None:
        raise error
    # The message of gloo, such as "Connection closed by peer", stays visible as the cause.
    raise failure from error


def is_consequence(error: BaseException) -> bool:
    """Return whether an exception, or one that it was raised from, is another rank's failure.

    Effects: pure.
    """
    for link in causes(error):
        if isinstance(link, (RankFailedError, DesyncError, dist.DistError)):
            return True
        # gloo raises a plain RuntimeError; only the path of its source file identifies it.
        if isinstance(link, RuntimeError) and "gloo/" in str(link):
            return True
    return False


@contextmanager
def naming_failed_rank(doing: str, axis: str, comm: Collectives) -> Generator[None]:
    """Run the body; see `raise_naming_rank` for what happens to its `RuntimeError`.

    Effects: ambient.
    """
    try:
        yield
    # Errors of c10d are RuntimeErrors, and so are all others of torch: `as_rank_error` separates
    # them.
    except RuntimeError as error:
        raise_naming_rank(error, doing, axis, comm)


def failed_rank_error(error: RuntimeError, doing: str, statuses: str) -> RankFailedError:
    """Return the error of a rank whose collective has ended with `error`.

    Effects: pure.

    Args:
        error: The error of c10d.
        doing: What this rank was doing.
        statuses: Those of all ranks of the axis, as text.
    """
    return RankFailedError(
        f"rank {dist.get_rank()} could not finish {doing}: another rank left, failed or made "
        "another call",
        got=f"{statuses}; {_first_sentence(error)}",
        fix="fix the error of the other ranks; `FACCEL_DEBUG=1` compares calls, shapes and "
        "lines before each collective",
    )


def _first_sentence(error: RuntimeError) -> str:
    """Return the message of an error of c10d, without its source location and advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^\]]*\] ", "", line).partition(". This is typically")[0]
