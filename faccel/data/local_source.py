"""A map-style dataset that the user has split: the dataset of each rank has other samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized

import attrs
import numpy as np

from faccel.checks import integer
from faccel.comm.objects import gather_json
from faccel.comm.row_count import RowCount
from faccel.context import DistContext
from faccel.data.batch import BatchInfo, empty_error
from faccel.data.fetch import Reader, Row
from faccel.data.order import Cursor, Ints, Order
from faccel.data.stream_dataset import iterate_sampler
from faccel.data.stream_sources import rows_of_whole_batch
from faccel.errors import DataError, short_repr
from faccel.mesh import DATA
from faccel.random.hashing import mix
from faccel.tree import Tree

Units = Sequence[Tree] | Ints
"""Indices `int64[n]`, indices of the user's sampler, or index lists of a batch sampler."""


@attrs.frozen
class LocalPlan:
    """How the ranks read an epoch of datasets of different lengths, as arithmetic.

    Step `s` of rank `r` reads the units `s*B ... (s+1)*B - 1` of that rank. A rank that has fewer
    units than another one repeats those from its beginning.

    Args:
        counts: `n_r`, the number of units of each rank.
        batch_size: `B`, units per batch.
        tail: `"pad"`: a rank repeats units until it has as many as the rank that has most in the
            step. `"full"`: until it has `B`. `"drop"`: the epoch ends before the first step in
            which a rank has fewer than `B`. `"uneven"`: no repeats; each rank ends on its own.

    Examples:
        >>> plan = LocalPlan((5, 2), batch_size=2, tail="pad")
        >>> plan.num_steps(1), [plan.num_valid(1, step) for step in range(3)], plan.num_units(2)
        (3, [2, 0, 0], 1)
    """

    counts: tuple[int, ...]
    batch_size: int
    tail: str

    def num_steps(self, rank: int) -> int:
        """Return the number of batches of a rank."""
        if self.tail == "drop":
            return min(self.counts) // self.batch_size
        if self.tail == "uneven":
            return -(-self.counts[rank] // self.batch_size)
        return self.num_global_steps

    @property
    def num_global_steps(self) -> int:
        """Number of steps in which any rank has a batch."""
        if self.tail == "drop":
            return self.num_steps(0)
        return -(-max(self.counts) // self.batch_size)

    def num_valid(self, rank: int, step: int) -> int:
        """Return the number of units of a rank in a step, without repeats."""
        num_left = self.counts[rank] - step * self.batch_size
        return min(max(0, num_left), self.batch_size)

    def largest(self, step: int) -> int:
        """Return the largest `num_valid` of all ranks."""
        return min(max(self.counts) - step * self.batch_size, self.batch_size)

    def num_units(self, step: int) -> int:
        """Return the number of units of each rank in a step, repeats included."""
        if self.tail == "full":
            return self.batch_size
        return self.largest(step)


@attrs.frozen(eq=False)
class LocalSource:
    """The map-style dataset of each rank, in the loader's order.

    Args:
        loader: The dataset, which may grow or shrink between epochs.
        sampler: The user's sampler or batch sampler; None for faccel's own order.
        shuffle: Whether that order is shuffled.
        ctx: The world.
        batch_size: Units per batch; 1 for a batch sampler and for items that are whole batches.
        tail: See `LocalPlan`.
        seed: Seed of the order of each rank.
        reader: Reads rows.
        is_batch_sampler: Whether a unit is a list of indices.
        last_counts: One item: the numbers of units of the ranks, exchanged for each epoch.
    """

    dataset: Sized = attrs.field(repr=False)
    sampler: Iterable[Tree] | None = attrs.field(repr=False)
    shuffle: bool
    ctx: DistContext = attrs.field(repr=False)
    batch_size: int
    tail: str
    seed: int
    reader: Reader = attrs.field(repr=False)
    is_batch_sampler: bool
    _last_counts: list[tuple[int, ...]] = attrs.field(repr=False, alias="last_counts")

    @property
    def name(self) -> str:
        """See `Source`; with the number of ranks, because a cursor counts steps of all of them."""
        return f"local samples of {self.ctx.data_world_size} ranks"

    @property
    def global_batch_size(self) -> int:
        """Units of a full step over all ranks."""
        return self.batch_size * self.ctx.data_world_size

    def num_steps(self, epoch: int, start: int) -> int:
        """See `Source`; of the datasets as they were when lengths were exchanged last."""
        plan = LocalPlan(self._last_counts[-1], self.batch_size, self.tail)
        return max(0, plan.num_steps(self.ctx.data_rank) - start // self.global_batch_size)

    def start_of(self, epoch: int, step: int) -> int:
        """See `Source`; a cursor counts full steps, so that it is the same on every rank."""
        integer("step", step, at_least=0, error=DataError)
        return step * self.global_batch_size

    def read(self, cursor: Cursor) -> Iterator[tuple[BatchInfo, Tree]]:
        """See `Source`; collective: one exchange of the numbers of samples."""
        rank, first_step = self.ctx.data_rank, cursor.samples_consumed // self.global_batch_size
        units = self._units(cursor.epoch)
        counts = exchange_counts(len(units), self.ctx)
        self._last_counts[:] = [counts]
        plan = LocalPlan(counts, self.batch_size, self.tail)
        num_steps, num_global_steps = plan.num_steps(rank), plan.num_global_steps
        self._check(plan)
        rows = self._rows(plan, units, cursor.epoch, first_step)
        batches = self.reader.read(rows, cursor.epoch, cursor.samples_consumed)
        for step, data in enumerate(batches, start=first_step):
            num_valid = RowCount(plan.num_valid(rank, step), plan.largest(step))
            consumed = (step + 1) * self.global_batch_size
            is_end = step + 1 == num_global_steps
            info = BatchInfo(num_valid, step, step + 1 == num_steps, is_end, consumed)
            if self.is_batch_sampler:
                num_rows = len(units.samples(np.array([step]))[0]) if num_valid else 0
                info = attrs.evolve(info, num_valid=RowCount(num_rows))
            if self.reader.is_single:
                info = attrs.evolve(info, num_valid=rows_of_whole_batch(info, data))
            yield info, data

    def _check(self, plan: LocalPlan) -> None:
        # Every rank has the same plan, so all of them raise.
        if plan.num_global_steps == 0:
            raise empty_error(
                f"{list(plan.counts)} samples on the ranks, with `tail={short_repr(self.tail)}`",
                "check the files and filters of the dataset of each rank",
            )
        if min(plan.counts) == 0 and self.tail in ("full", "pad"):
            raise DataError(
                f"rank {plan.counts.index(0)} has no samples to repeat",
                got=f"{list(plan.counts)} samples on the ranks",
                fix='give each rank at least one sample, or write `tail="uneven"`',
            )

    def _units(self, epoch: int) -> _Order:
        """Return this rank's units of an epoch."""
        # With the rank: ranks with equally long datasets must not read them in the same order.
        seed = mix(self.seed, epoch, self.ctx.data_rank)
        if self.sampler is None:
            order = Order(len(self.dataset), seed, epoch, self.shuffle)
            return _Order(order.num_samples, order.samples)
        # A list: the other ranks need the number of units.
        units = list(iterate_sampler(self.sampler, seed, epoch))
        return _Order(len(units), lambda positions: [units[i] for i in positions])

    def _rows(self, plan: LocalPlan, units: _Order, epoch: int, first_step: int) -> Iterator[Row]:
        rank = self.ctx.data_rank
        for step in range(first_step, plan.num_steps(rank)):
            num_valid = plan.num_valid(rank, step)
            num_repeats = 0
            if self.tail != "uneven":
                num_repeats = plan.num_units(step) - num_valid
            first = step * self.batch_size
            valid = first + np.arange(num_valid, dtype=np.int64)
            repeats = np.arange(num_repeats, dtype=np.int64) % max(1, units.count)
            batch = units.samples(np.concatenate([valid, repeats]))
            if self.is_batch_sampler:
                batch = list(batch[0])
            yield (self.seed, epoch, first, rank), batch


def exchange_counts(count: int, ctx: DistContext) -> tuple[int, ...]:
    """Return the number of units of each rank. Collective."""
    return tuple(gather_json(count, ctx, axis=DATA))


@attrs.frozen(eq=False)
class _Order:
    count: int
    samples: Callable[[Ints], Units]

    def __len__(self) -> int:
        return self.count
