"""What one rank reports about itself over a short window: stacks, collectives, and pauses."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

ANSWERED = "answered"
SILENT = "silent"
DEAD = "dead"
FAILED = "failed"
CONSEQUENCE = "failed after another rank"
FINISHED = "finished"
MISSING = "missing"
REMOTE = "remote"
"""The process runs on another node, whose `faccel why` asks it."""
FOREIGN = "foreign"
"""The process belongs to another user, and its socket cannot be opened."""

_MAX_CPU_LOAD = 0.1  # a thread that waits needs none of the CPU, one that computes all of it


@attrs.frozen
class Frame:
    """A frame of a Python stack.

    Args:
        file: Path of the source, relative to where the process started.
        line: Number of the line.
        function: Name of the function.
        is_user: Whether it is code of neither torch, faccel nor Python's library.
    """

    file: str
    line: int
    function: str
    is_user: bool

    @property
    def site(self) -> str:
        """The frame as `file:line`."""
        return f"{self.file}:{self.line}"


Stack = tuple[Frame, ...]
"""Frames, innermost first."""


@attrs.frozen
class Moment:
    """The thread that trains, at one time.

    Args:
        time_s: The time, in seconds since 1970.
        stack: Its stack.
        numbers: By process group, how many collectives the rank has begun.
        cpu_load: Which part of the time since the previous moment it computed.
        in_collector: Whether Python's garbage collector runs.
    """

    time_s: float
    stack: Stack
    numbers: Mapping[str, int]
    cpu_load: float = 0.0
    in_collector: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether the thread waits and does not compute."""
        return self.cpu_load < _MAX_CPU_LOAD


@attrs.frozen
class Group:
    """A process group, as one rank sees it.

    Args:
        ranks: Its ranks of the world.
        axis: The axis of the mesh, empty for another group.
        op: Its last collective, such as `"all_reduce"`; empty where PyTorch did not record it.
        is_pending: Whether that has begun and not ended.
        arrivals: By number of a collective, when this rank began it, in seconds since 1970.
        has_messages: Whether it has messages of two ranks, which are counted as collectives.
    """

    ranks: tuple[int, ...]
    axis: str = ""
    op: str = ""
    is_pending: bool = False
    arrivals: Mapping[int, float] = attrs.field(factory=dict)
    has_messages: bool = False


@attrs.frozen
class Snapshot:
    """One rank.

    Args:
        rank: Its rank.
        status: `ANSWERED`, or why it has not answered.
        reason: A clause about that status, such as the error of a rank that failed.
        host: Its node.
        pid: Its process.
        coordinates: Its index on each axis of the mesh.
        moments: What it did during the window, oldest first.
        groups: Its process groups.
        pauses: When the garbage collector ran for long: starts and ends.
        step: How many updates it has finished.
        loader: The state of its loaders, in a clause.
        threads: The stacks of its other threads by name.
        time_s: When it ended; 0 for a rank that runs.
    """

    rank: int
    status: str = ANSWERED
    reason: str = ""
    host: str = ""
    pid: int = 0
    coordinates: Mapping[str, int] = attrs.field(factory=dict)
    moments: Sequence[Moment] = ()
    groups: Mapping[str, Group] = attrs.field(factory=dict)
    pauses: Sequence[tuple[float, float]] = ()
    step: int = 0
    loader: str = ""
    threads: Mapping[str, Stack] = attrs.field(factory=dict)
    time_s: float = 0.0

    def at(self, time_s: float) -> Moment | None:
        """Return the newest moment that is not later than a time, None if there is none."""
        times = [moment.time_s for moment in self.moments]
        index = bisect.bisect_right(times, time_s)
        if not index:
            return None
        moment = self.moments[index - 1]
        # The collector keeps the interpreter: while it runs, there are no moments of this process.
        for start_s, end_s in self.pauses:
            if start_s <= time_s <= end_s:
                return attrs.evolve(moment, in_collector=True)
        return moment

    @property
    def has_moved(self) -> bool:
        """Whether the rank has begun a collective during the window."""
        return len({tuple(sorted(moment.numbers.items())) for moment in self.moments}) > 1


def from_answer(answer: Mapping[str, Any], identity: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot of a rank from what its process has sent.

    Effects: pure.

    Args:
        answer: The answer of `Observer`.
        identity: The rank's file in the run folder.
    """
    stacks = [_to_stack(frames) for frames in answer["stacks"]]
    moments: list[Moment] = []
    for time_s, stack, numbers, cpu_load, in_collector in answer["moments"]:
        # The tables keep the answer small: most moments have the stack of an earlier one.
        moment = Moment(time_s, stacks[stack], answer["numbers"][numbers], cpu_load, in_collector)
        moments.append(moment)
    groups: dict[str, Group] = {}
    for name, values in answer["groups"].items():
        # JSON has neither tuples nor numbers as keys.
        arrivals = {int(number): time_s for number, time_s in values["arrivals"].items()}
        groups[name] = Group(
            ranks=tuple(values["ranks"]),
            axis=values["axis"],
            op=values["op"],
            is_pending=values["is_pending"],
            arrivals=arrivals,
            has_messages=values["has_messages"],
        )
    return Snapshot(
        rank=identity["rank"],
        host=identity["host"],
        pid=identity["pid"],
        coordinates=identity["coordinates"],
        moments=moments,
        groups=groups,
        pauses=[(start_s, end_s) for start_s, end_s in answer["pauses"]],
        step=answer["step"],
        loader=answer["loader"],
        threads={name: _to_stack(frames) for name, frames in answer["threads"].items()},
    )


def _to_stack(frames: Sequence[Sequence[Any]]) -> Stack:
    return tuple(Frame(*values) for values in frames)
