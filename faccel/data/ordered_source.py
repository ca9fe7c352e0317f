"""A map-style dataset in the order that faccel computes."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import attrs

from faccel.data.batch import BatchInfo, empty_error, start_of_step
from faccel.data.fetch import Reader, Row
from faccel.data.order import Cursor, Order, ShardPlan
from faccel.errors import DataError
from faccel.tree import Tree


@attrs.frozen(eq=False)
class OrderedSource:
    """A map-style dataset in faccel's own order: any position is reached in constant time.

    Args:
        dataset: The user's dataset. Its length is read again for each epoch: it may grow or shrink.
        batch_size: `B`.
        rank: `r`.
        world_size: `W`.
        tail: As in `ShardPlan`.
        seed: Seed of the order.
        shuffle: Whether it is shuffled.
        reader: Reads rows.
    """

    dataset: Sized = attrs.field(repr=False)
    batch_size: int
    rank: int
    world_size: int
    tail: str
    seed: int
    shuffle: bool
    reader: Reader = attrs.field(repr=False)

    @property
    def name(self) -> str:
        """See `Source`."""
        order = f"a shuffle of seed {self.seed}" if self.shuffle else "order"
        return f"{len(self.dataset)} samples in {order}"

    @property
    def plan(self) -> ShardPlan:
        """How this rank reads an epoch of the dataset as it is now."""
        num_samples = len(self.dataset)
        return ShardPlan(num_samples, self.batch_size, self.rank, self.world_size, self.tail)

    def num_steps(self, epoch: int, start: int) -> int:
        """See `Source`."""
        return self.plan.num_steps(start)

    def start_of(self, epoch: int, step: int) -> int:
        """See `Source`; that of the step after the last one is the end of the epoch."""
        return start_of_step(step, len(self.dataset), self.batch_size * self.world_size)

    def order(self, epoch: int) -> Order:
        """Return the global order of an epoch."""
        return Order(len(self.dataset), self.seed, epoch, self.shuffle)

    def read(self, cursor: Cursor) -> Iterator[tuple[BatchInfo, Tree]]:
        """See `Source`."""
        plan, start = self.plan, cursor.samples_consumed
        # Equal is valid: the end of the epoch, without any batch.
        if start > plan.num_samples:
            raise DataError(
                f"the cursor lies after the end of a dataset of {plan.num_samples} samples",
                got=str(cursor),
                fix="resume with the dataset that the cursor was taken from",
            )
        if start == 0 and plan.is_end(0):
            raise empty_error(
                f"{plan.num_samples} samples and a global batch of {plan.global_batch_size}, with "
                f'`tail="{self.tail}"`',
                "check the files and filters of the dataset; one that is smaller than a global "
                'batch needs `drop_last=False` and `tail="pad"`',
            )
        # Rounded down: after a resume with another world size `start` may be no multiple of `G`.
        first_step = start // plan.global_batch_size
        last = plan.num_steps(start) - 1
        rows = self._rows(plan, cursor)
        for i, data in enumerate(self.reader.read(rows, cursor.epoch, start)):
            consumed = plan.consumed(start, i)
            num_valid = plan.row_count(start, i)
            is_end = plan.is_end(consumed)
            yield BatchInfo(num_valid, first_step + i, i == last, is_end, consumed), data

    def _rows(self, plan: ShardPlan, cursor: Cursor) -> Iterator[Row]:
        seed, epoch, start = self.seed, cursor.epoch, cursor.samples_consumed
        # Of the plan's length: the dataset may grow while the epoch is read.
        order = Order(plan.num_samples, seed, epoch, self.shuffle)
        for step, samples in enumerate(plan.batches(order, start)):
            # The position, not the step: augmentation after a resume draws what it would have
            # drawn without the interruption.
            yield (seed, epoch, plan.first_position(start, step)), samples
