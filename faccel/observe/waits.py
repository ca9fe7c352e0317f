"""Which rank waits for which other one at a moment, from the numbers of their collectives."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from faccel.observe.phases import (
    BACKWARD,
    COLLECTOR,
    FORWARD,
    OPTIMIZER,
    collective_of,
    phase_of,
    site_of,
)
from faccel.observe.snapshot import Moment, Snapshot


@attrs.frozen
class Activity:
    """What a rank does at a moment.

    Args:
        phase: The phase of training.
        site: The user's line.
        call: The collective in which it waits, empty if it is in none.
        group: The process group of that, empty if it is unknown.
        is_idle: Whether it waits, for whatever reason.
    """

    phase: str
    site: str
    call: str = ""
    group: str = ""
    is_idle: bool = False


@attrs.frozen
class Scene:
    """All ranks at one moment.

    Args:
        activities: What each rank does.
        waits_for: For each rank that waits in a collective, the ranks that have not begun it.
        late: The ranks that have begun fewer collectives of some group than another rank of it.
    """

    activities: Mapping[int, Activity]
    waits_for: Mapping[int, frozenset[int]]
    late: frozenset[int]

    @property
    def causes(self) -> frozenset[int]:
        """The ranks that others wait for, and that wait for no other rank."""
        return frozenset(rank for rank in self.late if not self.waits_for.get(rank))

    @property
    def waiting(self) -> frozenset[int]:
        """The ranks that are in a collective."""
        return frozenset(rank for rank, activity in self.activities.items() if activity.call)


def scene_at(snapshots: Mapping[int, Snapshot], time_s: float) -> Scene | None:
    """Return what the ranks do at a time; None if one of them has no moment yet.

    Effects: pure.

    Args:
        snapshots: Ranks that have answered.
        time_s: Seconds since 1970.
    """
    moments: dict[int, Moment] = {}
    for rank, snapshot in snapshots.items():
        moment = snapshot.at(time_s)
        # A rank without a moment would seem to be late.
        if moment is None:
            return None
        moments[rank] = moment
    ahead = _ahead(snapshots, moments)
    activities: dict[int, Activity] = {}
    waits_for: dict[int, frozenset[int]] = {}
    late: frozenset[int] = frozenset()
    for rank, moment in moments.items():
        # In one group a rank is late, whatever it has begun in its other groups.
        slower = frozenset[int]().union(*ahead[rank].values())
        late |= slower
        activities[rank] = _activity(snapshots[rank], moment, tuple(ahead[rank]))
        if activities[rank].call:
            waits_for[rank] = slower
    return Scene(activities, waits_for, late)


def _ahead(
    snapshots: Mapping[int, Snapshot], moments: Mapping[int, Moment]
) -> dict[int, dict[str, frozenset[int]]]:
    """Return for each rank the groups of which it has begun more collectives than other ranks."""
    ahead: dict[int, dict[str, frozenset[int]]] = {rank: {} for rank in moments}
    for rank, moment in moments.items():
        for name, number in moment.numbers.items():
            fewer = _with_fewer(name, number, moments)
            if fewer and not _has_messages(snapshots[rank], name):
                ahead[rank][name] = fewer
    return ahead


def _has_messages(snapshot: Snapshot, name: str) -> bool:
    group = snapshot.groups.get(name)
    return group is not None and group.has_messages


def _with_fewer(name: str, number: int, moments: Mapping[int, Moment]) -> frozenset[int]:
    """Return the ranks of a group that have begun fewer of its collectives."""
    ranks: list[int] = []
    for rank, moment in moments.items():
        # A rank without the group is in another one, or has not created it yet.
        if moment.numbers.get(name, number) < number:
            ranks.append(rank)
    return frozenset(ranks)


def _activity(snapshot: Snapshot, moment: Moment, groups_ahead: tuple[str, ...]) -> Activity:
    phase = phase_of(moment.stack)
    site = site_of(moment.stack)
    if moment.in_collector:
        return Activity(COLLECTOR, site)
    group = _pending(snapshot, groups_ahead)
    call = collective_of(moment.stack)
    # Below a model or a backward the collective explains more than the function of a hook.
    if call and group and phase in (FORWARD, BACKWARD, OPTIMIZER):
        call = snapshot.groups[group].op or call
    # A line of the user, such as `time.sleep`, waits for no rank.
    is_in_library = bool(moment.stack) and not moment.stack[0].is_user
    # DDP waits for its gradients in C++: no Python frame shows it, only that nothing is computed.
    if not call and groups_ahead and is_in_library and moment.is_idle:
        call = snapshot.groups[group].op or "a collective"
    return Activity(phase, site, call, group, moment.is_idle)


def _pending(snapshot: Snapshot, names_ahead: tuple[str, ...]) -> str:
    """Return the group in whose collective a rank waits, empty if it waits in none."""
    # Those of which it has begun more, or all: a rank that has died has no numbers.
    for name in names_ahead or tuple(snapshot.groups):
        if snapshot.groups[name].is_pending:
            return name
    if names_ahead:
        return names_ahead[0]
    return ""
