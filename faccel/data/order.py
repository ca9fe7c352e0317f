"""The order of an epoch as pure arithmetic on integers: no tensor, no file, no state.

`N` samples, `B` rows per batch and rank, `W` ranks that read different data, `G = B * W`. An epoch has one global
order of the samples; position `p` of it is a sample. Starting at `c` samples, step `s` of rank `r` reads the positions
`c + s*G + r*B ... c + s*G + (r+1)*B - 1`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from faccel.errors import DataError
from faccel.random.hashing import mix

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

TAILS = ("drop", "pad", "uneven")

SMALL = 1 << 16
"""Below this many samples the order is a table: a Feistel network is biased on small domains."""

NUM_ROUNDS = 10
_CHUNK = 4096  # indices computed at a time: below, numpy's overhead per call shows; above, the cache does


def _scramble(x: _Words) -> _Words:
    """Apply SplitMix64's finalizer (Steele, Lea, Flood 2014) to each element of `uint64[n]`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=8)
def _keys(seed: int, epoch: int, count: int) -> _Words:
    """Return `uint64[count]` keys of one epoch's order."""
    return np.array([mix(seed, epoch, i) for i in range(count)], dtype=np.uint64)


@functools.lru_cache(maxsize=8)
def _table(num_samples: int, seed: int, epoch: int) -> Ints:
    """Return a true permutation `int64[num_samples]`: the order of keyed 64-bit hashes."""
    first, second = _keys(seed, epoch, 2)
    hashes = _scramble(_scramble(np.arange(num_samples, dtype=np.uint64) + first) ^ second)
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _feistel(x: _Words, bits: int, keys: _Words) -> _Words:
    """Permute `range(2**bits)`: an alternating, unbalanced Feistel network, one round per key.

    Source: Luby and Rackoff 1988; Schneier and Kelsey 1996 for the unbalanced form.
    """
    low_bits = bits // 2
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (bits - low_bits)) - 1)
    shift = np.uint64(low_bits)
    low, high = x & low_mask, x >> shift
    for i, key in enumerate(keys):
        if i % 2:
            high = high ^ (_scramble(low ^ key) & high_mask)
        else:
            low = low ^ (_scramble(high ^ key) & low_mask)
    return (high << shift) | low


def permute(positions: Ints, num_samples: int, seed: int, epoch: int) -> Ints:
    """Return the samples that stand at `positions` of one epoch's shuffled order.

    Effects: pure. Constant time and memory per position from 2**16 samples on (Feistel network with cycle walking,
    Black and Rogaway 2002), so that any place of any order is reached at once; below, a table is made and kept.

    Args:
        positions: `int64[n]`, each in `range(num_samples)`.
        num_samples: `N`.
        seed: Together with `epoch` chooses the order.
        epoch: See `seed`.

    Returns:
        `int64[n]`, a bijection of `range(num_samples)`.

    Examples:
        >>> sorted(permute(np.arange(5), 5, seed=0, epoch=0).tolist())
        [0, 1, 2, 3, 4]
    """
    if num_samples < SMALL:
        return _table(num_samples, seed, epoch)[positions]
    bits = (num_samples - 1).bit_length()
    keys = _keys(seed, epoch, NUM_ROUNDS)
    limit = np.uint64(num_samples)
    out = _feistel(positions.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(out >= limit)
    while outside.size:  # walk the cycle until it is back inside: under two steps each on average
        walked = _feistel(out[outside], bits, keys)
        out[outside] = walked
        outside = outside[walked >= limit]
    return out.astype(np.int64)


@attrs.frozen
class Cursor:
    """A place in the data: the same on every rank, and for every world size.

    Args:
        epoch: The epoch.
        samples_consumed: How many samples of its order have been read, by all ranks together (batches, of a loader
            that yields whole ones).
        state: What `state_dict` of an iterable data set gave there; None for any other.
        of: Which order it is a place of, in words that `resume` compares; None is a place of any.
    """

    epoch: int = 0
    samples_consumed: int = 0
    state: Any = attrs.field(default=None, eq=False, repr=False)
    of: str | None = attrs.field(default=None, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.epoch < 0 or self.samples_consumed < 0:
            raise DataError(
                "a cursor counts from 0", got=str(self), fix="use `batch.cursor` or `window.cursor`"
            )


@attrs.frozen
class Order:
    """The order of one epoch.

    Args:
        num_samples: `N`.
        seed: Together with `epoch` chooses the order of a shuffled loader.
        epoch: See `seed`.
        shuffle: False for the order of the data set.

    Examples:
        >>> order = Order(num_samples=10**12, seed=0, epoch=3, shuffle=True)
        >>> len(order.samples(np.array([0, 10**12 - 1])))
        2
    """

    num_samples: int
    seed: int
    epoch: int
    shuffle: bool

    def samples(self, positions: Ints) -> Ints:
        """Return the samples `int64[n]` at `positions`, `int64[n]` in `range(num_samples)`."""
        return (
            permute(positions, self.num_samples, self.seed, self.epoch)
            if self.shuffle
            else positions
        )


@attrs.frozen
class ShardPlan:
    """How one rank reads an epoch; everything about steps follows from it.

    Args:
        num_samples: `N`.
        batch_size: `B`, rows per batch on this rank.
        rank: `r`, this rank among those that read different data.
        world_size: `W`.
        tail: What the last step does with fewer than `G` samples left: `"pad"` wraps around to the start of the
            order, `"drop"` leaves them out, `"uneven"` gives some ranks fewer rows or none.
    """

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    tail: str

    @property
    def global_batch_size(self) -> int:
        """`G`, samples per step over all ranks."""
        return self.batch_size * self.world_size

    def num_steps(self, start: int) -> int:
        """Return how many batches this rank reads from `start` samples on."""
        left = max(0, self.num_samples - start)
        if self.tail == "drop":
            return left // self.global_batch_size
        if self.tail == "uneven":
            left = max(0, left - self.rank * self.batch_size)
        return -(-left // self.global_batch_size)

    def first_position(self, start: int, step: int) -> int:
        """Return the position of the first row of batch `step`."""
        return start + step * self.global_batch_size + self.rank * self.batch_size

    def num_valid(self, start: int, step: int) -> int:
        """Return how many rows of batch `step` are not repeats."""
        return min(max(0, self.num_samples - self.first_position(start, step)), self.batch_size)

    def cursor(self, epoch: int, start: int, step: int, of: str | None = None) -> Cursor:
        """Return the place after batch `step`; the start of the next epoch after the last one of any rank."""
        consumed = start + (step + 1) * self.global_batch_size
        ended = consumed + (self.global_batch_size if self.tail == "drop" else 1) > self.num_samples
        return Cursor(epoch + 1, 0, None, of) if ended else Cursor(epoch, consumed, None, of)

    def batches(self, order: Order, start: int) -> Iterator[Ints]:
        """Yield the samples `int64[<= B]` of each batch; thousands are computed at a time."""
        num_steps, size = self.num_steps(start), self.batch_size
        steps_at_once = max(1, _CHUNK // size)
        for first in range(0, num_steps, steps_at_once):
            steps = np.arange(first, min(first + steps_at_once, num_steps), dtype=np.int64)
            positions = (steps * self.global_batch_size + self.first_position(start, 0))[
                :, None
            ] + np.arange(size)
            if self.tail == "pad":
                positions %= self.num_samples
            samples = order.samples(
                np.minimum(positions, self.num_samples - 1).reshape(-1)
            ).reshape(-1, size)
            for step, row in zip(steps.tolist(), samples, strict=True):
                yield row if self.tail == "pad" else row[: self.num_valid(start, step)]


def check_tail(tail: Any) -> None:
    """Refuse what is not one of `TAILS`."""
    if tail not in TAILS:
        listed = ", ".join(f'`"{name}"`' for name in TAILS)
        raise DataError(
            "`tail` says what the last step does", got=repr(tail), fix=f"use one of {listed}"
        )
