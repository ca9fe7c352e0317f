"""Where a rank's batches come from: an order that is arithmetic, the user's own sampler, or a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import attrs
import torch
from torch.utils.data import DataLoader

from faccel.comm.all_or_error import Failure, raise_first
from faccel.comm.objects import scatter_objects
from faccel.context import DistContext
from faccel.data.fetch import Reader, Row, Walk, collated, inner_loader, walk
from faccel.data.order import Cursor, Order, ShardPlan
from faccel.data.rounds import Deal, Part, rounds
from faccel.errors import DataError
from faccel.random.hashing import mix
from faccel.tree import Tree, flatten

_END = "end"


@attrs.frozen(eq=False)
class Batch:
    """One rank's batch of one step.

    Args:
        data: What the loader's `collate_fn` made, on the device of the context.
        num_valid: Rows that are not repeats, `0 <= num_valid <= rows`: the first ones.
        step: Number of the batch in its epoch.
        is_last: Whether it is this rank's last one of the epoch.
        cursor: The place after it: what to save in order to go on behind it.
    """

    data: Tree
    num_valid: int
    step: int
    is_last: bool
    cursor: Cursor


class Source(Protocol):
    """How one rank reads an epoch."""

    @property
    def tail(self) -> str:
        """As in `shard`."""
        ...

    @property
    def name(self) -> str:
        """What a cursor is a place of, in words."""
        ...

    def num_steps(self, start: int) -> int:
        """Return how many batches there are from `start` on. Raises TypeError where nobody can know."""
        ...

    def start_of(self, step: int) -> int:
        """Return how much has been consumed before step `step` of an epoch."""
        ...

    def data(self, cursor: Cursor) -> Iterator[Tree]:
        """Yield the data of each batch from `cursor` on."""
        ...

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Yield each batch from `cursor` on."""
        ...


@attrs.frozen(eq=False)
class OrderedSource:
    """A map-style data set in an order of ours: any place of it is reached in constant time.

    Args:
        plan: How this rank reads an epoch.
        seed: Of the order.
        shuffle: Whether it is shuffled.
        reader: Reads rows.
    """

    plan: ShardPlan
    seed: int
    shuffle: bool
    reader: Reader = attrs.field(repr=False)

    @property
    def tail(self) -> str:
        """As in `shard`."""
        return self.plan.tail

    @property
    def name(self) -> str:
        """What a cursor is a place of, in words."""
        return f"{self.plan.num_samples} samples in {f'a shuffle of seed {self.seed}' if self.shuffle else 'order'}"

    def num_steps(self, start: int) -> int:
        """Return how many batches this rank reads from `start` on."""
        return self.plan.num_steps(start)

    def start_of(self, step: int) -> int:
        """Return how many samples come before step `step`; that behind the last is the end of the epoch."""
        num_samples, size = self.plan.num_samples, self.plan.global_batch_size
        if not 0 <= step <= -(-num_samples // size):
            raise DataError(
                f"an epoch of {num_samples} samples has {-(-num_samples // size)} steps of {size}",
                got=f"step={step}",
                fix="give a step of this epoch, or write `loader.resume(batch.cursor)`",
            )
        return min(step * size, num_samples)

    def order(self, epoch: int) -> Order:
        """Return the global order of an epoch."""
        return Order(self.plan.num_samples, self.seed, epoch, self.shuffle)

    def data(self, cursor: Cursor) -> Iterator[Tree]:
        """Yield the data of each batch from `cursor` on."""
        if cursor.samples_consumed > self.plan.num_samples:
            raise DataError(
                f"the cursor lies behind the end of a data set of {self.plan.num_samples} samples",
                got=str(cursor),
                fix="resume with the data set that the cursor was taken from",
            )
        return self.reader.read(self._rows(cursor), cursor.epoch, cursor.samples_consumed)

    def _rows(self, cursor: Cursor) -> Iterator[Row]:
        seed, epoch, start = self.seed, cursor.epoch, cursor.samples_consumed
        for step, samples in enumerate(self.plan.batches(self.order(epoch), start)):
            yield (seed, epoch, self.plan.first_position(start, step)), samples

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Yield each batch from `cursor` on."""
        plan, epoch, start = self.plan, cursor.epoch, cursor.samples_consumed
        num_steps, first, name = plan.num_steps(start), start // plan.global_batch_size, self.name
        for step, data in enumerate(self.data(cursor)):
            cursor = plan.cursor(epoch, start, step, name)
            yield Batch(
                data, plan.num_valid(start, step), first + step, step + 1 == num_steps, cursor
            )


def _batches_of(
    parts: Iterator[tuple[Part, Tree]], epoch: int, name: str, rows_of: Callable[[Part, Tree], int]
) -> Iterator[Batch]:
    for part, data in parts:
        after = (
            Cursor(epoch + 1, of=name)
            if part.is_end
            else Cursor(epoch, part.consumed, part.mark, name)
        )
        yield Batch(data, rows_of(part, data), part.step, part.is_last, after)


def _rows_of_data(part: Part, data: Tree) -> int:
    """Return the valid rows where one unit is a whole batch: those of its first tensor."""
    leaves = [leaf for leaf in flatten(data)[0] if isinstance(leaf, torch.Tensor) and leaf.ndim]
    return (len(leaves[0]) if leaves else 1) if part.num_valid else 0


def _no_steps(step: int) -> int:
    if step:
        raise DataError(
            "only an order of faccel's own knows where a step begins",
            got=f"step={step} of a loader with its own sampler, batches or stream",
            fix="write `loader.resume(batch.cursor)`",
        )
    return 0


@attrs.frozen(eq=False)
class SampledSource:
    """A map-style data set in the order of the user's own sampler or batch sampler.

    Every rank walks it alike, under generators that follow from `(seed, epoch)`: ranks that are seeded apart would see
    some samples twice and others never.

    Args:
        units: The sampler (a unit is an index) or the batch sampler (a unit is a list of them).
        deal: How they are dealt.
        rank: This rank.
        seed: Of the generators.
        reader: Reads rows.
        is_batches: Whether a unit is a list.
    """

    units: Iterable[Any] = attrs.field(repr=False)
    deal: Deal
    rank: int
    seed: int
    reader: Reader = attrs.field(repr=False)
    is_batches: bool

    @property
    def tail(self) -> str:
        """As in `shard`."""
        return self.deal.tail

    @property
    def name(self) -> str:
        """What a cursor is a place of, in words."""
        return f"{'batches' if self.is_batches else 'samples'} of an own sampler"

    def num_steps(self, start: int) -> int:
        """Return how many batches this rank reads; of a batch sampler only from its beginning."""
        if start and self.is_batches:
            raise TypeError("a batch sampler does not say how many batches are left")
        return self.deal.num_steps(len(self.units) - start, self.rank)  # type: ignore[arg-type]

    def start_of(self, step: int) -> int:
        """Return how many samples come before step `step`, where a step has a fixed size."""
        return _no_steps(step) if self.is_batches else step * self.deal.whole

    def _parts(self, cursor: Cursor) -> Iterator[Part]:
        seed = mix(self.seed, cursor.epoch)
        for each in (self.units, getattr(self.units, "sampler", None)):
            if hasattr(each, "set_epoch"):
                each.set_epoch(cursor.epoch)  # type: ignore[union-attr]
            if isinstance(getattr(each, "generator", None), torch.Generator):
                each.generator.manual_seed(seed)  # type: ignore[union-attr]
        for each in rounds(walk(self.units, seed), self.deal, start=cursor.samples_consumed):
            part = each.part(self.rank)
            if part is not None:
                yield part

    def _read(self, cursor: Cursor) -> Iterator[tuple[Part, Tree]]:
        ahead: deque[Part] = deque()  # parts whose rows the reader has taken and not yet given back

        def rows() -> Iterator[Row]:
            for part in self._parts(cursor):
                ahead.append(part)
                samples = list(part.units[0]) if self.is_batches else part.units
                yield (self.seed, cursor.epoch, part.consumed, self.rank), samples

        for data in self.reader.read(rows(), cursor.epoch, cursor.samples_consumed):
            yield ahead.popleft(), data

    def data(self, cursor: Cursor) -> Iterator[Tree]:
        """Yield the data of each batch from `cursor` on."""
        return (data for _, data in self._read(cursor))

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Yield each batch from `cursor` on."""
        return _batches_of(self._read(cursor), cursor.epoch, self.name, self._rows)

    def _rows(self, part: Part, data: Tree) -> int:
        if self.reader.is_single:
            return _rows_of_data(part, data)
        return len(part.units[0]) * bool(part.num_valid) if self.is_batches else part.num_valid


@attrs.frozen(eq=False)
class StreamSource:
    """An iterable data set, or any iterable of batches.

    Args:
        loader: The user's `DataLoader` over an `IterableDataset`, or the iterable itself.
        ctx: The world.
        deal: How its units are dealt.
        seed: Of the generators that it is walked under.
        dispatch: Whether rank 0 walks it and sends each rank its part, instead of every rank walking it whole.
    """

    loader: Any = attrs.field(repr=False)
    ctx: DistContext = attrs.field(repr=False)
    deal: Deal
    seed: int
    dispatch: bool

    @property
    def tail(self) -> str:
        """As in `shard`."""
        return self.deal.tail

    @property
    def name(self) -> str:
        """What a cursor is a place of, in words."""
        return "a stream"

    def num_steps(self, start: int) -> int:
        """Return how many batches this rank reads, where the stream has a length."""
        stream: Any = self.loader.dataset if isinstance(self.loader, DataLoader) else self.loader
        return self.deal.num_steps(len(stream) - start, self.ctx.data_rank)

    def start_of(self, step: int) -> int:
        """Return how much comes before step `step`."""
        return step * self.deal.whole

    def _walk(self, cursor: Cursor, rank: int | None) -> Iterator[Any]:
        seed = mix(self.seed, cursor.epoch)
        is_loader = isinstance(self.loader, DataLoader)
        stream = self.loader.dataset if is_loader else self.loader
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(cursor.epoch)
        walked = Walk(stream, self.deal, seed, cursor.samples_consumed, cursor.state, rank)
        if is_loader and (self.loader.num_workers or self.loader.pin_memory):
            return iter(inner_loader(self.loader, walked, seed))
        return iter(walked)

    def _parts(self, cursor: Cursor) -> Iterator[Part | None]:
        if not self.dispatch or self.ctx.data_world_size == 1:
            yield from self._walk(cursor, self.ctx.data_rank)
            return
        parts = self._walk(cursor, None) if self.ctx.data_rank == 0 else None
        while True:
            sent, error = None, None
            if parts is not None:
                sent, error = self._next_parts(parts)
            part, failure = scatter_objects(sent, self.ctx)
            raise_first([failure], error, self.ctx, "read the data")
            if part == _END:
                return
            yield part

    def _next_parts(self, parts: Iterator[Any]) -> tuple[list[Any], Exception | None]:
        """Return `(part, failure)` for each rank, and the error of this rank."""
        world_size = self.ctx.data_world_size
        try:
            return [(part, None) for part in next(parts, [_END] * world_size)], None
        except Exception as error:  # the other ranks wait for their parts
            return [(None, Failure.of(error, self.ctx))] * world_size, error

    def _read(self, cursor: Cursor) -> Iterator[tuple[Part, Tree]]:
        for part in self._parts(cursor):
            if part is not None:
                yield (
                    part,
                    collated(
                        part,
                        self.loader,
                        mix(self.seed, cursor.epoch, part.consumed, self.ctx.data_rank),
                    ),
                )

    def data(self, cursor: Cursor) -> Iterator[Tree]:
        """Yield the data of each batch from `cursor` on."""
        return (data for _, data in self._read(cursor))

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Yield each batch from `cursor` on."""
        is_batch = getattr(self.loader, "batch_size", None) is None
        rows_of = _rows_of_data if is_batch else lambda part, data: part.num_valid
        return _batches_of(self._read(cursor), cursor.epoch, self.name, rows_of)
