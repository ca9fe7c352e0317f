"""A `RuntimeError` that ended a collective becomes an error that names the rank which caused it."""

from __future__ import annotations

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
