"""A `RuntimeError` that ended a collective becomes an error that names the rank which caused it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from faccel.protocols import Collectives


def raise_naming_rank(error: RuntimeError, doing: str, axis: str, comm: Collectives) -> NoReturn:
    """Raise `error` again, as an error that names the failed rank if communication ended in it.

    Effects: ambient. Asks the other ranks through the store of the world.

    Hot paths call this in their `except RuntimeError`, which costs nothing unless there is an
    error; everything else uses `naming_failed_rank`.

    Args:
        error: The exception that is being handled.
        doing: What this rank was doing, such as `"backward"`.
        axis: Over which ranks.
        comm: The collectives of the world.

    Raises:
        RankFailedError: Another rank left, failed, or called something else.
        RuntimeError: Any other `error`, unchanged.
    """
    failure = comm.as_rank_error(error, doing, axis)
    if failure is None:
        raise error
    raise failure from error


@contextmanager
def naming_failed_rank(doing: str, axis: str, comm: Collectives) -> Generator[None]:
    """Run the body; see `raise_naming_rank` for what happens to its `RuntimeError`.

    Effects: ambient.
    """
    try:
        yield
    except RuntimeError as error:
        raise_naming_rank(error, doing, axis, comm)
