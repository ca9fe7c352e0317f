"""Sources whose positions are reached by iterating: custom samplers, and streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import attrs
import torch
from torch.utils.data import DataLoader

from faccel.comm.all_or_error import Failure, raise_first
from faccel.comm.objects import scatter_objects
from faccel.context import DistContext
from faccel.data.batch import BatchInfo
from faccel.data.fetch import Reader, Row, inner_loader
from faccel.data.order import Cursor
from faccel.data.stream_dataset import StreamDataset, collate_units, iterate_seeded
from faccel.data.stream_plan import RankBatch, StreamPlan, global_batches
from faccel.errors import DataError
from faccel.random.hashing import mix
from faccel.tree import Tree, flatten


def num_rows(data: Tree) -> int:
    """Return the rows of a batch that was not collated here: those of its first tensor, else 1."""
    for leaf in flatten(data)[0]:
        # A 0-d tensor has no dimension of rows, for example a label of the whole batch.
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return len(leaf)
    return 1


def no_step_error(step: int, name: str) -> DataError:
    """Return the error for a step number in a source where steps have no fixed size."""
    return DataError(
        f"`step` must be 0 in {name}, where the position of a later step is unknown",
        got=f"step={step}",
        fix="write `loader.resume(batch.cursor)`",
    )


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
    """

    sampler: Iterable[Tree] = attrs.field(repr=False)
    plan: StreamPlan
    rank: int
    seed: int
    reader: Reader = attrs.field(repr=False)
    is_batch_sampler: bool

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

    def num_steps(self, start: int) -> int:
        """See `Source`; known for a batch sampler only from its beginning."""
        # `start` counts samples, but the length of a batch sampler counts batches. A TypeError,
        # because `list(loader)` asks for the length as a hint, and ignores only that class.
        if start and self.is_batch_sampler:
            raise TypeError("the number of batches left in a batch sampler is unknown")
        return self.plan.num_steps(len(self.sampler) - start, self.rank)  # type: ignore[arg-type]

    def start_of(self, step: int) -> int:
        """See `Source`; a batch sampler may yield batches of any size."""
        if step and self.is_batch_sampler:
            raise no_step_error(step, self.name)
        return step * self.plan.global_batch_size

    def read(self, cursor: Cursor) -> Iterator[tuple[BatchInfo, Tree]]:
        """See `Source`."""
        pending: deque[BatchInfo] = deque()  # of rows that workers are reading ahead

        def rows() -> Iterator[Row]:
            for batch in self._rank_batches(cursor):
                # First in, first out: workers read ahead, but data arrives in the order of rows.
                pending.append(self._count_rows(batch))
                samples = list(batch.units[0]) if self.is_batch_sampler else batch.units
                yield (self.seed, cursor.epoch, batch.info.consumed, self.rank), samples

        for data in self.reader.read(rows(), cursor.epoch, cursor.samples_consumed):
            info = pending.popleft()
            # An item is a whole batch here: its number of rows is known once it is read. A repeated
            # batch keeps 0.
            if self.reader.is_single and info.num_valid:
                info = attrs.evolve(info, num_valid=num_rows(data))
            yield info, data

    def _rank_batches(self, cursor: Cursor) -> Iterator[RankBatch]:
        seed = mix(self.seed, cursor.epoch)
        # A batch sampler takes its indices from its attribute `sampler`. A sampler with a generator
        # does not draw from the process's generators, so its generator is seeded, too.
        for sampler in (self.sampler, getattr(self.sampler, "sampler", None)):
            _set_epoch(sampler, cursor.epoch)
            generator = getattr(sampler, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        units = iterate_seeded(self.sampler, seed)
        for batch in global_batches(units, self.plan, start=cursor.samples_consumed):
            rank_batch = batch.rank_batch(self.rank)
            if rank_batch is not None:
                yield rank_batch

    def _count_rows(self, batch: RankBatch) -> BatchInfo:
        # A unit is a list of indices: `num_valid` counts units, a batch its rows.
        if self.is_batch_sampler and batch.info.num_valid:
            return attrs.evolve(batch.info, num_valid=len(batch.units[0]))
        return batch.info


def _set_epoch(iterable: Tree, epoch: int) -> None:
    # The method by which PyTorch's and Hugging Face's classes receive the epoch.
    if hasattr(iterable, "set_epoch"):
        iterable.set_epoch(epoch)


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
    def _stream(self) -> Tree:
        if isinstance(self.loader, DataLoader):
            return self.loader.dataset
        return self.loader

    def num_steps(self, start: int) -> int:
        """See `Source`; known for a stream that has a length."""
        return self.plan.num_steps(len(self._stream) - start, self.ctx.data_rank)

    def start_of(self, step: int) -> int:
        """See `Source`."""
        return step * self.plan.global_batch_size

    def read(self, cursor: Cursor) -> Iterator[tuple[BatchInfo, Tree]]:
        """See `Source`; collective if rank 0 dispatches."""
        if self.dispatch and self.ctx.data_world_size > 1:
            batches = self._dispatched(cursor)
        else:
            batches = self._iterate(cursor, self.ctx.data_rank)
        is_whole_batch = getattr(self.loader, "batch_size", None) is None
        for batch in batches:
            if batch is None:  # an uneven tail
                continue
            info = batch.info
            # With the rank, because collating may draw, and ranks must not draw the same numbers.
            seed = mix(self.seed, cursor.epoch, info.consumed, self.ctx.data_rank)
            data = collate_units(batch.units, self.loader, seed)
            if is_whole_batch and info.num_valid:
                info = attrs.evolve(info, num_valid=num_rows(data))
            yield info, data

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
    _set_epoch(stream, cursor.epoch)
    dataset = StreamDataset(stream, plan, seed, cursor.samples_consumed, cursor.state, rank)
    if isinstance(loader, DataLoader) and (loader.num_workers or loader.pin_memory):
        return iter(inner_loader(loader, dataset, seed))
    return iter(dataset)
