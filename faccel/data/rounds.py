"""Dealing a stream out to ranks: what `shard` does where the order is the user's own and has to be walked.

A stream is any iterable that every rank can walk alike: the indices of a sampler, the index lists of a batch sampler,
the samples of an `IterableDataset`, or whole batches. A round is `size` of its units for each of `W` ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import attrs

from faccel.errors import DataError


def _one(unit: Any) -> int:
    return 1


@attrs.frozen
class Deal:
    """How the units of a stream are dealt out.

    Args:
        size: Units per rank and round.
        world_size: `W`, how many ranks read different data.
        tail: As in `shard`; padding repeats the first units of the stream.
        weigh: What a unit counts in a cursor.
    """

    size: int
    world_size: int
    tail: str
    weigh: Callable[[Any], int] = _one

    @property
    def whole(self) -> int:
        """Units of a full round."""
        return self.size * self.world_size

    def num_steps(self, num_units: int, rank: int) -> int:
        """Return how many parts a rank gets of a stream of `num_units`."""
        if self.tail == "drop":
            return num_units // self.whole
        left = max(0, num_units - rank * self.size) if self.tail == "uneven" else num_units
        return -(-left // self.whole)


@attrs.frozen
class Part:
    """One rank's part of a round.

    Args:
        units: Its units, `size` of them unless the tail is `"uneven"`.
        num_valid: How many are not repeats: the first ones.
        consumed: What all ranks together have consumed after the round.
        is_last: Whether it is this rank's last part.
        is_end: Whether the stream ends with this round.
        mark: What `mark()` gave after the round was read.
        step: Number of the round in the stream.
    """

    units: list[Any]
    num_valid: int
    consumed: int
    is_last: bool
    is_end: bool
    mark: Any
    step: int


@attrs.frozen
class Round:
    """One round of a stream, before it is dealt; fields as in `Part`.

    Args:
        deal: How it is to be dealt.
        units: What was read, a full round or the rest of the stream.
        first: The first units of the stream, for padding.
        num_ahead: How many units the next round has.
        consumed: See `Part`.
        mark: See `Part`.
        step: See `Part`.
    """

    deal: Deal
    units: list[Any]
    first: list[Any]
    num_ahead: int
    consumed: int
    mark: Any
    step: int

    def part(self, rank: int) -> Part | None:
        """Return the part of a rank; None where an uneven tail leaves it without one."""
        size, tail = self.deal.size, self.deal.tail
        units = self.units[rank * size : (rank + 1) * size]
        ends = self.num_ahead < self.deal.whole if tail == "drop" else not self.num_ahead
        last = self.num_ahead <= rank * size if tail == "uneven" else ends
        valid = len(units)
        if (
            tail == "pad" and valid < size
        ):  # positions behind the end wrap around, repeatedly if need be
            at = rank * size + valid - len(self.units)
            units = units + [self.first[(at + i) % len(self.first)] for i in range(size - valid)]
        return (
            Part(units, valid, self.consumed, last, ends, self.mark, self.step) if units else None
        )


def rounds(
    stream: Iterable[Any],
    deal: Deal,
    *,
    start: int = 0,
    passed: int = 0,
    mark: Callable[[], Any] = lambda: None,
) -> Iterator[Round]:
    """Yield the rounds of a stream.

    Effects: pure, as far as the stream is. One round is read ahead, which tells whether a part is the last.

    Args:
        stream: Walked from where it stands; the same on every rank.
        deal: How it is dealt.
        start: What has been consumed already: units that weigh as much are passed over.
        passed: What the stream itself has already passed over; counts in `consumed`.
        mark: Called after each round is read, before the next one.

    Raises:
        DataError: `start` lies inside a unit or behind the end of the stream.

    Examples:
        >>> parts = [r.part(1) for r in rounds(range(7), Deal(size=2, world_size=2, tail="pad"))]
        >>> [(p.units, p.num_valid) for p in parts]
        [([2, 3], 2), ([6, 0], 1)]
    """
    units = iter(stream)
    first, consumed, step = _pass_over(units, deal, start)
    consumed, step = consumed + passed, (step + passed) // deal.whole
    current, now = list(islice(units, deal.whole)), mark()
    while current and not (deal.tail == "drop" and len(current) < deal.whole):
        first += current[: deal.whole - len(first)]
        ahead, then = list(islice(units, deal.whole)), mark()
        consumed += sum(map(deal.weigh, current))
        yield Round(deal, current, first, len(ahead), consumed, now, step)
        current, now, step = ahead, then, step + 1


def _pass_over(units: Iterator[Any], deal: Deal, start: int) -> tuple[list[Any], int, int]:
    first: list[Any] = []
    consumed = count = 0
    while consumed < start:
        unit = next(units, deal)
        if unit is deal:
            break
        first += [unit] if len(first) < deal.whole else []
        consumed, count = consumed + deal.weigh(unit), count + 1
    if consumed != start:
        raise DataError(
            "the cursor does not lie between two batches of this loader",
            got=f"samples_consumed={start} where {consumed} can be passed over",
            fix="resume with the loader that the cursor was taken from",
        )
    return first, consumed, count
