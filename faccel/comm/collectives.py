"""`Collectives` for any c10d process group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import attrs
import torch
import torch.distributed as dist
from torch import nn

from faccel.call_site import call_site
from faccel.comm.call_order import CallOrder
from faccel.comm.check_bits import check_bits, reduced_with_bits
from faccel.comm.compared_call import described_call, labelled, name_model, subject_of_calls
from faccel.comm.in_flight import InFlight
from faccel.comm.pack import describe
from faccel.comm.rank_errors import failed_rank_error, naming_failed_rank, raise_naming_rank
from faccel.comm.rank_status import RankStatus, StoreCounter
from faccel.comm.single import FixedCounter, NoTurn, axis_error
from faccel.comm.small_rows import Exchange, can_reduce, is_small, reduced
from faccel.comm.turn import WorldTurn
from faccel.comm.world_store import without_frames
from faccel.device_table import is_host
from faccel.errors import FaccelError, WorldError
from faccel.lifetime import WaitTimes, counted
from faccel.mesh import WORLD
from faccel.protocols import Recovery
from faccel.torch_names import all_gather_single
from faccel.tree import Tree

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "prod": dist.ReduceOp.PRODUCT,
}
# PyTorch's functional collectives take the operation as a string, with another name for "prod".
_OPS_IN_GRAPHS = {"sum": "sum", "min": "min", "max": "max", "prod": "product"}


def _described(label: Sequence[tuple[str, Tree]], op: str, x: torch.Tensor) -> str:
    """Return the user's call with its argument; without a label, the operation with its tensor."""
    if label:
        return described_call(*label[0])
    return f"{op} of {describe([x])}"


def _size_of(x: torch.Tensor) -> str:
    # Ranks whose tensor is small wait in other messages than ranks whose tensor is not.
    return f" of {x.nbytes} bytes"


@attrs.frozen(eq=False)
class TorchCollectives:
    """Collectives over c10d process groups: gloo, nccl, those of a simulation, ...

    Args:
        groups: A process group for each axis.
        rank_status: The status of the other ranks, for errors; None in a simulation, which reports
            them itself.
        call_order: Compares the calls of the ranks; None in a simulation and in debug mode, which
            compare all calls.
        recovery: How the ranks continue after a failure; None where they cannot.
        private_groups: Groups for the collectives of this class only. A rank that calls one of them
            does not interfere with the gradients that the others reduce. Those of `groups` where
            this has none.
    """

    groups: dict[str, dist.ProcessGroup]
    rank_status: RankStatus | None = None
    call_order: CallOrder | None = None
    private_groups: dict[str, dist.ProcessGroup] = attrs.field(factory=dict)
    recovery: Recovery | None = None
    # at most one: the call that the next collective belongs to
    _label: list[tuple[str, Tree]] = attrs.field(factory=list, init=False, repr=False)
    _models: list[str] = attrs.field(factory=list, init=False, repr=False)  # those that were named
    # at most one: that of a meter
    waits: list[WaitTimes] = attrs.field(factory=list, init=False, repr=False)
    in_flight: InFlight = attrs.field(factory=InFlight, init=False, repr=False)

    def close(self) -> None:
        """Drain; every later call raises."""
        self.in_flight.drain()
        self.groups.clear()
        self.private_groups.clear()

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the process group of the axis."""
        if not self.groups:
            raise WorldError(
                "this context was shut down", fix="communicate before `faccel.shutdown(ctx)`"
            )
        if axis not in self.groups:
            raise axis_error(axis, self.groups)
        return self.groups[axis]

    def _own_group(self, axis: str) -> dist.ProcessGroup:
        group = self.group(axis)
        return self.private_groups.get(axis, group)

    def set_call_label(self, call: str, x: Tree) -> None:
        """Set the name of the user's call that the next collective belongs to."""
        # A collective in a compiled graph does not read it: it would describe a later call.
        if not torch.compiler.is_compiling():
            self._label[:] = [(call, x)]

    def name_model(self, model: nn.Module) -> None:
        """Give the units of a model names, by which a simulation and debug mode compare calls."""
        if self.rank_status is None:  # a simulation, which compares all calls
            self._models.append(type(model).__name__)
            name_model(model, len(self._models))

    def count_waits(self, waits: WaitTimes) -> None:
        """Count the time of collectives on the host in `waits` from now on."""
        self.waits[:] = [waits]

    def new_turn(self, *, local: bool, timeout_s: float) -> WorldTurn | NoTurn:
        """Return the next turn of `main_first`."""
        if self.rank_status is None:
            return NoTurn()
        num_ranks = self.size(WORLD)
        return WorldTurn(self.rank_status, num_ranks, local=local, timeout_s=timeout_s)

    def new_counter(self) -> FixedCounter | StoreCounter:
        """Return a counter from 0 for all ranks."""
        if self.rank_status is None:
            return FixedCounter(self.rank(WORLD), self.size(WORLD))
        return self.rank_status.new_counter()

    def begin_call(self, call: str) -> None:
        """Return when every rank of the world begins this call."""
        if self.call_order is not None:
            with counted(self.waits), naming_failed_rank(call, WORLD, self):
                self.call_order.begin(call, self.in_flight.alias)
            self.in_flight.forget_finished()

    def _call(self, op: str, x: torch.Tensor) -> Callable[[], str]:
        """Return a function that describes the call which the next collective belongs to."""
        # A copy, because the label is removed when the collective begins.
        return functools.partial(_described, self._label[:], op, x)

    def _exchange(self, axis: str, op: str, call: Callable[[], str]) -> Exchange:
        """Return the exchange of a collective on the CPU; `op` is its name for other errors."""
        ranks = dist.get_process_group_ranks(self.group(axis))
        size = len(ranks)

        def send(row: torch.Tensor) -> torch.Tensor:
            sent = self.in_flight.alias(row.repeat(size))
            received = torch.empty_like(sent)
            self.in_flight.add(received)
            self._run(
                op,
                axis,
                sent,
                lambda group, is_async: dist.all_to_all_single(
                    received, sent, group=group, async_op=is_async
                ),
            )
            return received.view(size, len(row))

        return Exchange(lambda: f"{call()} over `{axis}`", ranks, send)

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> FaccelError | None:
        """Return the error that names the failed rank; None if `error` has another cause."""
        # gloo raises a plain RuntimeError; only the path of its source file identifies it.
        is_from_collective = isinstance(error, dist.DistError) or "gloo/" in str(error)
        if self.rank_status is None or isinstance(error, FaccelError) or not is_from_collective:
            return None
        if self.recovery is not None and self.recovery.is_active:
            return None  # the ranks find out together, after this one has left its collectives
        if self.call_order is not None:
            with without_frames():
                disagreement = self.call_order.disagreement()
            if disagreement is not None:
                return disagreement
        # Statuses are keyed by the rank of the world, which is not the rank on the axis.
        ranks = dist.get_process_group_ranks(self.group(axis))
        statuses = self.rank_status.report(ranks, f"{doing} over `{axis}` at {call_site()}")
        return failed_rank_error(error, doing, statuses)

    def _run(
        self,
        op: str,
        axis: str,
        x: torch.Tensor | None,
        begin: Callable[[dist.ProcessGroup, bool], dist.Work | None],
        detail: str = "",
    ) -> None:
        """Run a collective on the tensor `x`; an error names the rank that failed.

        Args:
            op: Its name, for errors.
            axis: The axis.
            x: A tensor of it; None for a barrier, which waits on the host.
            begin: `begin(group, is_async)` begins it. It returns None if it has ended already.
            detail: What must agree besides the call where ranks wait for each other.
        """
        # Without a meter there is no context manager around the call. On an accelerator only a
        # barrier waits on the host.
        if self.waits and (x is None or is_host(x.device)):
            with self.waits[0].communicating():
                self._run_now(op, axis, x, begin, detail)
        else:
            self._run_now(op, axis, x, begin, detail)

    def _run_now(
        self,
        op: str,
        axis: str,
        x: torch.Tensor | None,
        begin: Callable[[dist.ProcessGroup, bool], dist.Work | None],
        detail: str,
    ) -> None:
        group = self._own_group(axis)
        labels = self._label[:]
        # Removed in any case: it would describe a later, other collective, and keep its tensors.
        self._label.clear()
        # No context managers: their frames would cost as much as a quarter of a small collective.
        try:
            if labels and self.rank_status is None:
                # in a simulation the label is the subject of the call
                with subject_of_calls(labelled(*labels[0])):
                    begin(group, False)
            elif self.call_order is None or not self._host_waits(x):
                begin(group, False)
            else:
                call = op
                if labels:
                    call = labels[0][0]
                work = begin(group, True)
                if work is not None:
                    self.call_order.wait(work, call + detail, group)
        except RuntimeError as error:
            raise_naming_rank(error, op, axis, self)
        self.in_flight.forget_finished()

    def _host_waits(self, x: torch.Tensor | None) -> bool:
        # On an accelerator `wait` does not wait for the other ranks, but orders streams.
        if x is None:
            return bool(self.private_groups)
        return is_host(x.device)

    def size(self, axis: str) -> int:
        """Return the number of ranks of the axis."""
        return self.group(axis).size()

    def rank(self, axis: str) -> int:
        """Return the index of this rank on the axis."""
        return self.group(axis).rank()

    def all_reduce(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Return `x`, reduced with `op` over the ranks of the axis."""
        if torch.compiler.is_compiling():
            # a graph has PyTorch's functional collectives, and no exceptions
            import torch.distributed._functional_collectives as funcol  # takes 30 ms

            total = funcol.all_reduce(x, _OPS_IN_GRAPHS[op], self.group(axis))
            return funcol.wait_tensor(total)
        try:
            return self._reduced(x, op, axis)
        finally:
            self._label.clear()  # also after an error on this rank only

    def _compares(self, x: torch.Tensor) -> bool:
        # A simulation compares the calls itself. Off the CPU, the host would wait for a comparison.
        return self.rank_status is not None and is_host(x.device)

    def _reduced(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        if not self._compares(x):
            return self._all_reduced(x.clone(), op, axis, _size_of(x))
        size = self.size(axis)
        call = self._call(f"all_reduce({op})", x)
        # Not the shape: a number may be `T[1]` on one rank, and `T[]` on another.
        compared = f"{op} in {x.dtype}{_size_of(x)}"
        if self._label:
            compared += call()
        if is_small(x, size) and can_reduce(x):
            return reduced(self._exchange(axis, "all_reduce", call).values(x, compared), op)
        bits = check_bits(compared, x.dtype, size)

        def reduce(out: torch.Tensor) -> torch.Tensor:
            return self._all_reduced(out, op, axis, _size_of(x))

        return reduced_with_bits(x, op, bits, size, reduce)

    def _all_reduced(self, out: torch.Tensor, op: str, axis: str, detail: str) -> torch.Tensor:
        """Reduce `out` in place, and return it."""
        flat = self.in_flight.alias(out)
        self._run(
            "all_reduce",
            axis,
            flat,
            lambda group, is_async: dist.all_reduce(flat, _OPS[op], group, is_async),
            detail,
        )
        return out

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return every rank's `x` along a new first dimension."""
        try:
            return self._gathered(x, axis)
        finally:
            self._label.clear()  # also after an error on this rank only

    def _gathered(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        size = self.size(axis)
        if not x.numel():
            return x.new_empty(size, *x.shape)
        if self._compares(x) and is_small(x, size):
            call = self._call("all_gather", x)
            compared = f"all_gather in {x.dtype}{_size_of(x)}"
            if self._label:
                # Only the name: public functions compare what is in the rows, with better advice.
                compared = self._label[0][0]
            return self._exchange(axis, "all_gather", call).values(x, compared)
        # gloo's threads reference views of the output, which count as references to `flat` only.
        # So `flat` itself is kept, and the caller gets a copy.
        flat = x.new_empty(size * x.numel())
        self.in_flight.add(flat)
        row = self.in_flight.alias(x)
        self._run(
            "all_gather",
            axis,
            row,
            lambda group, is_async: all_gather_single(flat, row, group, is_async),
            _size_of(row),
        )
        return flat.clone().view(size, *x.shape)

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Return the `x` of rank `src` of the axis."""
        out = x.clone()
        # Without elements there is nothing to send. Shapes agree, so every rank returns here.
        if out.numel():
            flat = self.in_flight.alias(out)
            self._run(
                "broadcast",
                axis,
                flat,
                lambda group, is_async: dist.broadcast(
                    flat, group_src=src, group=group, async_op=is_async
                ),
            )
        return out

    def all_to_all(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return each rank's row for this rank."""
        out = torch.empty_like(x)
        if out.numel():
            self._compare_rows(x, axis)
            rows, received = self.in_flight.alias(x), self.in_flight.alias(out)
            self._run(
                "all_to_all",
                axis,
                rows,
                lambda group, is_async: dist.all_to_all_single(
                    received, rows, group=group, async_op=is_async
                ),
            )
        return out

    def _compare_rows(self, x: torch.Tensor, axis: str) -> None:
        """Raise if a user's call is not made by all ranks, with as many bytes."""
        # gloo sends the rows of `Exchange` in the same way, and ends the process of a rank that
        # receives more bytes than it expects. Not those of a backward: a model with experts or a
        # sharded sequence has several in each layer, and a round for each would be slow.
        if not (self._label and self._compares(x)):
            return
        nothing = x.new_empty(0)
        if is_small(nothing, self.size(axis)):
            compared = f"all_to_all{_size_of(x)}"
            exchange = self._exchange(axis, "all_to_all", self._call("all_to_all", x))
            exchange.values(nothing, compared)

    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Return this rank's row of rank `src`'s `rows`."""
        out = torch.empty_like(like)
        if out.numel():
            # c10d takes a list on the source only, and raises for one on another rank.
            pieces = None
            if rows is not None:
                pieces = [self.in_flight.alias(row) for row in rows]
            row = self.in_flight.alias(out)
            self._run(
                "scatter",
                axis,
                row,
                lambda group, is_async: dist.scatter(
                    row, pieces, group_src=src, group=group, async_op=is_async
                ),
            )
        return out

    def barrier(self, axis: str) -> None:
        """Return when every rank of the axis has called it."""
        self._run(
            "barrier",
            axis,
            None,
            lambda group, is_async: dist.barrier(group, async_op=is_async),
        )
