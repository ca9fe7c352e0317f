"""The process group of a simulated world: collectives between ranks that are threads.

The last rank that calls a collective computes it for all ranks. The other ranks wait in the
scheduler until it is done.
"""

# pyright: reportIncompatibleMethodOverride=false, reportCallIssue=false, reportAssignmentType=false
# The stubs of c10d list overloads under other names; these are the methods that c10d calls.

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import attrs
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

# Imported before a rank does: its functions have `group=dist.group.WORLD` as a default, which would
# be the default group of the rank that imports them first.
import torch.distributed.nn.functional  # pyright: ignore[reportUnusedImport]

from faccel.call_site import call_site
from faccel.comm.compared_call import compared_call
from faccel.comm.pack import describe
from faccel.errors import WorldError
from faccel.testing.reductions import (
    ReduceOp,
    check_fits,
    check_reduction,
    check_tensors,
    copy,
    message_error,
    op_name,
    reduce_tensors,
)
from faccel.testing.work import SimulatedWork, join_works
from faccel.testing.world import Channel, OpenCollective, TraceEvent, World

if TYPE_CHECKING:
    from torch._C._distributed_c10d import (
        AllgatherOptions,
        AllreduceOptions,
        AllToAllOptions,
        BarrierOptions,
        BroadcastOptions,
        GatherOptions,
        ReduceOptions,
        ReduceScatterOptions,
        ScatterOptions,
    )

BACKEND = "faccel_simulated"
T = TypeVar("T")
_Tensors = list[torch.Tensor]
_Rows = list[list[torch.Tensor]]


class _GroupOptions(Protocol):
    """The fields of c10d's `_DistributedBackendOptions` that are read here."""

    group_id: str
    group_size: int
    group_rank: int
    global_ranks_in_group: list[int]


class SimulatedGroup(dist.ProcessGroup):
    """The process group of some ranks of a simulated world, as one of them uses it.

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

    def getBackendName(self) -> str:  # noqa: N802 (a name of c10d)
        return BACKEND

    def _get_backend(self, device: torch.device) -> SimulatedGroup:
        # From PyTorch 2.14 on, batched messages ask the backend whether it coalesces.
        return self

    @property
    def endpoint(self) -> Endpoint:
        """The simulation and this rank of its world."""
        return Endpoint(self._world, self._world_rank)

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

    def _collective(
        self,
        op: str,
        detail: str,
        tensors: Sequence[torch.Tensor],
        value: T,
        compute: Callable[[list[T]], None],
        outputs: object = None,
    ) -> SimulatedWork:
        """Join this group's next collective.

        Args:
            op: Name of the operation, for the trace.
            detail: What must agree between ranks besides the operation, as text.
            tensors: The inputs of this rank.
            value: What `compute` needs from this rank, usually outputs and inputs.
            compute: Called once, by the last rank, with the values in the order of group ranks.
            outputs: The value of the future.

        Raises:
            DataError: gloo does not support the tensors.
            DesyncError: Ranks make different calls.
        """
        world, rank = self._world, self._world_rank
        check_tensors(op, tensors)
        self._record(op, tensors)
        call = compared_call(op, detail)
        if self._num_renewals != world.num_renewals:
            # Ranks had made different numbers of calls when one of them failed.
            self._num_renewals, self._num_calls = world.num_renewals, 0
        # The n-th call of a group on one rank belongs to the n-th call on every other rank.
        key = (self._key, self._num_calls)
        self._num_calls += 1
        opened = OpenCollective[object](call, rank)
        # All ranks of a collective pass values of one type, which the key does not express.
        collective = cast("OpenCollective[T]", world.collectives.setdefault(key, opened))
        if collective.call.differs_from(call):
            actions = {number: other.shown(call) for number, other in collective.calls.items()}
            actions[rank] = call.shown(collective.call)
            raise world.scheduler.fail_at(
                actions,
                problem="ranks disagree about the next collective",
                fix="call the same collective of the same values, with the same shapes and dtypes, "
                "from the same line on every rank",
            )
        collective.calls[rank] = call
        collective.inputs[self._group_rank] = value
        if len(collective.inputs) == self.size():
            del world.collectives[key]
            # Communication is not differentiated; autograd of collectives is built above it.
            with torch.no_grad():
                compute([collective.inputs[r] for r in range(self.size())])
            collective.is_done = True

        def missing() -> set[int]:
            return set(self._ranks) - collective.calls.keys()

        def wait() -> None:
            group = f"group {self.group_name!r} (`{self.axis}`)"
            world.wait(rank, lambda: collective.is_done, missing, str(call), group)

        return SimulatedWork(wait, outputs)

    def allreduce(self, tensors: _Tensors, opts: AllreduceOptions | None = None) -> SimulatedWork:
        op: ReduceOp = dist.ReduceOp.SUM
        if opts is not None:
            op = opts.reduceOp
        check_reduction("all_reduce", tensors, op)

        def compute(inputs: list[_Tensors]) -> None:
            for tensors_of_ranks in zip(*inputs, strict=True):
                result = reduce_tensors(tensors_of_ranks, op)
                for tensor in tensors_of_ranks:
                    copy(tensor, result)

        detail = f"{op_name(op)}, {describe(tensors)}"
        return self._collective("all_reduce", detail, tensors, tensors, compute, tensors)

    def allreduce_coalesced(
        self, tensors: _Tensors, opts: AllreduceOptions | None = None
    ) -> SimulatedWork:
        # Several tensors in one call, which `allreduce` handles already.
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: _Tensors, opts: ReduceOptions) -> SimulatedWork:
        check_reduction("reduce", tensors, opts.reduceOp)

        def compute(inputs: list[_Tensors]) -> None:
            result = reduce_tensors([tensors[0] for tensors in inputs], opts.reduceOp)
            copy(inputs[opts.rootRank][0], result)

        detail = f"{op_name(opts.reduceOp)}, to {opts.rootRank}, {describe(tensors)}"
        return self._collective("reduce", detail, tensors, tensors, compute, tensors)

    def broadcast(self, tensors: _Tensors, opts: BroadcastOptions) -> SimulatedWork:
        def compute(inputs: list[_Tensors]) -> None:
            sources = inputs[opts.rootRank]
            for targets in inputs:
                for target, source in zip(targets, sources, strict=True):
                    # The root's own tensor.
                    if target is not source:
                        copy(target, source)

        detail = f"from {opts.rootRank}, {describe(tensors)}"
        return self._collective("broadcast", detail, tensors, tensors, compute, tensors)

    def allgather(
        self, outputs: _Rows, inputs: _Tensors, opts: AllgatherOptions | None = None
    ) -> SimulatedWork:
        def compute(values: list[tuple[_Rows, _Tensors]]) -> None:
            for targets_of_rank, _ in values:
                for i, targets in enumerate(targets_of_rank):
                    for target, (_, sources) in zip(targets, values, strict=True):
                        copy(target, sources[i])

        for targets, source in zip(outputs, inputs, strict=True):
            check_fits("all_gather", targets, [source] * self.size())
        value = (outputs, inputs)
        return self._collective("all_gather", describe(inputs), inputs, value, compute, outputs)

    def allgather_coalesced(
        self, outputs: _Rows, inputs: _Tensors, opts: AllgatherOptions | None = None
    ) -> SimulatedWork:
        # `outputs` has a list per rank here, and a list per input in `allgather`.
        rows = [list(targets) for targets in zip(*outputs, strict=True)]
        return self.allgather(rows, inputs, opts)

    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: AllgatherOptions | None = None
    ) -> SimulatedWork:
        def compute(values: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            joined = torch.cat([source.detach().reshape(-1) for _, source in values])
            for target, _ in values:
                copy(target, joined.view(target.shape))

        check_fits("all_gather_single", list(output.chunk(self.size())), [input] * self.size())
        value = (output, input)
        return self._collective("all_gather", describe([input]), [input], value, compute, output)

    def all_gather_single_coalesced(
        self, outputs: _Tensors, inputs: _Tensors, opts: AllgatherOptions | None = None
    ) -> SimulatedWork:
        pairs = zip(outputs, inputs, strict=True)
        works = [self.all_gather_single(output, input, opts) for output, input in pairs]
        return join_works(works, outputs)

    def gather(self, outputs: _Rows, inputs: _Tensors, opts: GatherOptions) -> SimulatedWork:
        def compute(values: list[tuple[_Rows, _Tensors]]) -> None:
            targets = values[opts.rootRank][0][0]
            for target, (_, sources) in zip(targets, values, strict=True):
                copy(target, sources[0])

        for targets in outputs:  # empty on the other ranks
            check_fits("gather", targets, inputs * self.size())
        detail = f"to {opts.rootRank}, {describe(inputs)}"
        return self._collective("gather", detail, inputs, (outputs, inputs), compute, outputs)

    def scatter(self, outputs: _Tensors, inputs: _Rows, opts: ScatterOptions) -> SimulatedWork:
        def compute(values: list[tuple[_Tensors, _Rows]]) -> None:
            sources = values[opts.rootRank][1][0]
            for (targets, _), source in zip(values, sources, strict=True):
                copy(targets[0], source)

        sent: _Tensors = []
        if inputs:  # only on the root
            sent = inputs[0]
            check_fits("scatter", sent, outputs * self.size())
        detail = f"from {opts.rootRank}, {describe(outputs)}"
        return self._collective("scatter", detail, sent, (outputs, inputs), compute, outputs)

    def reduce_scatter(
        self, outputs: _Tensors, inputs: _Rows, opts: ReduceScatterOptions
    ) -> SimulatedWork:
        check_reduction("reduce_scatter", inputs[0], opts.reduceOp)
        check_fits("reduce_scatter", inputs[0], outputs * self.size())

        def compute(values: list[tuple[_Tensors, _Rows]]) -> None:
            for rank, (targets, _) in enumerate(values):
                rows = [rows_of_rank[0][rank] for _, rows_of_rank in values]
                copy(targets[0], reduce_tensors(rows, opts.reduceOp))

        detail = f"{op_name(opts.reduceOp)}, {describe(inputs[0])}"
        value = (outputs, inputs)
        return self._collective("reduce_scatter", detail, inputs[0], value, compute, outputs)

    def reduce_scatter_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: ReduceScatterOptions
    ) -> SimulatedWork:
        # The single-tensor variant concatenates the rows of all ranks in dimension 0.
        rows = list(input.reshape(self.size(), *output.shape))
        return self.reduce_scatter([output], [rows], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: _Tensors, inputs: _Tensors, opts: ReduceScatterOptions
    ) -> SimulatedWork:
        pairs = zip(outputs, inputs, strict=True)
        works = [self.reduce_scatter_single(output, input, opts) for output, input in pairs]
        return join_works(works, outputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: list[int] | None,
        input_sizes: list[int] | None,
        opts: AllToAllOptions | None = None,
    ) -> SimulatedWork:
        outputs = self._split(output, output_sizes)
        return self._exchange(outputs, self._split(input, input_sizes), output)

    # The names before PyTorch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _split(self, tensor: torch.Tensor, sizes: list[int] | None) -> _Tensors:
        """Return views of a tensor's rows for each rank; equally many without `sizes`."""
        if sizes:
            return list(tensor.detach().split(sizes))
        return list(tensor.detach().chunk(self.size()))

    def alltoall(
        self, outputs: _Tensors, inputs: _Tensors, opts: AllToAllOptions | None = None
    ) -> SimulatedWork:
        return self._exchange(outputs, inputs, outputs)

    def _exchange(self, outputs: _Tensors, inputs: _Tensors, result: object) -> SimulatedWork:
        def compute(values: list[tuple[_Tensors, _Tensors]]) -> None:
            for rank, (targets, _) in enumerate(values):
                for source, target in enumerate(targets):
                    message = values[source][1][rank]
                    # Not left to `copy`, which would repeat a message of one element.
                    if message.numel() != target.numel():
                        ranks = self._ranks[source], self._ranks[rank]
                        raise self._world.scheduler.fail(message_error(message, target, *ranks))
                    copy(target, message.reshape(target.shape))

        # Shapes may differ between ranks here; dtypes may not.
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in inputs}
        # Sorted, because the text is compared between ranks.
        detail = ", ".join(sorted(dtypes))
        return self._collective("all_to_all", detail, inputs, (outputs, inputs), compute, result)

    def barrier(self, opts: BarrierOptions | None = None) -> SimulatedWork:
        return self._collective("barrier", "", [], None, lambda values: None)

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


@attrs.frozen(eq=False)
class Endpoint:
    """A rank of a simulation; the `pg_options` of `init_process_group`."""

    world: World
    rank: int


def _create(options: _GroupOptions, endpoint: Endpoint | None) -> SimulatedGroup:
    """Create a group for `init_process_group`, `new_group` or `init_device_mesh`."""
    if endpoint is None:
        # `new_group` passes no options: take the simulation of the default group.
        default = dist.group.WORLD
        assert isinstance(default, SimulatedGroup)
        endpoint = default.endpoint
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    key = (options.group_id, ranks)
    return SimulatedGroup(endpoint.world, key, ranks, options.group_rank)


if not hasattr(dist.Backend, BACKEND.upper()):  # this module may be reloaded
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
