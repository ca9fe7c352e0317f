"""`Collectives` for any c10d process group."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch
import torch.distributed as dist
from torch import nn

from faccel.call_site import call_site
from faccel.comm.call_order import CallOrder
from faccel.comm.compared_call import labelled, name_model, subject_of_calls
from faccel.comm.pack import describe
from faccel.comm.rank_errors import naming_failed_rank, raise_naming_rank
from faccel.comm.rank_status import RankStatus, StoreCounter
from faccel.comm.single import FixedCounter, NoTurn, axis_error
from faccel.comm.turn import WorldTurn
from faccel.comm.world_store import without_frames
from faccel.device_table import is_host
from faccel.errors import (
    DesyncError,
    FaccelError,
    RankFailedError,
    WorldError,
)
from faccel.lifetime import WaitTimes
from faccel.mesh import WORLD
from faccel.protocols import Recovery
from faccel.torch_names import all_gather_single
from faccel.tree import Tree, flatten, paths

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "prod": dist.ReduceOp.PRODUCT,
}
# PyTorch's functional collectives take the operation as a string, with another name for "prod".
_OPS_IN_GRAPHS = {"sum": "sum", "min": "min", "max": "max", "prod": "product"}


def _is_referenced(alias: torch.Tensor) -> bool:
    """Return whether C++ has a reference to this tensor object, not only to its storage."""
    # 1 is the reference of the Python object `alias` itself.
    return alias._use_count() > 1  # type: ignore[attr-defined]


def counted(waits: Sequence[WaitTimes]) -> AbstractContextManager[None]:
    """Return a context whose time is counted in `waits`, if there is one."""
    if waits:
        return waits[0].communicating()
    return nullcontext()


def _first_sentence(error: RuntimeError) -> str:
    """Return the message of an error of c10d, without its source location and advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^\]]*\] ", "", line).partition(". This is typically")[0]


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
    in_flight: list[torch.Tensor] = attrs.field(factory=list, init=False, repr=False)
    """Aliases of tensors that threads of c10d may still reference; see `drain`."""

    def _tracked(self, x: torch.Tensor) -> torch.Tensor:
        """Return an alias of `x` for c10d, and keep it in `in_flight`."""
        # A new tensor object over the same storage: only c10d adds references to it, whatever
        # references the caller has to `x`.
        flat = x.detach().view(-1)
        if is_host(flat.device):
            self.in_flight.append(flat)
        return flat

    def _forget_finished(self) -> None:
        # In place, because the fields of a frozen class cannot be assigned.
        self.in_flight[:] = [alias for alias in self.in_flight if _is_referenced(alias)]

    def drain(self, timeout_s: float = 1.0) -> None:
        """Wait until no thread of gloo references a tensor of an earlier collective.

        gloo's threads release a tensor only after its result is there. The last release needs the
        interpreter, which may be gone at exit: then the process aborts (1 of 120 in our tests;
        pytorch/pytorch#179291). So `in_flight` keeps an alias of each tensor for longer than the
        thread, and `shutdown` waits for the last ones. Joining the threads is impossible: DDP's
        reducer keeps their process group forever.
        """
        # Limited: a collective that never ends keeps its tensor, and the process must still exit.
        deadline = time.monotonic() + timeout_s
        while any(map(_is_referenced, self.in_flight)) and time.monotonic() < deadline:
            time.sleep(0)  # lets other threads run
        self.in_flight.clear()

    def close(self) -> None:
        """Drain; every later call raises."""
        self.drain()
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
                self.call_order.begin(call, self._tracked)
            self._forget_finished()

    def _check_bits(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Return `T[64]` to append to `x` in a reduction: a hash of the call, in bits and inverted.

        If all ranks send the same bits, any reduction returns them (a sum: times the number of
        ranks, which is exact in any dtype up to 256). If two differ, each rank gets a bit that it
        did not send. Empty in a simulation, which compares the calls themselves, and off the CPU,
        where comparing the bits would make the host wait.
        """
        # Above 256 the sum of bits may be inexact: bfloat16 has 8 bits of precision.
        if self.rank_status is None or not is_host(x.device) or self.size(axis) > 256:
            return x.new_empty(0)
        text = f"{op}{x.dtype}{x.numel()}"
        if self._label:
            call, tree = self._label[0]
            text = f"{call}{paths(tree)}{describe(flatten(tree)[0])}"
        # Not `hash(text)`, which differs between processes.
        number = zlib.crc32(text.encode())
        bits = [number >> i & 1 for i in range(32)]
        # Let ranks send 0 and 1 in one place. "min" and "prod" give 0, "max" gives 1: one of them
        # gets what it sent. In the inverted place it is the other one that does.
        inverted_bits = [1 - bit for bit in bits]
        return torch.tensor(bits + inverted_bits, dtype=x.dtype)

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
        return RankFailedError(
            f"rank {dist.get_rank()} could not finish {doing}: another rank left, failed or made "
            "another call",
            got=f"{statuses}; {_first_sentence(error)}",
            fix="fix the error of the other ranks; `FACCEL_DEBUG=1` compares calls, shapes and "
            "lines before each collective",
        )

    def _run(
        self,
        op: str,
        axis: str,
        x: torch.Tensor | None,
        begin: Callable[[dist.ProcessGroup, bool], dist.Work | None],
    ) -> None:
        """Run a collective on the tensor `x`; an error names the rank that failed.

        Args:
            op: Its name, for errors.
            axis: The axis.
            x: A tensor of it; None for a barrier, which waits on the host.
            begin: `begin(group, is_async)` begins it. It returns None if it has ended already.
        """
        # Without a meter there is no context manager around the call. On an accelerator only a
        # barrier waits on the host.
        if self.waits and (x is None or is_host(x.device)):
            with self.waits[0].communicating():
                self._run_now(op, axis, x, begin)
        else:
            self._run_now(op, axis, x, begin)

    def _run_now(
        self,
        op: str,
        axis: str,
        x: torch.Tensor | None,
        begin: Callable[[dist.ProcessGroup, bool], dist.Work | None],
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
                    self.call_order.wait(work, call, group)
        except RuntimeError as error:
            raise_naming_rank(error, op, axis, self)
        self._forget_finished()

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
        bits = self._check_bits(x, op, axis)
        num_bits = len(bits)
        # A copy in both cases: `dist.all_reduce` writes into its argument, and `x` is the caller's.
        out = torch.cat([x.reshape(-1), bits]) if num_bits else x.clone()
        flat = self._tracked(out)
        self._run(
            "all_reduce",
            axis,
            flat,
            lambda group, is_async: dist.all_reduce(flat, _OPS[op], group, is_async),
        )
        if not num_bits:
            return out
        if op == "sum":
            # Modulo 2^n for an n-bit integer dtype, on both sides of the comparison.
            bits = bits * self.size(axis)
        if not torch.equal(out[-num_bits:], bits):
            call = f"{op} of {describe([x])} over `{axis}` at {call_site()}"
            raise DesyncError(
                "ranks disagree about operation, leaves, shapes or dtypes in one reduction",
                got=f"rank {dist.get_rank()}: {call}",
                fix="make the same call on every rank; `FACCEL_DEBUG=1` prints that of each rank",
            )
        # A view would keep the bits alive, and `torch.save` would write them with the result.
        return out[:-num_bits].clone().view(x.shape)

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return every rank's `x` along a new first dimension."""
        size = self.size(axis)
        flat = x.new_empty(size * x.numel())
        if not flat.numel():
            self._label.clear()
        else:
            # gloo's threads reference views of the output, which count as references to `flat`
            # only. So `flat` itself is tracked, and the caller gets a copy.
            if is_host(flat.device):
                self.in_flight.append(flat)
            row = self._tracked(x)
            self._run(
                "all_gather",
                axis,
                row,
                lambda group, is_async: all_gather_single(flat, row, group, is_async),
            )
        return flat.clone().view(size, *x.shape)

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Return the `x` of rank `src` of the axis."""
        out = x.clone()
        # Without elements there is nothing to send. Shapes agree, so every rank returns here.
        if out.numel():
            flat = self._tracked(out)
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
            rows, received = self._tracked(x), self._tracked(out)
            self._run(
                "all_to_all",
                axis,
                rows,
                lambda group, is_async: dist.all_to_all_single(
                    received, rows, group=group, async_op=is_async
                ),
            )
        return out

    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Return this rank's row of rank `src`'s `rows`."""
        out = torch.empty_like(like)
        if out.numel():
            # c10d takes a list on the source only, and raises for one on another rank.
            pieces = None
            if rows is not None:
                pieces = [self._tracked(row) for row in rows]
            row = self._tracked(out)
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
