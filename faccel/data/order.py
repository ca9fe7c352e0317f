"""The order of an epoch as pure arithmetic on integers: no tensor, no file, no state.

`N` samples, `B` rows per batch and rank, `W` ranks that read different data, `G = B * W`. An epoch
has one global order, which maps each position to a sample. Starting at `c` samples, step `s` of
rank `r` reads the positions `c + s*G + r*B ... c + s*G + (r+1)*B - 1`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import attrs
import numpy as np

from faccel.checks import one_of
from faccel.errors import DataError
from faccel.random.hashing import mix
from faccel.tree import Tree

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
_Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

TAILS = ("drop", "pad", "uneven")

SMALL = 1 << 16
"""Below this many samples the order is a table: a Feistel network is biased on a small domain."""

NUM_ROUNDS = 10
# Indices computed at a time: fewer, and NumPy's overhead per call dominates; more, and they leave
# the CPU's cache.
_CHUNK = 4096


def _scramble(x: _Words) -> _Words:
    """Apply SplitMix64's finalizer (Steele, Lea, Flood 2014) to each element of `uint64[n]`."""
    # Modulo 2^64: products of uint64 arrays wrap around. A xor with a shift and a product with an
    # odd number are invertible, so this is a bijection of the 64-bit integers.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=8)
def _keys(seed: int, epoch: int, count: int) -> _Words:
    """Return `uint64[count]` keys of one epoch's order."""
    return np.array([mix(seed, epoch, i) for i in range(count)], dtype=np.uint64)


@functools.lru_cache(maxsize=8)
def _table(num_samples: int, seed: int, epoch: int) -> Ints:
    """Return a permutation `int64[num_samples]`: the argsort of keyed 64-bit hashes."""
    first, second = _keys(seed, epoch, 2)
    # Sorting by pseudorandom keys is a shuffle. It has no ties: `_scramble`, the sum and the xor
    # are bijections, so the hashes of different samples differ.
    hashes = _scramble(_scramble(np.arange(num_samples, dtype=np.uint64) + first) ^ second)
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _feistel(x: _Words, bits: int, keys: _Words) -> _Words:
    """Permute `range(2**bits)` with an alternating, unbalanced Feistel network, one round per key.

    Source: Luby and Rackoff 1988; Schneier and Kelsey 1996 for the unbalanced form.
    """
    low_bits = bits // 2
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (bits - low_bits)) - 1)
    shift = np.uint64(low_bits)
    low, high = x & low_mask, x >> shift
    # A round is `(low, high) -> (low ^ F(high), high)`, or the same with both exchanged. It is its
    # own inverse for any F, so every round, and the network, is a bijection of `range(2**bits)`.
    # Both halves are updated in turn instead of swapped, because an odd `bits` makes them unequal.
    for i, key in enumerate(keys):
        if i % 2:
            high = high ^ (_scramble(low ^ key) & high_mask)
        else:
            low = low ^ (_scramble(high ^ key) & low_mask)
    return (high << shift) | low


def permute(positions: Ints, num_samples: int, seed: int, epoch: int) -> Ints:
    """Return the samples at `positions` of one epoch's shuffled order.

    Effects: pure. From 2**16 samples on, constant time and memory per position: a Feistel network
    with cycle walking (Black and Rogaway 2002). Below, a table is computed and cached.

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
    # `2**bits` is the smallest power of 2 that is at least `num_samples`.
    bits = (num_samples - 1).bit_length()
    keys = _keys(seed, epoch, NUM_ROUNDS)
    limit = np.uint64(num_samples)
    out = _feistel(positions.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(out >= limit)
    # Cycle walking: an index outside is permuted again until it is inside. That is a bijection of
    # `range(num_samples)`, because it follows the cycle of the larger permutation, which returns to
    # its start. `limit > 2**(bits - 1)`, so each index needs less than two more steps on average.
    while outside.size:
        permuted = _feistel(out[outside], bits, keys)
        out[outside] = permuted
        outside = outside[permuted >= limit]
    return out.astype(np.int64)


@attrs.frozen
class Cursor:
    """A position in the data: the same on every rank, and valid for every world size.

    Args:
        epoch: The epoch.
        samples_consumed: How many samples of its order all ranks together have read (batches, if
            the loader yields whole ones).
        state: What `state_dict` of an iterable dataset returned there; None for any other dataset.
        of: Name of the order that it is a position of, which `resume` compares; None fits any
            order.
    """

    epoch: int = 0
    samples_consumed: int = 0
    state: Tree = attrs.field(default=None, eq=False, repr=False)
    of: str | None = attrs.field(default=None, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.epoch < 0 or self.samples_consumed < 0:
            raise DataError(
                "`epoch` and `samples_consumed` of a cursor must be at least 0",
                got=str(self),
                fix="use `batch.cursor` or `window.cursor`",
            )


@attrs.frozen
class Order:
    """The order of one epoch.

    Args:
        num_samples: `N`.
        seed: Together with `epoch` chooses the order of a shuffled loader.
        epoch: See `seed`.
        shuffle: False for the order of the dataset.

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
        if not self.shuffle:
            return positions
        return permute(positions, self.num_samples, self.seed, self.epoch)


@attrs.frozen
class ShardPlan:
    """How one rank reads an epoch, as arithmetic.

    Args:
        num_samples: `N`.
        batch_size: `B`, rows per batch on this rank.
        rank: `r`, this rank among those that read different data.
        world_size: `W`.
        tail: For a last step of fewer than `G` samples: `"pad"` repeats samples from the start of
            the order, `"drop"` leaves the step out, `"uneven"` gives some ranks fewer rows or none.
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
        """Return the number of batches of this rank from `start` samples on."""
        # With `n` samples left: drop floor(n / G), pad ceil(n / G), uneven ceil((n - r*B) / G),
        # because the first row of rank `r` in step `s` is `s*G + r*B`, which must be below `n`.
        num_left = max(0, self.num_samples - start)
        if self.tail == "drop":
            return num_left // self.global_batch_size
        if self.tail == "uneven":
            num_left = max(0, num_left - self.rank * self.batch_size)
        # ceil(a / b) == -(-a // b) in integers: exact for any size, unlike `math.ceil(a / b)`.
        return -(-num_left // self.global_batch_size)

    def first_position(self, start: int, step: int) -> int:
        """Return the position of the first row of batch `step`."""
        return start + step * self.global_batch_size + self.rank * self.batch_size

    def num_valid(self, start: int, step: int) -> int:
        """Return the number of rows of batch `step` that are not repeats."""
        return min(max(0, self.num_samples - self.first_position(start, step)), self.batch_size)

    def consumed(self, start: int, step: int) -> int:
        """Return the samples that all ranks have consumed after batch `step`, repeats included."""
        return start + (step + 1) * self.global_batch_size

    def is_end(self, consumed: int) -> bool:
        """Return whether the epoch has no step after `consumed` samples, on any rank."""
        # A step needs one sample at least, or a full global batch with "drop".
        smallest_step = 1
        if self.tail == "drop":
            smallest_step = self.global_batch_size
        return consumed + smallest_step > self.num_samples

    def cursor(self, epoch: int, start: int, step: int, of: str | None = None) -> Cursor:
        """Return the position after batch `step`; after the last, the start of the next epoch."""
        consumed = self.consumed(start, step)
        if self.is_end(consumed):
            return Cursor(epoch + 1, of=of)
        return Cursor(epoch, consumed, of=of)

    def batches(self, order: Order, start: int) -> Iterator[Ints]:
        """Yield the samples `int64[<= B]` of each batch; thousands are computed at a time."""
        num_steps, size = self.num_steps(start), self.batch_size
        steps_at_once = max(1, _CHUNK // size)
        # In each chunk: positions `int64[steps, B]`, `c + s*G + r*B + i` for step `s` and row `i`.
        for first in range(0, num_steps, steps_at_once):
            steps = np.arange(first, min(first + steps_at_once, num_steps), dtype=np.int64)
            first_positions = self.first_position(start, 0) + steps * self.global_batch_size
            positions = first_positions[:, None] + np.arange(size)
            if self.tail == "pad":
                # Wraps around, several times if the order is shorter than a global batch.
                positions %= self.num_samples
            # rows after the end of the order, which the tail "uneven" cuts off below
            positions = np.minimum(positions, self.num_samples - 1)
            samples = order.samples(positions.reshape(-1)).reshape(-1, size)
            for step, row in zip(steps.tolist(), samples, strict=True):
                if self.tail == "pad":
                    yield row
                else:
                    yield row[: self.num_valid(start, step)]


def check_tail(tail: str) -> None:
    """Raise unless `tail` is one of `TAILS`."""
    one_of("tail", tail, TAILS, DataError)
