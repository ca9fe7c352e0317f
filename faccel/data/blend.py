"""Several datasets in exact proportions."""

from __future__ import annotations

import functools
import heapq
import math
import operator
import sys
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

import attrs
import numpy as np

from faccel.data.order import permute
from faccel.data.packed_tokens import check_seed
from faccel.errors import DataError, short_repr
from faccel.random.hashing import mix
from faccel.tree import Tree

MAX_PERIOD = 10**6
"""The largest period of a blend, whose table is computed once, in about two seconds."""


@attrs.frozen(eq=False)
class _Period:
    """The samples of one period, after which the proportions are exact and the order repeats.

    Args:
        counts: Samples of each dataset in a period.
        datasets: `int32[period]`, the dataset of each sample.
        positions: `int32[period]`, how many samples of its dataset are before it in the period.
    """

    counts: tuple[int, ...]
    datasets: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]


@attrs.frozen(cache_hash=True)
class _Proportions:
    """How many samples of each dataset a period has: a key whose hash takes constant time."""

    counts: tuple[int, ...]


@functools.lru_cache(maxsize=8)
def _period_of(proportions: _Proportions) -> _Period:
    """Return the period in which dataset `d` has `counts[d]` samples.

    After `n` samples dataset `d` must have `floor(w*n)` or `ceil(w*n)`, where `w` is its weight
    (the chairman assignment problem, Tijdeman 1980). So its sample number `j` has a window of
    slots, from `floor(j/w)` to `ceil((j+1)/w) - 1`. Such windows always have a schedule, and the
    earliest deadline first finds it (Steiner and Yeomans 1993).
    """
    counts = proportions.counts
    period = sum(counts)
    datasets = np.empty(period, np.int32)
    positions = np.empty(period, np.int32)
    released: list[list[int]] = [[] for _ in range(period)]  # datasets, by the first slot
    for dataset, count in enumerate(counts):
        for position in range(count):
            released[position * period // count].append(dataset)
    next_positions = [0] * len(counts)
    waiting: list[tuple[int, int, int, int]] = []
    for slot, arrivals in enumerate(released):
        for dataset in arrivals:
            position = next_positions[dataset]
            next_positions[dataset] += 1
            deadline = -(-(position + 1) * period // counts[dataset])
            # Of equal deadlines the one that has waited longer, for an even mixture.
            heapq.heappush(waiting, (deadline, slot, dataset, position))
        _, _, datasets[slot], positions[slot] = heapq.heappop(waiting)
    return _Period(counts, datasets, positions)


def _counts_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest integers in the proportions of the weights."""
    # By their decimal digits: 0.1 is one tenth, and not the nearest binary fraction.
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    numerators = [int(fraction * denominator) for fraction in fractions]
    divisor = math.gcd(*numerators)
    counts = tuple(numerator // divisor for numerator in numerators)
    # A longer period would need more memory; rounding silently would not be exact.
    if sum(counts) > MAX_PERIOD:
        # At least the smallest number of four digits: a weight of 0 is none.
        largest = max(weights)
        rounded = tuple(max(round(weight / largest, 4), 1e-4) for weight in weights)
        raise DataError(
            f"the proportions of `weights` repeat after more than {MAX_PERIOD} samples",
            got=short_repr(tuple(weights)),
            fix=f"round them, as in `weights={rounded}`",
        )
    return counts


def _weights(value: Any) -> tuple[float, ...]:
    weights: tuple[float, ...] = ()
    # Text would be one weight per digit.
    if not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError, OverflowError):
            weights = tuple(float(weight) for weight in value)
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise DataError(
            "`weights` must be positive numbers, one for each dataset",
            got=short_repr(value),
            fix="write `weights=(0.7, 0.3)`",
        )
    return weights


def _datasets(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        datasets = tuple(value)
        if all(hasattr(dataset, "__len__") for dataset in datasets):
            return datasets
    raise DataError(
        "`datasets` must be a list of map-style datasets, which have a length",
        got=short_repr(value),
        fix="write `faccel.data.Blend([first, second], weights=(0.7, 0.3))`",
    )


@attrs.frozen(eq=False)
class Blend:
    """Samples of several datasets in the proportions of their weights.

    After any number `n` of samples, a dataset with the weight `w` has had `floor(w*n)` or
    `ceil(w*n)` of them, if the weights are divided by their sum. Read it in its order, with
    `shuffle=False`. Each dataset is shuffled, again for each time that it is repeated. A sample is
    found in constant time by arithmetic: no index of all samples is built.

    Args:
        datasets: Map-style datasets, such as `PackedTokens`.
        weights: Positive numbers, by their decimal digits. The numbers without a common divisor in
            the same proportions must have a sum of at most 10**6.
        size: Number of samples of an epoch, such as those of the full run. Datasets are repeated as
            needed. None is the most for which no dataset is repeated.
        seed: Of the order in each dataset. None reads each in its order.

    Raises:
        DataError: A dataset is empty, or an argument is invalid.

    Examples:
        >>> blend = Blend([["a"] * 9, ["b"] * 9], weights=(0.75, 0.25), size=8)
        >>> "".join(blend[i] for i in range(8))
        'aabaaaba'
    """

    datasets: Sequence[Any] = attrs.field(converter=_datasets, repr=False)
    weights: tuple[float, ...] = attrs.field(converter=_weights)
    size: int | None = attrs.field(default=None, kw_only=True)
    seed: int | None = attrs.field(default=0, kw_only=True, validator=check_seed)
    _proportions: _Proportions = attrs.field(init=False, repr=False)
    # Once: each sample needs it, and there may be thousands of datasets.
    _length: int = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if len(self.datasets) != len(self.weights):
            raise DataError(
                "`weights` must have one number for each dataset",
                got=f"{len(self.datasets)} datasets, {len(self.weights)} weights",
                fix="write `faccel.data.Blend([first, second], weights=(0.7, 0.3))`",
            )
        # Repeating it gives no sample.
        if not all(len(dataset) for dataset in self.datasets):
            raise DataError(
                "a dataset of a blend is empty",
                got=short_repr([len(dataset) for dataset in self.datasets]),
                fix="leave it out",
            )
        is_int = isinstance(self.size, int) and not isinstance(self.size, bool)
        if self.size is not None and not (is_int and 0 < self.size <= sys.maxsize):
            raise DataError(
                "`size` must be an int of at least 1, and below 2**63",
                got=short_repr(self.size),
                fix="write `size=num_updates * global_batch`",
            )
        object.__setattr__(self, "_proportions", _Proportions(_counts_of(self.weights)))
        object.__setattr__(self, "_length", self._count_samples())

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return self._length

    def _count_samples(self) -> int:
        if self.size is not None:
            return self.size
        counts = self._proportions.counts
        # At most `ceil(w*n)` samples of a dataset are among the first `n`.
        period, pairs = sum(counts), zip(self.datasets, counts, strict=True)
        return min(len(dataset) * period // count for dataset, count in pairs)

    def source_of(self, index: int) -> tuple[int, int]:
        """Return the dataset of a sample, and how many samples of that dataset are before it."""
        period = _period_of(self._proportions)
        repeat, slot = divmod(range(self._length)[operator.index(index)], len(period.datasets))
        dataset = int(period.datasets[slot])
        return dataset, repeat * period.counts[dataset] + int(period.positions[slot])

    def __getitem__(self, index: int) -> Tree:
        """Return one sample."""
        number, position = self.source_of(index)
        dataset = self.datasets[number]
        # A dataset that is repeated has another order each time.
        epoch, position = divmod(position, len(dataset))
        if self.seed is None:
            return dataset[position]
        # Other orders for other datasets, which may have equal lengths.
        seed = mix(self.seed, number)
        (sample,) = permute(np.array([position]), len(dataset), seed, epoch)
        return dataset[int(sample)]
