"""Streams: iterable datasets and any iterables of batches, which are read from their beginning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
from torch.utils.data import DataLoader

from faccel.comm.all_or_error import Failure, raise_first
from faccel.comm.objects import scatter_objects
from faccel.comm.row_count import RowCount
from faccel.context import DistContext
from faccel.data.batch import BatchInfo, empty_error, start_of_step
from faccel.data.fetch import inner_loader, num_rows, set_epoch
from faccel.data.order import Cursor
from faccel.data.shard_checks import check_same_first
from faccel.data.stream_dataset import StreamDataset, collate_units
from faccel.data.stream_plan import RankBatch, StreamPlan
from faccel.errors import DataError
from faccel.random.hashing import mix
from faccel.tree import Tree

_END = "end"  # sent to each rank instead of a batch


@attrs.frozen(eq=False)
class StreamSource:
    """An iterable dataset, or any iterable of batches.

    Args:
        loader: The user's `DataLoader` over an `IterableDataset`, or the iterable itself.
        ctx: The world.
        plan: How its units are split over ranks.
        seed: Seed of the generators under which it is iterated.
        dispatch: Whether rank 0 iterates it and sends each rank its units. Otherwise every rank
            iterates all of it.
    """

    loader: Iterable[Tree] = attrs.field(repr=False)
    ctx: DistContext = attrs.field(repr=False)
    plan: StreamPlan
    seed: int
    dispatch: bool

    @property
    def name(self) -> str:
        """See `Source`."""
        return "a stream"

    @property
    def tail(self) -> str:
        """See `Source`."""
        return self.plan.tail

    @property
    def _rank(self) -> int:
        """This rank in the plan: 0 where every rank reads everything."""
        return self.ctx.data_rank % self.plan.world_size

    @property
    def _is_compared(self) -> bool:
        """Whether debug mode compares the first sample: with "uneven" a rank may have none."""
        is_split = self.ctx.data_world_size > 1 and not self.dispatch
        return self.ctx.config.debug and is_split and self.tail != "uneven"

    @property
    def _stream(self) -> Tree:
        if isinstance(self.loader, DataLoader):
            return self.loader.dataset
        return self.loader

    def num_steps(self, epoch: int, start: int) -> int:
        """See `Source`; known for a stream that has a length."""
        return self.plan.num_steps(len(self._stream) - start, self._rank)

    def start_of(self, epoch: int, step: int) -> int:
        """See `Source`."""
        size = self.plan.global_batch_size
        if hasattr(self._stream, "__len__"):
            return start_of_step(step, len(self._stream), size)
        return step * size

    def read(self, cursor: Cursor) -> Iterator[tuple[BatchInfo, Tree]]:
        """See `Source`; collective if rank 0 dispatches."""
        if self.dispatch and self.ctx.data_world_size > 1:
            batches = self._dispatched(cursor)
        else:
            batches = self._iterate(cursor, self._rank)
        is_whole_batch = getattr(self.loader, "batch_size", None) is None
        has_batch = cursor.samples_consumed > 0
        for batch in batches:
            has_batch = True
            if batch is None:  # an uneven tail
                continue
            info = batch.info
            if self._is_compared and batch.first is not None:
                check_same_first(batch.first, self.ctx)
            # With the rank, because collating may draw, and ranks must not draw the same numbers.
            seed = mix(self.seed, cursor.epoch, info.consumed, self._rank)
            data = collate_units(batch.units, self.loader, seed)
            if is_whole_batch:
                info = attrs.evolve(info, num_valid=rows_of_whole_batch(info, data))
            yield info, data
        if not has_batch:
            raise empty_stream_error(self.loader)

    def _iterate(self, cursor: Cursor, rank: int | None) -> Iterator[Tree]:
        """Yield the `RankBatch` of a rank, or a list of those of all ranks."""
        return iterate_stream(
            self.loader, self._stream, self.plan, mix(self.seed, cursor.epoch), cursor, rank
        )

    def _dispatched(self, cursor: Cursor) -> Iterator[RankBatch | None]:
        stream = None
        if self.ctx.data_rank == 0:
            stream = self._iterate(cursor, None)
        while True:
            sent, error = None, None
            if stream is not None:
                sent, error = self._next_batches(stream)
            # One exchange for a batch, the end and a failure: the other ranks cannot predict which.
            batch, failure = scatter_objects(sent, self.ctx)
            raise_first([failure], error, self.ctx, "read the data")
            if batch == _END:
                return
            yield batch

    def _next_batches(self, stream: Iterator[Tree]) -> tuple[list[Tree], Exception | None]:
        """Return `(batch, failure)` for each rank, and the error of this rank."""
        world_size = self.ctx.data_world_size
        try:
            return [(batch, None) for batch in next(stream, [_END] * world_size)], None
        except Exception as error:  # the other ranks wait for their batches
            return [(None, Failure.of(error, self.ctx))] * world_size, error


def rows_of_whole_batch(info: BatchInfo, data: Tree) -> RowCount:
    """Return the rows of a batch that was not collated here, 0 for a repeated one."""
    # Batches of other ranks may have other numbers of rows, which this rank has not read.
    if not info.num_valid:
        return RowCount(0)
    return RowCount(num_rows(data))


def empty_stream_error(loader: Tree) -> DataError:
    """Return the error for a stream without any sample."""
    return empty_error(
        f"a {type(getattr(loader, 'dataset', loader)).__name__} that has yielded nothing",
        "check its files and filters; pass an iterable that starts again for each epoch, such as a "
        "list or a `DataLoader`, instead of a generator",
    )


def iterate_stream(
    loader: Iterable[Tree],
    stream: Tree,
    plan: StreamPlan,
    seed: int,
    cursor: Cursor,
    rank: int | None,
) -> Iterator[Tree]:
    """Yield the batches of `stream` from `cursor` on, in the workers of `loader` if it has any."""
    # Before workers start: they get a copy of the stream.
    set_epoch(stream, cursor.epoch)
    dataset = StreamDataset(stream, plan, seed, cursor.samples_consumed, cursor.state, rank)
    if isinstance(loader, DataLoader) and (loader.num_workers or loader.pin_memory):
        return iter(inner_loader(loader, dataset, seed))
    return iter(dataset)
