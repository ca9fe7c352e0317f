"""Splitting a stream over ranks, for data whose order is the user's own and has to be iterated.

A stream is any iterable that yields the same units on every rank: the indices of a sampler, the
index lists of a batch sampler, the samples of an `IterableDataset`, or whole batches. A global
batch is `batch_size` units for each of `W` ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import attrs

from faccel.comm.row_count import RowCount
from faccel.data.batch import BatchInfo
from faccel.data.order import ShardPlan, divide_rows
from faccel.errors import DataError
from faccel.tree import Tree


def _one(unit: Tree) -> int:
    return 1


@attrs.frozen
class StreamPlan:
    """How the units of a stream are split over ranks.

    Args:
        batch_size: Units per rank and step.
        world_size: `W`, the number of ranks that read different data.
        tail: As in `shard`; padding repeats the first units of the stream.
        count: How much a unit counts in a cursor: 1, or the samples of an index list.
    """

    batch_size: int
    world_size: int
    tail: str
    count: Callable[[Tree], int] = _one

    @property
    def global_batch_size(self) -> int:
        """Units per step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def max_repeats(self) -> int:
        """The most units that the last step repeats."""
        if self.tail == "full":
            return self.global_batch_size
        return self.world_size

    def num_steps(self, num_units: int, rank: int) -> int:
        """Return the number of batches of a rank in a stream of `num_units`."""
        # The arithmetic of an order of as many samples.
        plan = ShardPlan(num_units, self.batch_size, rank, self.world_size, self.tail)
        return plan.num_steps(0)


def repeated(first: list[Tree], offset: int, num_repeats: int) -> list[Tree]:
    """Return `num_repeats` units of `first` from `offset` on, cyclically.

    Effects: pure.

    Examples:
        >>> repeated([0, 1, 2], 2, 3)
        [2, 0, 1]
    """
    # Cyclically, because the stream may have fewer units than are missing.
    return [first[i % len(first)] for i in range(offset, offset + num_repeats)]


@attrs.frozen(eq=False)
class RankBatch:
    """One rank's units of a global batch.

    Args:
        units: With the repeats of the last step.
        info: Its numbers.
        first: The first unit of the stream, with step 0 of a stream that every rank reads.
    """

    units: list[Tree]
    info: BatchInfo
    first: Tree = None


@attrs.frozen(eq=False)
class GlobalBatch:
    """The units of one step for all ranks.

    Args:
        plan: How they are split.
        units: `global_batch_size` units, or those that are left at the end of the stream.
        first: The first units of the stream, for padding.
        num_ahead: Number of units of the next step.
        consumed: See `BatchInfo`.
        state: See `BatchInfo`.
        step: See `BatchInfo`.
    """

    plan: StreamPlan
    units: list[Tree]
    first: list[Tree]
    num_ahead: int
    consumed: int
    state: object
    step: int

    def rank_batch(self, rank: int) -> RankBatch | None:
        """Return the units of a rank; None if an uneven tail leaves it without any."""
        size, world_size, tail = self.plan.batch_size, self.plan.world_size, self.plan.tail
        # The same rows as in `ShardPlan`.
        rows = divide_rows(len(self.units), size, rank, world_size, tail)
        units = self.units[rows.begin : rows.begin + rows.num_valid]
        units += repeated(self.first, rows.repeat, rows.num_repeats)
        if not units:
            return None
        is_end = self.num_ahead == 0
        if tail == "drop":
            is_end = self.num_ahead < self.plan.global_batch_size
        is_last = is_end
        if tail == "uneven":
            # The next step has units for the first `num_ahead` ranks, or for all of them.
            is_last = self.num_ahead <= rank
        num_valid = rows.num_valid
        if len(self.units) < self.plan.global_batch_size:
            first_rank = divide_rows(len(self.units), size, 0, world_size, tail)
            num_valid = RowCount(num_valid, first_rank.num_valid)
        info = BatchInfo(num_valid, self.step, is_last, is_end, self.consumed, self.state)
        return RankBatch(units, info)


def _no_state() -> None:
    return None


def global_batches(
    stream: Iterable[Tree],
    plan: StreamPlan,
    *,
    start: int = 0,
    skipped: int = 0,
    get_state: Callable[[], object] = _no_state,
) -> Iterator[GlobalBatch]:
    """Yield the global batches of a stream.

    Effects: pure, as far as the stream is. Reads one step ahead, to find out which is the last.

    Args:
        stream: The same units on every rank.
        plan: How they are split.
        start: Number of samples consumed before; their units are read and skipped.
        skipped: Number of samples that the stream itself has skipped; they count in `consumed`.
        get_state: Called after each step is read, before the next one.

    Raises:
        DataError: `start` is inside a unit or after the end of the stream.

    Examples:
        >>> plan = StreamPlan(batch_size=2, world_size=2, tail="pad")
        >>> batches = [batch.rank_batch(1) for batch in global_batches(range(7), plan)]
        >>> [(batch.units, batch.info.num_valid) for batch in batches]
        [([2, 3], 2), ([6, 0], 1)]
    """
    size = plan.global_batch_size
    units = iter(stream)
    first, consumed, num_units = _skip(units, plan, start)
    consumed += skipped
    step = (num_units + skipped) // size
    current = list(islice(units, size))
    # Read between `current` and `ahead`: a resume from this state begins with `ahead`.
    state = get_state()
    while current and not (plan.tail == "drop" and len(current) < size):
        # Complete after the first full step; kept for the padding of the last one.
        first += current[: plan.max_repeats - len(first)]
        ahead = list(islice(units, size))
        state_ahead = get_state()
        consumed += sum(map(plan.count, current))
        yield GlobalBatch(plan, current, first, len(ahead), consumed, state, step)
        current, state = ahead, state_ahead
        step += 1


def divided_batches(
    batches: Iterable[Sequence[Tree]], plan: StreamPlan, *, start: int = 0
) -> Iterator[GlobalBatch]:
    """Yield the batches of a batch sampler as global batches, whose rows are divided evenly.

    Effects: pure, as far as `batches` is. Reads one batch ahead.

    Args:
        batches: The same lists of indices on every rank.
        plan: Its tail applies to each list: `"pad"` repeats fewer than `W` indices, `"full"` as
            many as make a list as long as the first one, rounded up to a multiple of `W`; `"drop"`
            leaves out each list whose length is no multiple of `W`.
        start: Number of indices consumed before; their lists are skipped.

    Raises:
        DataError: `start` is inside a list or after the last one.

    Examples:
        >>> plan = StreamPlan(batch_size=1, world_size=2, tail="pad")
        >>> steps = divided_batches([[0, 1, 2, 3], [4, 5, 6]], plan)
        >>> parts = [step.rank_batch(1) for step in steps]
        >>> [(part.units, part.info.num_valid) for part in parts]
        [([2, 3], 2), ([6, 0], 1)]
    """
    world_size, tail = plan.world_size, plan.tail
    if tail == "drop":
        batches = (batch for batch in batches if len(batch) % world_size == 0)
        tail = "pad"  # each remaining list divides evenly, so nothing is repeated
    first: list[Tree] = []
    consumed = step = num_rows = 0
    iterator = iter(batches)
    current = next(iterator, None)
    while current is not None:
        ahead = next(iterator, None)
        # Rows per rank of the first list: those that "full" gives to each list.
        num_rows = num_rows or -(-len(current) // world_size)
        own_plan = StreamPlan(max(num_rows, -(-len(current) // world_size)), world_size, tail)
        first += current[: max(0, own_plan.max_repeats - len(first))]
        after = consumed + len(current)
        if consumed >= start:
            num_ahead = len(ahead or ())
            yield GlobalBatch(own_plan, list(current), first, num_ahead, after, None, step)
        elif after > start:
            raise _start_error(start, after)
        current, consumed = ahead, after
        step += 1
    if consumed < start:
        raise _start_error(start, consumed)


def _skip(units: Iterator[Tree], plan: StreamPlan, start: int) -> tuple[list[Tree], int, int]:
    """Read `start` samples; return the first units of the stream, the samples and units read."""
    first: list[Tree] = []
    consumed = num_units = 0
    while consumed < start:
        try:
            unit = next(units)
        except StopIteration:
            break
        # Padding after a resume repeats the start of the stream, not what follows the cursor.
        if len(first) < plan.max_repeats:
            first.append(unit)
        consumed += plan.count(unit)
        num_units += 1
    # More than `start`: the cursor is inside a unit. Less: the stream has ended before it.
    if consumed != start:
        raise _start_error(start, consumed)
    return first, consumed, num_units


def _start_error(start: int, nearest: int) -> DataError:
    return DataError(
        "the cursor does not lie between two batches of this loader",
        got=f"samples_consumed={start}; the nearest position is {nearest}",
        fix="resume with the loader that the cursor was taken from",
    )
