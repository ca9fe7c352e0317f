"""Which failures in a window are not raised: those after which it runs again or is left out."""

from __future__ import annotations

from typing import Any

import attrs

from faccel.checks import shown
from faccel.errors import ConfigError, causes
from faccel.training.out_of_memory import is_out_of_memory
from faccel.validators import int_at_least


def _check_types(instance: Retry, attribute: attrs.Attribute[Any], value: Any) -> None:
    check_exception_types(attribute.name, value)


def check_exception_types(name: str, value: object) -> None:
    """Raise unless `value` is a tuple of classes of exceptions.

    Raises:
        ConfigError: It is not.
    """
    classes = value if isinstance(value, tuple) else (None,)
    if all(isinstance(item, type) and issubclass(item, Exception) for item in classes):
        return
    raise ConfigError(
        f"`{name}` must be a tuple of classes of exceptions",
        got=shown(value),
        fix=f"write `{name}=(faccel.errors.DataError,)`",
    )


@attrs.frozen
class Retry:
    """Runs a window again with smaller micro-batches, after a rank ran out of memory.

    Args:
        split: By how much micro-batches get smaller: 2 is half the rows.
        at_least: The fewest rows of a micro-batch. A failure with fewer rows is raised.
        on: Classes of other exceptions after which a window runs again.

    Examples:
        >>> Retry()
        Retry(split=2, at_least=1, on=())
    """

    split: int = attrs.field(default=2, validator=int_at_least(2))
    at_least: int = attrs.field(default=1, validator=int_at_least(1))
    on: tuple[type[Exception], ...] = attrs.field(default=(), validator=_check_types)

    def handles(self, error: BaseException) -> bool:
        """Return whether a window runs again after `error`."""
        return is_caused_by(error, self.on) or is_out_of_memory(error)


@attrs.frozen
class FailurePolicy:
    """What to do after a failure; the same on all ranks.

    Args:
        retry: When a window runs again; None is never.
        skip: Classes of exceptions after which a window is left out.
    """

    retry: Retry | None = None
    skip: tuple[type[Exception], ...] = ()

    @property
    def is_given(self) -> bool:
        """Whether some failures are not raised."""
        return self.retry is not None or bool(self.skip)

    def retries(self, error: BaseException) -> bool:
        """Return whether a window runs again after `error`, if its micro-batches get smaller."""
        return self.retry is not None and self.retry.handles(error)

    def rows_after(self, error: BaseException, num_rows: int) -> int:
        """Return the rows of a micro-batch in the next attempt; 0 if there is none.

        Args:
            error: The failure.
            num_rows: The most rows of a micro-batch in the attempt that failed.
        """
        if self.retry is None or not self.retries(error):
            return 0
        max_rows = num_rows // self.retry.split
        if max_rows < self.retry.at_least:
            return 0
        return max_rows


def is_caused_by(error: BaseException, classes: tuple[type[Exception], ...]) -> bool:
    """Return whether an exception, or one that it was raised from, is of one of the classes.

    Effects: pure.
    """
    return any(isinstance(link, classes) for link in causes(error))
