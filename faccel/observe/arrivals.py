"""How much later than the first rank each rank begins the collectives of a group."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from faccel.observe.snapshot import Snapshot


@attrs.frozen
class Delays:
    """How late one rank was.

    Args:
        total_s: The sum of its delays.
        num_collectives: Over how many collectives.
    """

    total_s: float = 0.0
    num_collectives: int = 0


def delays_of(rank: int, snapshots: Mapping[int, Snapshot]) -> Delays:
    """Return how much later than the first rank of its group a rank began its collectives.

    All ranks leave a collective together, so a delay is what the rank has lost since the previous
    one, whatever it did. Clocks of one node are comparable. Only the window counts.

    Effects: pure.
    """
    delays = Delays()
    snapshot = snapshots[rank]
    # Older arrivals are of another part of the run, such as its slow first step.
    start_s = snapshot.moments[0].time_s
    for name, group in snapshot.groups.items():
        peers = _arrivals(name, snapshots)
        if group.has_messages or len(peers) < 2:
            continue
        for number, time_s in group.arrivals.items():
            # The recorder of a rank that is ahead may have dropped the collective already.
            times = [arrivals[number] for arrivals in peers if number in arrivals]
            if time_s >= start_s and len(times) == len(peers):
                total_s = delays.total_s + time_s - min(times)
                delays = Delays(total_s, delays.num_collectives + 1)
    return delays


def _arrivals(name: str, snapshots: Mapping[int, Snapshot]) -> list[Mapping[int, float]]:
    """Return the arrivals of each rank that has this group."""
    groups = [snapshot.groups.get(name) for snapshot in snapshots.values()]
    return [group.arrivals for group in groups if group is not None]


def num_repeated(snapshot: Snapshot) -> int:
    """Return how many of a rank's last collectives have come earlier, in the same order of groups.

    A training loop repeats itself. A rank that has skipped a collective breaks the order with its
    next one, and the others have repeated a step up to the one in which they wait.

    Effects: pure.
    """
    calls: list[tuple[float, str]] = []
    for name, group in snapshot.groups.items():
        calls += [(time_s, name) for time_s in group.arrivals.values()]
    names = [name for _, name in sorted(calls)]
    longest = 0
    # The longest end of the order that is also the end of a part of it before.
    for end in range(1, len(names)):
        length = 0
        while length < end and names[end - 1 - length] == names[-1 - length]:
            length += 1
        longest = max(longest, length)
    return longest
