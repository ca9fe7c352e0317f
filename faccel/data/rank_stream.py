"""One stream per rank: the ranks exchange how far they have come before each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import attrs

from faccel.comm.all_or_error import all_or_error
from faccel.comm.row_count import RowCount
from faccel.context import DistContext
from faccel.data.batch import BatchInfo
from faccel.data.order import Cursor
from faccel.data.stream_dataset import collate_units
from faccel.data.stream_plan import RankBatch, StreamPlan, repeated
from faccel.data.stream_sources import (
    empty_stream_error,
    iterate_stream,
    rows_of_whole_batch,
)
from faccel.errors import DataError
from faccel.mesh import DATA
from faccel.random.hashing import mix
from faccel.tree import Tree

# `(consumed, state)` in one rank's stream, as in `BatchInfo`. A plain tuple, because a cursor with
# the positions of all ranks is saved in checkpoints.
_Position = tuple[int, Tree]
_START: _Position = (0, None)


@attrs.frozen
class _Progress:
    """What a rank reports to the other ranks about its next batch.

    Args:
        num_units: Its number of units, 0 after the last batch.
        position: The position after it, None after the last batch.
    """

    num_units: int
    position: _Position | None


@attrs.frozen(eq=False)
class RankStreamSource:
    """An iterable dataset of which each rank iterates other samples.

    Either it has `.shard(num_shards=, index=)` and each rank reads its shards, or the user has
    split it: the dataset of each rank has that rank's samples.

    Args:
        loader: The user's `DataLoader` over an `IterableDataset`, or an iterable of batches.
        ctx: The world.
        batch_size: Samples per rank and step; 1 for an iterable of batches, which are the samples.
        tail: `"pad"`, which repeats the first samples of the rank's shards until each rank has as
            many rows as the one with the most; `"full"`, which repeats them up to `batch_size`
            rows; or `"drop"`.
        seed: Seed of the generators under which they are iterated.
        is_local: Whether the user has split the stream.
    """

    loader: Iterable[Tree] = attrs.field(repr=False)
    ctx: DistContext = attrs.field(repr=False)
    batch_size: int
    tail: str
    seed: int
    is_local: bool

    @property
    def name(self) -> str:
        """See `Source`."""
        if self.is_local:
            return "a local stream"
        return "a stream in shards"

    def num_steps(self, epoch: int, start: int) -> int:
        """Raise TypeError: how many samples the other ranks have is unknown."""
        raise TypeError(f"the number of batches of {self.name} is unknown")

    def start_of(self, epoch: int, step: int) -> int:
        """Return 0, the start of an epoch; raise for any other step."""
        if step:
            raise DataError(
                f"`step` must be 0 in {self.name}, where the position of a later step is unknown",
                got=f"step={step}",
                fix="write `loader.resume(batch.cursor)`",
            )
        return 0

    def read(self, cursor: Cursor) -> Iterator[tuple[BatchInfo, Tree]]:
        """See `Source`. Collective: one small gather per step, and one more."""
        epoch, consumed = cursor.epoch, cursor.samples_consumed
        batches = self._iterate(epoch, self._positions(cursor)[self.ctx.data_rank])
        # Exact while all batches were full. A resume later in the epoch counts fewer steps.
        step = consumed // (self.batch_size * self.ctx.data_world_size)
        is_whole_batch = getattr(self.loader, "batch_size", None) is None
        batch, progress = self._next(batches)
        if not consumed:
            self._check_first(progress)
        while not self._is_over(progress):
            # one step ahead, because only all ranks together find out which step is the last
            ahead, progress_ahead = self._next(batches)
            sizes = [rank.num_units for rank in progress]
            # Valid samples only: repeats are in no rank's stream.
            consumed += sum(sizes)
            is_end = self._is_over(progress_ahead)
            # Of all ranks, so that the cursor is the same on every rank and resumes each of them.
            positions = tuple(rank.position for rank in progress)
            units = batch.units if batch else []
            num_valid = RowCount(len(units), max(sizes))
            info = BatchInfo(num_valid, step, is_end, is_end, consumed, positions)
            seed = mix(self.seed, epoch, consumed, self.ctx.data_rank)
            num_rows = max(sizes)
            if self.tail == "full":
                num_rows = self.batch_size
            data = collate_units(self._filled(units, epoch, num_rows), self.loader, seed)
            if is_whole_batch:
                info = attrs.evolve(info, num_valid=rows_of_whole_batch(info, data))
            yield info, data
            batch, progress = ahead, progress_ahead
            step += 1

    def _iterate(self, epoch: int, position: _Position | None) -> Iterator[RankBatch]:
        """Yield the batches of this rank's stream from a position on."""
        if position is None:
            return iter(())
        stream: Tree = getattr(self.loader, "dataset", self.loader)
        if not self.is_local:
            world_size, rank = self.ctx.data_world_size, self.ctx.data_rank
            stream = stream.shard(num_shards=world_size, index=rank)
        # One rank, because the stream has no samples of other ranks. "uneven" yields a last batch
        # that is not full: `read` repeats samples, or stops before it, for all ranks together.
        plan = StreamPlan(self.batch_size, 1, "uneven")
        seed = mix(self.seed, epoch, self.ctx.data_rank)
        consumed, state = position
        cursor = Cursor(epoch, consumed, state)
        return iterate_stream(self.loader, stream, plan, seed, cursor, 0)

    def _positions(self, cursor: Cursor) -> tuple[_Position | None, ...]:
        """Return the position of each rank, None for one that has read all of its shards."""
        world_size = self.ctx.data_world_size
        if not cursor.samples_consumed:
            return (_START,) * world_size
        positions = cursor.state or ()
        if len(positions) != world_size:
            raise DataError(
                f"the cursor of {self.name} must have a position for each rank",
                got=f"{len(positions)} positions, for {world_size} ranks that read data",
                fix="resume on as many ranks, or start the epoch again with "
                "`loader.at(cursor.epoch)`",
            )
        return tuple(positions)

    def _next(self, batches: Iterator[RankBatch]) -> tuple[RankBatch | None, list[_Progress]]:
        """Return this rank's next batch, None at its end, and each rank's progress. Collective."""
        current: list[RankBatch] = []

        # Only the progress is sent, not the batch: `all_or_error` pickles what this returns.
        def read_one() -> _Progress:
            current.extend(islice(batches, 1))
            if not current:
                return _Progress(0, None)
            info = current[0].info
            return _Progress(len(current[0].units), (info.consumed, info.state))

        progress = all_or_error(read_one, self.ctx, "read the data", axis=DATA)
        return (current[0] if current else None), progress

    def _is_over(self, progress: list[_Progress]) -> bool:
        # The same sizes on every rank, so all ranks stop at the same step and none waits forever.
        sizes = [rank.num_units for rank in progress]
        if self.tail == "drop":
            return min(sizes) < self.batch_size
        return max(sizes) == 0

    def _filled(self, units: list[Tree], epoch: int, num_rows: int) -> list[Tree]:
        """Return `num_rows` samples: `units`, and repeats from the start of this rank's shards."""
        if len(units) == num_rows:
            return units
        # read again: after a resume the first samples are not in memory
        first = next(self._iterate(epoch, _START))
        return units + repeated(first.units, 0, num_rows - len(units))

    def _check_first(self, progress: list[_Progress]) -> None:
        # Every rank has the same progress, so all of them raise.
        if self._is_over(progress):
            raise empty_stream_error(self.loader)
        sizes = [rank.num_units for rank in progress]
        if min(sizes) == 0:
            raise DataError(
                f"rank {sizes.index(0)} has no samples to repeat",
                got="a stream without any sample",
                fix='write `tail="drop"`, or give each rank at least one sample',
            )
