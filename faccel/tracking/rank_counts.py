"""The counts of a rank as integers, and the rates of all ranks that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from operator import mul
from typing import Generic, NamedTuple, TypeVar

import attrs

from faccel.tracking.memory_categories import PeakMemory

T = TypeVar("T")
UNKNOWN = -1
"""In place of a count that a rank cannot measure. All others are at least 0."""

_NS_PER_S = 10**9
# A rank is slow if it delays the others by this part of a step; less is noise.
_SLOW_PART = 0.05


class RankCounts(NamedTuple, Generic[T]):
    """What a rank contributes to `rates`, as integers: of the last steps, then totals.

    Of several ranks, each field is a tuple.
    """

    window_ns: T
    num_steps: T
    num_samples: T
    num_tokens: T
    data_ns: T
    comm_ns: T
    peak_bytes: T
    peak_flops: T
    flops_per_sample: T
    total_steps: T
    total_samples: T
    total_tokens: T
    parameter_bytes: T
    gradient_bytes: T
    optimizer_bytes: T
    activation_bytes: T


@attrs.frozen
class Rates:
    """Throughput and waits of all ranks over the last steps; equal on all ranks.

    A value is None where it is unknown: all of them before the first step after the warm-up.

    Args:
        samples_s: Samples per second, summed over the data ranks.
        tokens_s: Tokens per second, summed over the data ranks.
        steps_s: Steps per second.
        mfu: Model FLOPs utilization: the part of the peak of all devices that the model used. None
            without `flops_per_sample`, or for a device without a published peak.
        peak_bytes: The most memory that a rank has used on its device; on the CPU, the largest
            resident size of a process.
        data_wait: The part of the time in which a rank waited for `next` of a loader of `shard`,
            between 0 and 1; the largest of any rank. None if no rank has read from one.
        comm_wait: The part of the time in which a rank waited in faccel's collectives on the CPU;
            the largest of any rank. None on an accelerator, where the host does not wait.
        slowest_rank: The rank that the others wait for, if it delays them by 5 % of a step or more.
        num_steps: Steps since `init_meter`.
        num_samples: Samples since `init_meter`, summed over the data ranks.
        num_tokens: Tokens since `init_meter`, summed over the data ranks.
        memory: What the memory of a device is used for at its peak, on the rank with the highest
            peak; where peaks are unknown, as on the CPU, on the rank with the most parameters,
            gradients and optimizer states. None without `state`.
    """

    samples_s: float | None
    tokens_s: float | None
    steps_s: float | None
    mfu: float | None
    peak_bytes: int | None
    data_wait: float | None
    comm_wait: float | None
    slowest_rank: int | None
    num_steps: int
    num_samples: int
    num_tokens: int
    memory: PeakMemory | None = None

    def known(self) -> dict[str, float]:
        """Return the values that are not None by name, for `log`.

        Those of `memory` are `memory_parameters` and so on.
        """
        values: dict[str, float] = {}
        for name in _RATES:
            value = getattr(self, name)
            if value is not None:
                values[name] = value
        if self.memory is not None:
            for name, value in attrs.asdict(self.memory).items():
                if value is not None:
                    values[f"memory_{name}"] = value
        return values


_RATES = tuple(field.name for field in attrs.fields(Rates) if field.name != "memory")


def nanoseconds(seconds: float) -> int:
    """Return seconds as a count, whose sums are exact.

    Effects: pure.
    """
    return round(seconds * _NS_PER_S)


def or_unknown(value: float | None) -> int:
    """Return a value as a count; UNKNOWN for None.

    Effects: pure.
    """
    if value is None:
        return UNKNOWN
    return round(value)


def combined(rows: Sequence[Sequence[int]], first_of_replicas: Sequence[int]) -> Rates:
    """Return the rates of all ranks.

    Effects: pure.

    Args:
        rows: The `RankCounts` of each rank.
        first_of_replicas: One rank of each model replica: the others have the same samples.
    """
    # Integers up to here, so that sums are exact for any number of samples and tokens. Not arrays:
    # for a few ranks a sum of an array takes longer.
    columns = _columns(rows)
    replicas = columns
    if len(first_of_replicas) != len(rows):
        replicas = _columns([rows[rank] for rank in first_of_replicas])
    # The longest window: ranks enter `rates` at the pace of the slowest one.
    window_s = max(columns.window_ns) / _NS_PER_S
    num_steps = max(columns.num_steps)
    samples_s = tokens_s = steps_s = mfu = data_wait = comm_wait = None
    if num_steps and window_s:
        samples_s = sum(replicas.num_samples) / window_s
        tokens_s = sum(replicas.num_tokens) / window_s
        steps_s = num_steps / window_s
        mfu = _utilization(columns, replicas, window_s)
        data_wait = _largest_part(columns.data_ns, columns.window_ns)
        comm_wait = _largest_part(columns.comm_ns, columns.window_ns)
    return Rates(
        samples_s=samples_s,
        tokens_s=tokens_s,
        steps_s=steps_s,
        mfu=mfu,
        peak_bytes=_or_none(max(columns.peak_bytes)),
        data_wait=data_wait,
        comm_wait=comm_wait,
        slowest_rank=_slowest(columns),
        num_steps=max(columns.total_steps),
        num_samples=sum(replicas.total_samples),
        num_tokens=sum(replicas.total_tokens),
        memory=_largest_memory(rows, columns),
    )


def _largest_memory(
    rows: Sequence[Sequence[int]], columns: RankCounts[tuple[int, ...]]
) -> PeakMemory | None:
    """Return the memory of the rank that has most of it."""
    if max(columns.parameter_bytes) == UNKNOWN:
        return None
    memories: list[PeakMemory] = []
    for count in starmap(RankCounts, rows):
        # A rank may have dropped its models already.
        if count.parameter_bytes == UNKNOWN:
            continue
        peak = None
        if count.activation_bytes != UNKNOWN:  # the peak of the device, not of the process
            peak = _or_none(count.peak_bytes)
        activations = _or_none(count.activation_bytes)
        sizes = (count.parameter_bytes, count.gradient_bytes, count.optimizer_bytes)
        memories.append(PeakMemory(*sizes, activations, peak))
    return max(memories, key=_size, default=None)


def _size(memory: PeakMemory) -> int:
    if memory.peak is not None:
        return memory.peak
    return memory.parameters + memory.gradients + memory.optimizer


def _columns(rows: Sequence[Sequence[int]]) -> RankCounts[tuple[int, ...]]:
    return RankCounts(*zip(*rows, strict=True))


def _utilization(
    columns: RankCounts[tuple[int, ...]], replicas: RankCounts[tuple[int, ...]], window_s: float
) -> float | None:
    # One device without a peak would make the others look better than they are.
    if UNKNOWN in columns.peak_flops or UNKNOWN in columns.flops_per_sample:
        return None
    done = sum(map(mul, replicas.num_samples, replicas.flops_per_sample))
    return done / (sum(columns.peak_flops) * window_s)


def _or_none(count: int) -> int | None:
    if count == UNKNOWN:
        return None
    return count


def _largest_part(waits_ns: Sequence[int], windows_ns: Sequence[int]) -> float | None:
    """Return the largest part of its time that a rank has waited; None if no rank has measured."""
    if max(waits_ns) == UNKNOWN:
        return None
    # At least 1: a rank may have no step yet.
    pairs = zip(waits_ns, windows_ns, strict=True)
    return max(max(wait_ns, 0) / max(window_ns, 1) for wait_ns, window_ns in pairs)


def _slowest(columns: RankCounts[tuple[int, ...]]) -> int | None:
    """Return the rank that waits longest for data and shortest for the other ranks.

    A step takes equally long on all ranks, because they wait for each other: only the waits differ.
    """
    # A delay in data is seen on the rank itself, any other one by the waits of the other ranks.
    waits_ns = zip(columns.data_ns, columns.comm_ns, strict=True)
    delays_ns = [max(data_ns, 0) - max(comm_ns, 0) for data_ns, comm_ns in waits_ns]
    threshold_ns = _SLOW_PART * max(columns.window_ns)
    if max(delays_ns) - min(delays_ns) <= threshold_ns:
        return None
    return delays_ns.index(max(delays_ns))
