"""A map-style dataset in the order of the user's own sampler or batch sampler."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

import attrs

from faccel.checks import integer
from faccel.comm.row_count import RowCount
from faccel.data.batch import BatchInfo, empty_error, start_of_step, step_error
from faccel.data.fetch import Reader, Row
from faccel.data.order import Cursor
from faccel.data.stream_dataset import iterate_sampler
from faccel.data.stream_plan import GlobalBatch, StreamPlan, divided_batches, global_batches
from faccel.data.stream_sources import rows_of_whole_batch
from faccel.errors import DataError
from faccel.random.hashing import mix
from faccel.tree import Tree


@attrs.frozen(eq=False)
class SamplerSource:
    """A map-style dataset in the order of the user's own sampler or batch sampler.

    Every rank iterates the sampler under generators that are seeded by `(seed, epoch)`. If ranks
    were seeded differently, some samples would be read twice and others never.

    Args:
        sampler: A sampler (a unit is an index) or a batch sampler (a unit is a list of indices).
        plan: How its units are split over ranks.
        rank: This rank.
        seed: Seed of the generators.
        reader: Reads rows.
        is_batch_sampler: Whether a unit is a list.
        divides_batches: Whether each list is one step, whose indices are divided over the ranks.
    """

    sampler: Iterable[Tree] = attrs.field(repr=False)
    plan: StreamPlan
    rank: int
    seed: int
    reader: Reader = attrs.field(repr=False)
    is_batch_sampler: bool
    divides_batches: bool = False

    @property
    def name(self) -> str:
        """See `Source`."""
        if self.is_batch_sampler:
            return "batches of a custom sampler"
        return "samples of a custom sampler"

    @property
    def tail(self) -> str:
        """See `Source`."""
        return self.plan.tail

    def num_steps(self, epoch: int, start: int) -> int:
        """See `Source`; a batch sampler is iterated unless it is asked for all of its batches."""
        # A TypeError for a sampler without a length, which may have no end: `list(loader)` asks for
        # the length as a hint, and ignores only that class.
        num_units = len(self.sampler)  # type: ignore[arg-type]
        if not self.is_batch_sampler:
            return self.plan.num_steps(num_units - start, self.rank)
        if start == 0 and not self.divides_batches:
            return self.plan.num_steps(num_units, self.rank)
        steps = self._global_batches(epoch, start)
        return sum(step.rank_batch(self.rank) is not None for step in steps)

    def start_of(self, epoch: int, step: int) -> int:
        """See `Source`; the lists of a batch sampler may have any size and are counted."""
        size = self.plan.global_batch_size
        integer("step", step, at_least=0, error=DataError)
        if not self.is_batch_sampler:
            if hasattr(self.sampler, "__len__"):
                return start_of_step(step, len(self.sampler), size)  # type: ignore[arg-type]
            return step * size
        consumed = num_steps = 0
        for batch in islice(self._global_batches(epoch, 0), step):
            consumed = batch.consumed
            num_steps += 1
        if num_steps < step:
            raise step_error(step, num_steps, consumed, size)
        return consumed

    def read(self, cursor: Cursor) -> Iterator[tuple[BatchInfo, Tree]]:
        """See `Source`."""
        pending: deque[BatchInfo] = deque()  # of rows that workers are reading ahead

        def rows() -> Iterator[Row]:
            for batch in self._global_batches(cursor.epoch, cursor.samples_consumed):
                rank_batch = batch.rank_batch(self.rank)
                if rank_batch is None:  # an uneven tail
                    continue
                samples, info = rank_batch.units, rank_batch.info
                if self.is_batch_sampler and not self.divides_batches:
                    samples = list(samples[0])
                    info = attrs.evolve(info, num_valid=_rows_of_list(batch, info, samples))
                # First in, first out: workers read ahead, but data arrives in the order of rows.
                pending.append(info)
                yield (self.seed, cursor.epoch, info.consumed, self.rank), samples

        has_batch = cursor.samples_consumed > 0
        for data in self.reader.read(rows(), cursor.epoch, cursor.samples_consumed):
            has_batch = True
            info = pending.popleft()
            # An item is a whole batch here: its number of rows is known once it is read.
            if self.reader.is_single:
                info = attrs.evolve(info, num_valid=rows_of_whole_batch(info, data))
            yield info, data
        if not has_batch and self.tail != "uneven":
            raise empty_error(
                f"a {type(self.sampler).__name__} that has yielded no step",
                "check the dataset and the sampler; one with fewer samples than a global batch "
                'needs `drop_last=False` and `tail="pad"`',
            )

    def _global_batches(self, epoch: int, start: int) -> Iterator[GlobalBatch]:
        seed = mix(self.seed, epoch)
        units = iterate_sampler(self.sampler, seed, epoch)
        if self.divides_batches:
            return divided_batches(units, self.plan, start=start)
        return global_batches(units, self.plan, start=start)


def _rows_of_list(batch: GlobalBatch, info: BatchInfo, indices: list[Tree]) -> int:
    """Return the valid rows of one list of a batch sampler."""
    # A unit is a list of indices: `num_valid` counts units, a batch its rows.
    lengths = [len(unit) for unit in batch.units]
    num_valid = len(indices) if info.num_valid else 0
    # A plain number where all ranks have as many rows, which is the case in most steps.
    if len(lengths) == batch.plan.world_size and len(set(lengths)) == 1:
        return num_valid
    return RowCount(num_valid, max(lengths))
