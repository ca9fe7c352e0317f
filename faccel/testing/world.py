"""The state that the ranks of a simulation share: open collectives, messages, faults, the trace."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import attrs
import torch
import torch.distributed as dist

from faccel.comm.compared_call import ComparedCall
from faccel.errors import DesyncError, RankFailedError
from faccel.testing.scheduler import Scheduler
from faccel.validators import choice

T = TypeVar("T")


@attrs.frozen
class TraceEvent:
    """One call of a collective by one rank.

    Args:
        rank: The rank in the world.
        op: `"all_reduce"`, `"all_gather"`, `"broadcast"`, `"send"`, ...
        axis: The mesh axis, or the description of the group.
        num_bytes: Size of this rank's input.
        site: `file:line` of the call in the user's code.
    """

    rank: int
    op: str
    axis: str
    num_bytes: int
    site: str


@attrs.frozen
class Fault:
    """A fault that a simulation injects into one call of a collective.

    Args:
        rank: Rank of the world that makes the call.
        collective: Index of the call among all calls of this rank, starting at 0.
        kind: `"raise"`: the call raises `InjectedError`. `"stall"`: the rank waits forever.
            `"corrupt"`: the first element of the input becomes NaN (of integers, all bits flip).
    """

    rank: int
    collective: int
    kind: str = attrs.field(validator=choice("raise", "stall", "corrupt"))


class InjectedError(RuntimeError):
    """The exception of a `Fault` of kind `"raise"`."""


def corrupt(tensor: torch.Tensor) -> None:
    """Set the first element to NaN; flip all its bits if it is an integer.

    Effects: updates tensor.
    """
    # The inputs of collectives are contiguous, so this is a view.
    first = tensor.detach().reshape(-1)[:1]
    if first.is_floating_point():
        first.fill_(float("nan"))
    else:
        first.copy_(~first)


class OpenCollective(Generic[T]):
    """A collective of one group that not all ranks have called yet.

    Args:
        call: The call of the first rank, from which those of the others must not differ.
        rank: The first rank, in the world.
    """

    def __init__(self, call: ComparedCall, rank: int) -> None:
        self.call = call
        self.rank = rank
        self.calls: dict[int, ComparedCall] = {}  # by rank in the world
        self.inputs: dict[int, T] = {}  # by rank in the group
        self.is_done = False


@attrs.frozen
class Channel:
    """Identifies the messages from one rank to another.

    Args:
        group: Identity of the process group.
        source: Sender, as a rank of the group.
        target: Receiver, as a rank of the group.
        tag: The tag of `send` and `recv`.
    """

    group: Hashable
    source: int
    target: int
    tag: int


@attrs.define(eq=False)
class Mailbox:
    """The messages of a channel that were not received yet.

    The n-th receive of a channel gets its n-th message, whichever is waited for first: as in gloo
    and NCCL, the order of the calls counts.

    Attributes:
        num_sent: Number of messages that were sent.
        num_receives: Number of receives that were called.
        messages: By their number.
    """

    num_sent: int = 0
    num_receives: int = 0
    messages: dict[int, torch.Tensor] = attrs.field(factory=dict)

    def put(self, message: torch.Tensor) -> None:
        """Append a message."""
        self.messages[self.num_sent] = message
        self.num_sent += 1

    def next_number(self) -> int:
        """Return the number of the message of a new receive."""
        self.num_receives += 1
        return self.num_receives - 1

    def take(self, number: int) -> torch.Tensor:
        """Remove and return a message that has arrived."""
        # That of a receive from any rank gets its number only now.
        self.num_receives = max(self.num_receives, number + 1)
        return self.messages.pop(number)


class World:
    """The state that the ranks of one simulation share.

    Args:
        scheduler: Runs the ranks one at a time.
        faults: Faults to inject.
    """

    def __init__(self, scheduler: Scheduler, faults: Sequence[Fault] = ()) -> None:
        self.scheduler = scheduler
        self.faults = {(fault.rank, fault.collective): fault for fault in faults}
        self.num_calls: dict[int, int] = {}  # of each rank
        # The key of a collective is its group and the number of the call on this group.
        self.collectives: dict[tuple[Hashable, int], OpenCollective[object]] = {}
        self.mailboxes: dict[Channel, Mailbox] = {}
        self.keys: dict[str, bytes] = {}
        self.trace: list[TraceEvent] = []
        # c10d keeps only the C++ half of a store alive, so the Python half is kept here.
        self.stores: list[dist.Store] = []
        # The ranks that have left their collectives after a failure.
        self.interrupted: set[int] = set()
        self.reports: dict[int, dict[int, str]] = {}  # of each failure, by rank
        self.num_renewals = 0

    def inject_fault(self, rank: int, op: str, tensors: Sequence[torch.Tensor], site: str) -> None:
        """Inject the fault of a rank's next call, if it has one. Updates `tensors`.

        Raises:
            InjectedError: The fault is of kind `"raise"`.
        """
        # Counted over all groups of the rank, as `Fault.collective` is.
        index = self.num_calls.get(rank, 0)
        self.num_calls[rank] = index + 1
        fault = self.faults.get((rank, index))
        if fault is None:
            return
        if fault.kind == "raise":
            raise InjectedError(f"rank {rank}, collective {index}: {op} at {site}")
        if fault.kind == "stall":
            # Raises as soon as no other rank can run.
            self.scheduler.wait(rank, lambda: False, f"stalled before {op} at {site}")
        # A barrier has no input to corrupt.
        for tensor in tensors[:1]:
            corrupt(tensor)

    def wait(
        self,
        rank: int,
        is_ready: Callable[[], bool],
        missing: Callable[[], set[int]],
        action: str,
        group: str = "",
    ) -> None:
        """Let other ranks run until `is_ready()`.

        Raises:
            RankFailedError: A rank of `missing()` has left its collectives.
            DesyncError: No rank can run any more.
        """

        def is_over() -> bool:
            return is_ready() or not self.interrupted.isdisjoint(missing())

        self.scheduler.wait(rank, is_over, action, group=group)
        if not is_ready():
            self.check_interrupted(missing())

    def check_interrupted(self, ranks: Iterable[int]) -> None:
        """Raise if one of `ranks` has left its collectives after a failure.

        Raises:
            RankFailedError: It has.
        """
        left = sorted(self.interrupted.intersection(ranks))
        if left:
            raise RankFailedError(
                f"rank {left[0]} failed, or left its collectives because another rank failed",
                fix="fix the error of the rank that failed",
            )

    def renew(self, number: int) -> None:
        """Let all ranks communicate again after failure `number`; the first one drops what is open.

        Effects: updates the world.
        """
        if self.num_renewals < number:
            self.num_renewals = number
            self.interrupted.clear()
            self.collectives.clear()
            self.mailboxes.clear()

    def check_complete(self) -> None:
        """Raise if a collective was not completed or a message was not received.

        Raises:
            DesyncError: Names the rank and the call site.
        """
        incomplete = [f"rank {opened.rank}: {opened.call}" for opened in self.collectives.values()]
        for channel, mailbox in self.mailboxes.items():
            # Also an empty one stays in the table after its messages were received.
            if mailbox.messages:
                incomplete.append(f"rank {channel.source} to rank {channel.target}: a message")
        if incomplete:
            raise DesyncError(
                "the ranks returned before a collective or a message was complete",
                got=", ".join(incomplete),
                fix="call the collective on every rank, and receive every message",
            )
