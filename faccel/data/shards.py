"""A stream in files: each rank walks its own, and the ranks tell each other how far they have come."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import attrs
from torch.utils.data import DataLoader

from faccel.comm.all_or_error import all_or_error
from faccel.context import DistContext
from faccel.data.fetch import Walk, collated, inner_loader
from faccel.data.order import Cursor
from faccel.data.rounds import Deal, Part
from faccel.data.source import Batch
from faccel.errors import DataError
from faccel.protocols import DATA
from faccel.random.hashing import mix
from faccel.tree import Tree


@attrs.frozen
class _Told:
    """What a rank tells the others of its next part.

    Args:
        num_units: How many units it has; 0 at the end.
        place: `(consumed, mark)` after it, as in `Part`.
    """

    num_units: int = 0
    place: Any = None


@attrs.frozen(eq=False)
class ShardsSource:
    """An iterable data set with `.shard(num_shards=, index=)`, of which each rank walks its own shards alone.

    Args:
        loader: The user's.
        ctx: The world.
        size: Units per rank and round.
        tail: `"pad"`, which repeats the first units of a rank's own shards, or `"drop"`.
        seed: Of the generators that it is walked under.
    """

    loader: DataLoader[Any] = attrs.field(repr=False)
    ctx: DistContext
    size: int
    tail: str
    seed: int

    @property
    def name(self) -> str:
        """What a cursor is a place of, in words."""
        return "a stream in shards"

    def num_steps(self, start: int) -> int:
        """Raise: how long a shard is, nobody can know."""
        raise TypeError("a stream in shards does not say how many batches there are")

    def start_of(self, step: int) -> int:
        """Return where an epoch begins; of any other step nobody can know."""
        if step:
            fix = "write `loader.resume(batch.cursor)`"
            raise DataError(
                "a stream in shards does not know where a step begins", got=f"step={step}", fix=fix
            )
        return 0

    def _walk(self, epoch: int, place: tuple[int, Any] | None) -> Iterator[Part]:
        """Yield the parts of this rank's own shards from a place on; None is their end."""
        if place is None:
            return iter(())
        dataset: Any = self.loader.dataset
        shard = dataset.shard(num_shards=self.ctx.data_world_size, index=self.ctx.data_rank)
        if hasattr(shard, "set_epoch"):
            shard.set_epoch(epoch)
        seed = mix(self.seed, epoch, self.ctx.data_rank)
        walked = Walk(shard, Deal(self.size, 1, "uneven"), seed, *place, 0)
        if self.loader.num_workers or self.loader.pin_memory:
            return iter(inner_loader(self.loader, walked, seed))
        return iter(walked)

    def _places(self, cursor: Cursor) -> tuple[Any, ...]:
        """Return `(consumed, state)` of each rank, None for one that has come to its end."""
        world_size = self.ctx.data_world_size
        if not cursor.samples_consumed:
            return ((0, None),) * world_size
        if len(cursor.state or ()) != world_size:
            raise DataError(
                "a cursor of a stream in shards has a place for each rank",
                got=f"{len(cursor.state or ())} places, for {world_size} ranks that read data",
                fix='resume on as many ranks, or read it with `mode="split"`',
            )
        return tuple(cursor.state)

    def _take(self, parts: Iterator[Part]) -> tuple[Part | None, list[_Told]]:
        """Return this rank's next part, and what every rank has. Collective."""
        own: list[Part] = []

        def read() -> _Told:
            for part in islice(parts, 1):
                own.append(part)
                return _Told(len(part.units), (part.consumed, part.mark))
            return _Told()

        told = all_or_error(read, self.ctx, "read the data", axis=DATA)
        return (own[0] if own else None), told

    def _is_over(self, told: list[_Told]) -> bool:
        sizes = [each.num_units for each in told]
        return min(sizes) < self.size if self.tail == "drop" else not max(sizes)

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Yield each batch from `cursor` on. Collective."""
        epoch, consumed = cursor.epoch, cursor.samples_consumed
        parts = self._walk(epoch, self._places(cursor)[self.ctx.data_rank])
        step = consumed // (self.size * self.ctx.data_world_size)
        part, told = self._take(parts)
        while not self._is_over(told):
            ahead, then = self._take(parts)
            consumed += sum(each.num_units for each in told)
            is_end = self._is_over(then)
            places = tuple(each.place for each in told)
            after = (
                Cursor(epoch + 1, of=self.name)
                if is_end
                else Cursor(epoch, consumed, places, self.name)
            )
            num_valid = len(part.units) if part else 0
            units = self._padded(part.units if part else [], epoch)
            seed = mix(self.seed, epoch, consumed, self.ctx.data_rank)
            data = collated(
                Part(units, num_valid, consumed, is_end, is_end, None, step), self.loader, seed
            )
            yield Batch(data, num_valid, step, is_end, after)
            part, told, step = ahead, then, step + 1

    def _padded(self, units: list[Any], epoch: int) -> list[Any]:
        if len(units) == self.size:
            return units
        begin = next(
            self._walk(epoch, (0, None)), None
        )  # read again: after a resume nothing else knows it
        if begin is None:
            fix = 'write `tail="drop"`, or read it with `mode="split"`'
            raise DataError(
                "a rank without samples cannot repeat any", got=f"rank {self.ctx.rank}", fix=fix
            )
        first = begin.units
        return units + [first[i % len(first)] for i in range(self.size - len(units))]

    def data(self, cursor: Cursor) -> Iterator[Tree]:
        """Yield the data of each batch from `cursor` on. Collective."""
        return (batch.data for batch in self.batches(cursor))
