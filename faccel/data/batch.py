"""A batch with its number of valid rows, its step and the cursor after it; the source protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import attrs

from faccel.data.order import Cursor
from faccel.errors import DataError
from faccel.tree import Tree


@attrs.frozen(eq=False)
class Batch:
    """One rank's batch of one step.

    Args:
        data: The result of the loader's `collate_fn`, on the device of the context.
        num_valid: Number of rows that are not repeats, `0 <= num_valid <= rows`: the first ones.
        step: Index of the batch in its epoch.
        is_last: Whether it is this rank's last batch of the epoch.
        cursor: The position after it: save it to resume with the next batch.
    """

    data: Tree
    num_valid: int
    step: int
    is_last: bool
    cursor: Cursor


@attrs.frozen(eq=False)
class BatchInfo:
    """What a source reports with the data of a batch.

    Args:
        num_valid: See `Batch`.
        step: See `Batch`.
        is_last: See `Batch`.
        is_end: Whether the epoch ends on every rank with this step.
        consumed: Samples of the epoch that all ranks together have consumed after this step
            (batches, if the loader yields whole ones).
        state: The dataset's own state at that position, if it has one.
    """

    num_valid: int
    step: int
    is_last: bool
    is_end: bool
    consumed: int
    state: object = None

    def cursor(self, epoch: int, name: str) -> Cursor:
        """Return the position after the batch: in this epoch, or at the start of the next one."""
        # `is_end`, not `is_last`: with an uneven tail a rank may end before the epoch does, and
        # the cursor must be the same on every rank. The state belongs to the epoch that has ended.
        if self.is_end:
            return Cursor(epoch + 1, of=name)
        return Cursor(epoch, self.consumed, self.state, name)


def step_error(step: int, num_steps: int, num_units: int, size: int) -> DataError:
    """Return the error for a step that is not in an epoch of `num_units`, `size` per step."""
    return DataError(
        f"`step` must be between 0 and {num_steps}: an epoch of {num_units} samples has"
        f" {num_steps} steps of {size}",
        got=f"step={step}",
        fix="pass a step of this epoch, or write `loader.resume(batch.cursor)`",
    )


def start_of_step(step: int, num_units: int, size: int) -> int:
    """Return how many of `num_units` are consumed before a step, `size` per step.

    Effects: pure.

    Raises:
        DataError: The epoch has no such step; that after the last one is its end.
    """
    # Rounded up for every tail: a step counter may be that of the end of the epoch, where `min`
    # cuts the last step to what exists.
    num_steps = -(-num_units // size)
    if not 0 <= step <= num_steps:
        raise step_error(step, num_steps, num_units, size)
    return min(step * size, num_units)


def empty_error(name: str, fix: str) -> DataError:
    """Return the error for an epoch without any step, in which a loop would do nothing."""
    return DataError(
        "`loader` has no batch in a whole epoch, so the loop over it would do nothing",
        got=name,
        fix=fix,
    )


class Source(Protocol):
    """Finds and reads one rank's batches of an epoch, for `ShardedLoader`."""

    @property
    def name(self) -> str:
        """Name of the order. Cursors store it; `resume` raises for a cursor of another order."""
        ...

    @property
    def tail(self) -> str:
        """The argument `tail` of `shard`."""
        ...

    def num_steps(self, epoch: int, start: int) -> int:
        """Return the number of this rank's batches from `start` on; TypeError if it is unknown."""
        ...

    def start_of(self, epoch: int, step: int) -> int:
        """Return how much of an epoch all ranks have consumed before step `step`."""
        ...

    def read(self, cursor: Cursor) -> Iterator[tuple[BatchInfo, Tree]]:
        """Yield each batch of this rank from `cursor` on, collated, on the CPU."""
        ...
