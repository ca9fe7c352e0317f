"""The process group of a simulated world: collectives between ranks that are threads.

The last rank that calls a collective computes it for all ranks. The other ranks wait in the
scheduler until it is done.
"""

# pyright: reportIncompatibleMethodOverride=false, reportCallIssue=false, reportAssignmentType=false
# The stubs of c10d list overloads under other names; these are the methods that c10d calls.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import attrs
import torch
import torch.distributed as dist

# Imported before a rank does: its functions have `group=dist.group.WORLD` as a default, which would
# be the default group of the rank that imports them first.
import torch.distributed.nn.functional  # pyright: ignore[reportUnusedImport]

from faccel.comm.compared_call import compared_call
from faccel.comm.pack import describe
from faccel.parallel.eager_code import methods_without_graphs
from faccel.testing.group_member import GroupMember
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
from faccel.testing.world import OpenCollective, World

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


@methods_without_graphs
class SimulatedGroup(GroupMember):
    """The process group of some ranks of a simulated world, as one of them uses it."""

    def getBackendName(self) -> str:  # noqa: N802 (a name of c10d)
        return BACKEND

    def _get_backend(self, device: torch.device) -> SimulatedGroup:
        # From PyTorch 2.14 on, batched messages ask the backend whether it coalesces.
        return self

    @property
    def endpoint(self) -> Endpoint:
        """The simulation and this rank of its world."""
        return Endpoint(self._world, self._world_rank)

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
            # Communication is not differentiated; autograd of collectives is built above it. It
            # does not know the autocast of the last rank that called it, either.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
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
