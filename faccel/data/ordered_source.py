"""A map-style dataset in the order that faccel computes."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from faccel.data.batch import BatchInfo
from faccel.data.fetch import Reader, Row
from faccel.data.order import Cursor, Order, ShardPlan
from faccel.errors import DataError
from faccel.tree import Tree


@attrs.frozen(eq=False)
class OrderedSource:
    """A map-style dataset in faccel's own order: any position is reached in constant time.

    Args:
        plan: How this rank reads an epoch.
        seed: Seed of the order.
        shuffle: Whether it is shuffled.
        reader: Reads rows.
    """

    plan: ShardPlan
    seed: int
    shuffle: bool
    reader: Reader = attrs.field(repr=False)

    @property
    def name(self) -> str:
        """See `Source`."""
        order = f"a shuffle of seed {self.seed}" if self.shuffle else "order"
        return f"{self.plan.num_samples} samples in {order}"

    @property
    def tail(self) -> str:
        """See `Source`."""
        return self.plan.tail

    def num_steps(self, start: int) -> int:
        """See `Source`."""
        return self.plan.num_steps(start)

    def start_of(self, step: int) -> int:
        """See `Source`; that of the step after the last one is the end of the epoch."""
        num_samples, size = self.plan.num_samples, self.plan.global_batch_size
        # Rounded up for every tail: a step counter may be that of the end of the epoch, where
        # `min` below cuts the last step to the samples that exist.
        num_steps = -(-num_samples // size)
        if not 0 <= step <= num_steps:
            raise DataError(
                f"`step` must be between 0 and {num_steps}: an epoch of {num_samples} samples"
                f" has {num_steps} steps of {size}",
                got=f"step={step}",
                fix="pass a step of this epoch, or write `loader.resume(batch.cursor)`",
            )
        return min(step * size, num_samples)

    def order(self, epoch: int) -> Order:
        """Return the global order of an epoch."""
        return Order(self.plan.num_samples, self.seed, epoch, self.shuffle)

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
        # Rounded down: after a resume with another world size `start` may be no multiple of `G`.
        first_step = start // plan.global_batch_size
        last = plan.num_steps(start) - 1
        for i, data in enumerate(self.reader.read(self._rows(cursor), cursor.epoch, start)):
            consumed = plan.consumed(start, i)
            num_valid = plan.row_count(start, i)
            is_end = plan.is_end(consumed)
            yield BatchInfo(num_valid, first_step + i, i == last, is_end, consumed), data

    def _rows(self, cursor: Cursor) -> Iterator[Row]:
        seed, epoch, start = self.seed, cursor.epoch, cursor.samples_consumed
        for step, samples in enumerate(self.plan.batches(self.order(epoch), start)):
            # The position, not the step: augmentation after a resume draws what it would have
            # drawn without the interruption.
            yield (seed, epoch, self.plan.first_position(start, step)), samples
