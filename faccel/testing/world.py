"""What the ranks of a simulation share: where they meet, what is on its way, what goes wrong, what happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist

from faccel.errors import DesyncError
from faccel.testing.scheduler import Scheduler


@attrs.frozen
class TraceEvent:
    """One call of a collective by one rank.

    Args:
        rank: Who, in the world.
        op: What: `"all_reduce"`, `"all_gather"`, `"broadcast"`, `"send"`, ...
        axis: Over which axis, or the description of the group.
        num_bytes: How much this rank put in.
        site: `file:line` of the user's code that led to it.
    """

    rank: int
    op: str
    axis: str
    num_bytes: int
    site: str


@attrs.frozen
class Fault:
    """Something that goes wrong at one call of a collective.

    Args:
        rank: At which rank of the world.
        collective: At which of its calls, counted from 0 over all groups.
        kind: `"raise"`: the call raises `InjectedError`. `"stall"`: the rank never comes. `"corrupt"`: the first
            element that it puts in becomes NaN (of integers, all bits flip).
    """

    rank: int
    collective: int
    kind: str = attrs.field(validator=attrs.validators.in_(("raise", "stall", "corrupt")))


class InjectedError(RuntimeError):
    """What a `Fault` of kind `"raise"` raises."""


class World:
    """What the ranks of one simulation share.

    Args:
        baton: Who runs.
        faults: What goes wrong.
    """

    def __init__(self, baton: Scheduler, faults: Sequence[Fault] = ()) -> None:
        self.baton = baton
        self.faults = {(fault.rank, fault.collective): fault for fault in faults}
        self.num_calls: dict[int, int] = {}
        self.slots: dict[Any, Slot] = {}
        self.mail: dict[Any, list[torch.Tensor]] = {}
        self.keys: dict[str, bytes] = {}
        self.trace: list[TraceEvent] = []
        self.stores: list[dist.Store] = []  # torch keeps only the C++ half of a store alive

    def check_done(self) -> None:
        """Raise where something was begun that nobody finished."""
        open_calls = [
            f"rank {slot.rank}: {slot.what} at {slot.site}" for slot in self.slots.values()
        ]
        unread = [
            f"rank {box[1]} to rank {box[2]}: a message"
            for box, letters in self.mail.items()
            if letters
        ]
        if open_calls or unread:
            raise DesyncError(
                "the ranks returned while a collective was open",
                got=", ".join(open_calls + unread),
                fix="call it on every rank, and receive every message",
            )


class Slot:
    """One collective of one group: where its ranks meet."""

    def __init__(self, what: str, site: str, rank: int) -> None:
        self.what, self.site, self.rank = what, site, rank
        self.parts: dict[int, Any] = {}
        self.is_done = False
