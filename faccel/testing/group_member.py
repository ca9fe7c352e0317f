"""A rank of a process group of a simulated world: its identity, its trace, and its messages."""

# pyright: reportIncompatibleMethodOverride=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import attrs
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from faccel.call_site import call_site
from faccel.errors import WorldError
from faccel.parallel.eager_code import methods_without_graphs
from faccel.testing.reductions import copy, message_error
from faccel.testing.work import SimulatedWork
from faccel.testing.world import Channel, Mailbox, TraceEvent, World

_Tensors = list[torch.Tensor]


@attrs.frozen(eq=False)
class _Arrived:
    """A message that can be received.

    Args:
        mailbox: Where it is.
        number: Its number there.
        source: Its sender, as a rank of the group.
    """

    mailbox: Mailbox
    number: int
    source: int


@methods_without_graphs
class GroupMember(dist.ProcessGroup):
    """A rank of a group: what its collectives and its messages have in common.

    Args:
        world: The simulation.
        key: Identity of the group, equal on all its ranks.
        ranks: The ranks of the group, as ranks of the world.
        rank: This rank, as a rank of the group.
    """

    def __init__(self, world: World, key: Hashable, ranks: Sequence[int], rank: int) -> None:
        super().__init__(rank, len(ranks))
        self._world = world
        self._key = key
        self._ranks = tuple(ranks)
        self._group_rank = rank
        self._num_calls = 0
        self._num_renewals = world.num_renewals

    def size(self) -> int:
        return len(self._ranks)

    def rank(self) -> int:
        return self._group_rank

    @property
    def group_name(self) -> str:
        """Its name in PyTorch's registry, which C++ sets only for groups with a C++ backend."""
        return c10d._world.pg_names[self]  # pyright: ignore[reportPrivateUsage]

    @property
    def axis(self) -> str:
        """Its name in the trace: the mesh axis, or PyTorch's description of the group."""
        if self.group_desc == "default_pg":
            return "world"
        return self.group_desc.removeprefix("mesh_")

    @property
    def _world_rank(self) -> int:
        return self._ranks[self._group_rank]

    def _record(self, op: str, tensors: Sequence[torch.Tensor]) -> str:
        """Add a call to the trace and inject its fault; return the call site."""
        self._world.scheduler.check_user(self._world_rank, op)
        if self._world.scheduler.is_finished:
            raise WorldError(
                "the simulation of this context has ended",
                got=f"{op} after `simulate` returned",
                fix="call it inside the function that `simulate` runs",
            )
        site = call_site()
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        event = TraceEvent(self._world_rank, op, self.axis, num_bytes, site)
        self._world.trace.append(event)
        self._world.inject_fault(self._world_rank, op, tensors, site)
        return site

    def send(self, tensors: _Tensors, dst: int, tag: int = 0) -> SimulatedWork:
        # Sends never wait, as with a buffer of unlimited size.
        self._record("send", tensors)
        channel = Channel(self._key, self._group_rank, dst, tag)
        # A copy: the sender may change its tensor before the receiver reads it.
        self._world.mailboxes.setdefault(channel, Mailbox()).put(tensors[0].detach().clone())
        return SimulatedWork(lambda: None, tensors)

    def recv(self, tensors: _Tensors, src: int, tag: int = 0) -> SimulatedWork:
        mailbox = self._mailbox(src, tag)
        # Now and not in `wait`: receives may be waited for in another order.
        number = mailbox.next_number()

        def find() -> _Arrived | None:
            if number not in mailbox.messages:
                return None
            return _Arrived(mailbox, number, src)

        return self._receive(tensors, [src], find, f"recv from {self._ranks[src]}")

    def recv_anysource(self, tensors: _Tensors, tag: int = 0) -> SimulatedWork:
        sources = range(self.size())
        mailboxes = [self._mailbox(source, tag) for source in sources]

        def find() -> _Arrived | None:
            for source, mailbox in enumerate(mailboxes):
                # Earlier ones are for the receives that name their sender.
                if mailbox.num_receives in mailbox.messages:
                    return _Arrived(mailbox, mailbox.num_receives, source)
            return None

        return self._receive(tensors, sources, find, "recv from any rank")

    def _mailbox(self, source: int, tag: int) -> Mailbox:
        channel = Channel(self._key, source, self._group_rank, tag)
        return self._world.mailboxes.setdefault(channel, Mailbox())

    def _receive(
        self,
        tensors: _Tensors,
        sources: Sequence[int],
        find: Callable[[], _Arrived | None],
        action: str,
    ) -> SimulatedWork:
        """Return a handle that waits until `find` returns a message."""
        world, rank = self._world, self._world_rank
        site = self._record("recv", [])
        work = SimulatedWork(lambda: wait(), tensors)

        def wait() -> None:
            if work.source_rank is not None:  # `wait` may be called again
                return
            senders = {self._ranks[source] for source in sources}
            world.wait(rank, lambda: find() is not None, lambda: senders, f"{action} at {site}")
            arrived = find()
            assert arrived is not None
            work.source_rank, source = arrived.source, self._ranks[arrived.source]
            message = arrived.mailbox.take(arrived.number)
            # As bytes: the pipelines of PyTorch 2.11 receive `float32[]` into `float32[1]`.
            if (message.dtype, message.numel()) != (tensors[0].dtype, tensors[0].numel()):
                error = message_error(message, tensors[0], source, rank, site)
                raise world.scheduler.fail(error)
            copy(tensors[0], message.view(tensors[0].shape))

        return work
