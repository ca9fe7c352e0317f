"""A rank of a process group of a simulated world: its identity, its trace, and its messages."""

# pyright: reportIncompatibleMethodOverride=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from faccel.call_site import call_site
from faccel.errors import WorldError
from faccel.parallel.eager_code import methods_without_graphs
from faccel.testing.reductions import copy, message_error
from faccel.testing.work import SimulatedWork
from faccel.testing.world import Channel, TraceEvent, World

_Tensors = list[torch.Tensor]


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
        self._world.messages.setdefault(channel, []).append(tensors[0].detach().clone())
        return SimulatedWork(lambda: None, tensors)

    def recv(self, tensors: _Tensors, src: int, tag: int = 0) -> SimulatedWork:
        return self._receive(tensors, [src], tag, f"recv from {self._ranks[src]}")

    def recv_anysource(self, tensors: _Tensors, tag: int = 0) -> SimulatedWork:
        return self._receive(tensors, range(self.size()), tag, "recv from any rank")

    def _receive(
        self, tensors: _Tensors, sources: Sequence[int], tag: int, action: str
    ) -> SimulatedWork:
        world, rank = self._world, self._world_rank
        site = self._record("recv", [])
        queues: dict[int, list[torch.Tensor]] = {}
        for source in sources:
            channel = Channel(self._key, source, self._group_rank, tag)
            queues[source] = world.messages.setdefault(channel, [])
        work = SimulatedWork(lambda: wait(), tensors)

        def wait() -> None:
            if work.source_rank is not None:  # `wait` may be called again
                return
            senders = {self._ranks[source] for source in sources}
            doing = f"{action} at {site}"
            world.wait(rank, lambda: any(queues.values()), lambda: senders, doing)
            group_source = next(source for source, queue in queues.items() if queue)
            work.source_rank = group_source
            message, source = queues[group_source].pop(0), self._ranks[group_source]
            # As bytes: the pipelines of PyTorch 2.11 receive `float32[]` into `float32[1]`.
            if (message.dtype, message.numel()) != (tensors[0].dtype, tensors[0].numel()):
                error = message_error(message, tensors[0], source, rank, site)
                raise world.scheduler.fail(error)
            copy(tensors[0], message.view(tensors[0].shape))

        return work
