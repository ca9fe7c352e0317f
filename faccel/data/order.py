"""The order of an epoch as pure arithmetic on integers: no tensor, no file, no state.

`N` samples, `B` rows per batch and rank, `W` ranks that read different data, `G = B * W`. An epoch
has one global order, which maps each position to a sample. Starting at `c` samples, step `s` of
rank `r` reads the positions `c + s*G + r*B ... c + s*G + (r+1)*B - 1`. The rows of a last step of
fewer than `G` samples are divided evenly.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import attrs
import numpy as np

from faccel.checks import one_of
from faccel.comm.row_count import RowCount
from faccel.errors import DataError
from faccel.random.hashing import mix
from faccel.tree import Tree

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
_Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

TAILS = ("drop", "full", "pad", "uneven")

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
class Rows:
    """The rows of one rank in one step, as offsets from the first row of the step.

    Args:
        begin: Offset of the rank's first row.
        num_valid: Number of rows that are not repeats, from `begin` on.
        repeat: Number of repeats of the step that are on the ranks before this one, which is the
            position in the order of its first repeated sample.
        num_repeats: Number of repeats after the valid rows.
    """

    begin: int
    num_valid: int
    repeat: int
    num_repeats: int


def divide_rows(num_rows: int, batch_size: int, rank: int, world_size: int, tail: str) -> Rows:
    """Divide the `num_rows` rows of a step over the ranks, evenly and in the order of the ranks.

    Effects: pure.

    Args:
        num_rows: Rows of the step, from 1 to `batch_size * world_size`.
        batch_size: `B`.
        rank: `r`.
        world_size: `W`.
        tail: As in `ShardPlan`; "drop" is read as "pad", because it has full steps only.

    Examples:
        >>> [divide_rows(5, 4, rank, 3, "pad") for rank in (0, 2)]
        [Rows(begin=0, num_valid=2, repeat=0, num_repeats=0), \
Rows(begin=4, num_valid=1, repeat=0, num_repeats=1)]
    """
    if tail == "full":
        # Ranks are filled one after the other; row `num_rows + i` of the step is repeat number `i`.
        begin = rank * batch_size
        num_valid = min(max(0, num_rows - begin), batch_size)
        return Rows(begin, num_valid, max(0, begin - num_rows), batch_size - num_valid)
    # The first `num_larger` ranks have one row more, and each of the others repeats one sample.
    size, num_larger = divmod(num_rows, world_size)
    begin = rank * size + min(rank, num_larger)
    if rank < num_larger:
        return Rows(begin, size + 1, 0, 0)
    num_repeats = 0
    if num_larger and tail != "uneven":
        num_repeats = 1
    return Rows(begin, size, rank - num_larger, num_repeats)


@attrs.frozen
class ShardPlan:
    """How one rank reads an epoch, as arithmetic.

    Args:
        num_samples: `N`.
        batch_size: `B`, rows per batch on this rank.
        rank: `r`, this rank among those that read different data.
        world_size: `W`.
        tail: For a last step of fewer than `G` samples. `"pad"`: ranks have equally many rows, for
            which fewer than `W` samples repeat from the start of the order. `"full"`: samples
            repeat until each rank has `B` rows. `"drop"`: no such step. `"uneven"`: no repeats;
            ranks differ by one row.
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
        num_left = max(0, self.num_samples - start)
        num_full, num_rows = divmod(num_left, self.global_batch_size)
        return num_full + self._has_rows(num_rows)

    def _has_rows(self, num_rows: int) -> bool:
        """Return whether this rank takes part in a last step of `num_rows < G` samples."""
        if self.tail == "drop":
            return False
        if self.tail == "uneven":
            # From `W` rows on each rank has one, and below the first `num_rows` ranks.
            return self.rank < num_rows
        return num_rows > 0

    def _step_rows(self, start: int, step: int) -> tuple[int, Rows]:
        """Return the position of the first row of a step, and this rank's rows."""
        first = start + step * self.global_batch_size
        num_rows = min(max(0, self.num_samples - first), self.global_batch_size)
        rows = divide_rows(num_rows, self.batch_size, self.rank, self.world_size, self.tail)
        return first, rows

    def first_position(self, start: int, step: int) -> int:
        """Return the position of the first row of batch `step`; after the order for a repeat."""
        first = start + step * self.global_batch_size
        if first + self.global_batch_size <= self.num_samples:
            return first + self.rank * self.batch_size
        rows = self._step_rows(start, step)[1]
        if rows.num_valid:
            return first + rows.begin
        # Ranks with repeats only need different positions, too: they seed random augmentation.
        return max(first, self.num_samples) + rows.repeat

    def num_valid(self, start: int, step: int) -> int:
        """Return the number of rows of batch `step` that are not repeats."""
        return self._step_rows(start, step)[1].num_valid

    def row_count(self, start: int, step: int) -> int:
        """Return `num_valid`, for a partial step with the largest number of all ranks."""
        first = start + step * self.global_batch_size
        if first + self.global_batch_size <= self.num_samples:
            return self.batch_size
        # Rank 0 is filled first: it has the most valid rows.
        largest = attrs.evolve(self, rank=0).num_valid(start, step)
        return RowCount(self.num_valid(start, step), largest)

    def consumed(self, start: int, step: int) -> int:
        """Return the samples that all ranks have consumed after batch `step`, at most `N`."""
        return min(start + (step + 1) * self.global_batch_size, self.num_samples)

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
        num_left = max(0, self.num_samples - start)
        num_full, num_rows = divmod(num_left, self.global_batch_size)
        steps_at_once = max(1, _CHUNK // self.batch_size)
        # In each chunk: positions `int64[steps, B]`, `c + s*G + r*B + i` for step `s` and row `i`.
        first_position = start + self.rank * self.batch_size
        for first in range(0, num_full, steps_at_once):
            steps = np.arange(first, min(first + steps_at_once, num_full), dtype=np.int64)
            first_positions = first_position + steps * self.global_batch_size
            positions = first_positions[:, None] + np.arange(self.batch_size)
            yield from order.samples(positions.reshape(-1)).reshape(-1, self.batch_size)
        if self._has_rows(num_rows):
            yield order.samples(self._last_positions(start, num_full))

    def _last_positions(self, start: int, step: int) -> Ints:
        """Return the positions of a last step of fewer than `G` samples: valid rows, repeats."""
        first, rows = self._step_rows(start, step)
        valid = first + rows.begin + np.arange(rows.num_valid, dtype=np.int64)
        # Wraps around, several times if the order is shorter than the repeats of a full batch.
        repeats = (rows.repeat + np.arange(rows.num_repeats, dtype=np.int64)) % self.num_samples
        return np.concatenate([valid, repeats])


def check_tail(tail: str) -> None:
    """Raise unless `tail` is one of `TAILS`."""
    one_of("tail", tail, TAILS, DataError)
