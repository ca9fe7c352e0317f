"""How much later than the first rank each rank begins the collectives of a group."""

from __future__ import annotations

from collections.abc import Mapping

from faccel.observe.snapshot import Snapshot


def mean_delays(snapshots: Mapping[int, Snapshot]) -> dict[int, float]:
    """Return the mean delay of each rank in seconds, over the collectives that all have recorded.

    All ranks leave a collective together, so a delay is what the rank has lost since the previous
    one, whatever it did. Clocks of one node are comparable.

    Effects: pure.
    """
    delays: dict[int, list[float]] = {rank: [] for rank in snapshots}
    names = {name for snapshot in snapshots.values() for name in snapshot.groups}
    for name in names:
        arrivals: dict[int, Mapping[int, float]] = {}
        for rank, snapshot in snapshots.items():
            group = snapshot.groups.get(name)
            if group is not None and not group.has_messages:
                arrivals[rank] = group.arrivals
        for number in _common_numbers(arrivals):
            first_s = min(times[number] for times in arrivals.values())
            for rank, times in arrivals.items():
                delays[rank].append(times[number] - first_s)
    means: dict[int, float] = {}
    for rank, values in delays.items():
        if values:
            means[rank] = sum(values) / len(values)
    return means


def _common_numbers(arrivals: Mapping[int, Mapping[int, float]]) -> set[int]:
    if len(arrivals) < 2:
        return set()
    return set.intersection(*(set(times) for times in arrivals.values()))
