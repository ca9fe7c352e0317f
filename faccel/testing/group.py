"""The simulated world's communicator: a c10d process group whose ranks are threads that take turns."""

# pyright: reportIncompatibleMethodOverride=false, reportCallIssue=false
# c10d's stubs list overloads under other names; these are the methods that it calls.

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import Work  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
from torch.futures import Future

from faccel.call_site import call_site
from faccel.comm.pack import describe
from faccel.errors import DesyncError, WorldError
from faccel.testing.world import InjectedError, Slot, TraceEvent, World

BACKEND = "faccel_simulated"


class _Work(Work):
    """A handle that lets other ranks run until the result is there."""

    def __init__(self, wait: Callable[[], None], outputs: Any) -> None:
        super().__init__()
        self._wait = wait
        self._outputs = outputs

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._wait()
        return True

    def get_future(self) -> Future[Any]:
        self._wait()
        future: Future[Any] = Future()
        future.set_result(self._outputs)
        return future

    def is_completed(self) -> bool:
        self._wait()  # the others run until it is: nobody can poll here
        return True


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.sum(0) / x.shape[0]


_REDUCTIONS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: lambda x: x.sum(0, dtype=x.dtype),
    dist.ReduceOp.AVG: _mean,
    dist.ReduceOp.PRODUCT: lambda x: x.prod(0, dtype=x.dtype),
    dist.ReduceOp.MIN: lambda x: x.amin(0),
    dist.ReduceOp.MAX: lambda x: x.amax(0),
}


def _reduce(tensors: Sequence[torch.Tensor], op: Any) -> torch.Tensor:
    reduction = _REDUCTIONS.get(getattr(op, "op", op))
    if reduction is None:
        raise ValueError(f"the simulated world cannot reduce with {op}")
    return reduction(torch.stack([t.detach() for t in tensors]))


class SimulatedGroup(dist.ProcessGroup):
    """The process group of some ranks of a simulated world.

    Args:
        world: The simulation.
        key: The same for all its ranks, another for any other group.
        ranks: Its members, as ranks of the world.
        rank: This rank's place among them.
    """

    def __init__(self, world: World, key: Any, ranks: Sequence[int], rank: int) -> None:
        super().__init__(rank, len(ranks))
        self._world, self._key, self._ranks, self._here = world, key, tuple(ranks), rank
        self._num_calls = 0

    def size(self) -> int:
        return len(self._ranks)

    def rank(self) -> int:
        return self._here

    def getBackendName(self) -> str:  # noqa: N802 (c10d's name)
        return BACKEND

    @property
    def group_name(self) -> str:
        """Its name in torch's registry; C++ gives it to groups with a C++ backend only."""
        return c10d._world.pg_names[self]  # pyright: ignore[reportPrivateUsage]

    @property
    def axis(self) -> str:
        """Its name in the trace: that of the axis, or torch's description."""
        return "world" if self.group_desc == "default_pg" else self.group_desc.removeprefix("mesh_")

    def _record(self, op: str, tensors: Sequence[torch.Tensor]) -> str:
        if self._world.baton.finished.is_set():
            raise WorldError(
                "the simulated world of this context has ended",
                got=f"{op} after `simulate` returned",
                fix="communicate inside of the function that `simulate` runs",
            )
        site = call_site()
        self._world.trace.append(
            TraceEvent(
                self._ranks[self._here],
                op,
                self.axis,
                sum(t.numel() * t.element_size() for t in tensors),
                site,
            )
        )
        self._go_wrong(op, tensors, site)
        return site

    def _go_wrong(self, op: str, tensors: Sequence[torch.Tensor], site: str) -> None:
        """Let the fault of this call happen, if there is one."""
        me = self._ranks[self._here]
        number = self._world.num_calls.get(me, 0)
        self._world.num_calls[me] = number + 1
        fault = self._world.faults.get((me, number))
        if fault is None:
            return
        if fault.kind == "raise":
            raise InjectedError(f"rank {me}, collective {number}: {op} at {site}")
        if fault.kind == "stall":
            self._world.baton.wait(me, lambda: False, f"stalled before {op} at {site}")
        for tensor in tensors[:1]:
            first = tensor.detach().reshape(-1)[:1]
            first.copy_(
                torch.full_like(first, float("nan")) if first.is_floating_point() else ~first
            )

    def _meet(
        self,
        op: str,
        detail: str,
        inputs: Sequence[torch.Tensor],
        part: Any,
        finish: Callable[[list[Any]], None],
        outputs: Any = None,
    ) -> _Work:
        """Bring `part` to this group's next collective; the last rank to come runs `finish(parts)`."""
        world, me = self._world, self._ranks[self._here]
        site = self._record(op, inputs)
        what = f"{op}({detail})" if detail else op
        call = (self._key, self._num_calls)
        self._num_calls += 1
        slot = world.slots.setdefault(call, Slot(what, site, me))
        if slot.what != what:
            world.baton.ranks[me].doing = f"{what} at {site}"
            raise world.baton.fail(
                DesyncError(
                    "ranks disagree about the next collective",
                    got=world.baton.report(),
                    fix="call the same collective with the same shapes and dtypes on every rank",
                )
            )
        slot.parts[self._here] = part
        if len(slot.parts) == len(self._ranks):
            del world.slots[call]
            with torch.no_grad():
                finish([slot.parts[r] for r in range(len(self._ranks))])
            slot.is_done = True
        return _Work(
            lambda: world.baton.wait(me, lambda: slot.is_done, f"{what} at {site}"), outputs
        )

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> _Work:
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp

        def finish(parts: list[list[torch.Tensor]]) -> None:
            for same in zip(*parts, strict=True):
                result = _reduce(same, op)
                for tensor in same:
                    tensor.detach().copy_(result)

        return self._meet(
            "all_reduce", f"{_name(op)}, {describe(tensors)}", tensors, tensors, finish, tensors
        )

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> _Work:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> _Work:
        def finish(parts: list[list[torch.Tensor]]) -> None:
            result = _reduce([part[0] for part in parts], opts.reduceOp)
            parts[opts.rootRank][0].detach().copy_(result)

        detail = f"{_name(opts.reduceOp)}, to {opts.rootRank}, {describe(tensors)}"
        return self._meet("reduce", detail, tensors, tensors, finish, tensors)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> _Work:
        def finish(parts: list[list[torch.Tensor]]) -> None:
            for part in parts:
                for tensor, source in zip(part, parts[opts.rootRank], strict=True):
                    if tensor is not source:
                        tensor.detach().copy_(source.detach())

        detail = f"from {opts.rootRank}, {describe(tensors)}"
        return self._meet("broadcast", detail, tensors, tensors, finish, tensors)

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> _Work:
        def finish(parts: list[tuple[list[list[torch.Tensor]], list[torch.Tensor]]]) -> None:
            for out, _ in parts:
                for i, row in enumerate(out):
                    for target, (_, source) in zip(row, parts, strict=True):
                        target.detach().copy_(source[i].detach())

        return self._meet(
            "all_gather", describe(inputs), inputs, (outputs, inputs), finish, outputs
        )

    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> _Work:
        def finish(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
            joined = torch.cat([source.detach().reshape(-1) for _, source in parts])
            for out, _ in parts:
                out.detach().copy_(joined.view(out.shape))

        return self._meet("all_gather", describe([input]), [input], (output, input), finish, output)

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> _Work:
        return _all(
            [self.all_gather_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)],
            outputs,
        )

    def gather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any
    ) -> _Work:
        def finish(parts: list[tuple[list[list[torch.Tensor]], list[torch.Tensor]]]) -> None:
            for target, (_, source) in zip(parts[opts.rootRank][0][0], parts, strict=True):
                target.detach().copy_(source[0].detach())

        return self._meet(
            "gather",
            f"to {opts.rootRank}, {describe(inputs)}",
            inputs,
            (outputs, inputs),
            finish,
            outputs,
        )

    def scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any
    ) -> _Work:
        def finish(parts: list[tuple[list[torch.Tensor], list[list[torch.Tensor]]]]) -> None:
            for (out, _), source in zip(parts, parts[opts.rootRank][1][0], strict=True):
                out[0].detach().copy_(source.detach())

        sent = inputs[0] if inputs else []
        return self._meet(
            "scatter",
            f"from {opts.rootRank}, {describe(outputs)}",
            sent,
            (outputs, inputs),
            finish,
            outputs,
        )

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any
    ) -> _Work:
        def finish(parts: list[tuple[list[torch.Tensor], list[list[torch.Tensor]]]]) -> None:
            for here, (out, _) in enumerate(parts):
                out[0].detach().copy_(
                    _reduce([source[0][here] for _, source in parts], opts.reduceOp)
                )

        detail = f"{_name(opts.reduceOp)}, {describe(inputs[0])}"
        return self._meet("reduce_scatter", detail, inputs[0], (outputs, inputs), finish, outputs)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> _Work:
        return self.reduce_scatter(
            [output], [list(input.reshape(self.size(), *output.shape))], opts
        )

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any
    ) -> _Work:
        return _all(
            [self.reduce_scatter_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)],
            outputs,
        )

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: list[int] | None,
        input_sizes: list[int] | None,
        opts: Any = None,
    ) -> _Work:
        def rows(tensor: torch.Tensor, sizes: list[int] | None) -> list[torch.Tensor]:
            return list(
                tensor.detach().split(sizes) if sizes else tensor.detach().chunk(self.size())
            )

        return self._exchange(rows(output, output_sizes), rows(input, input_sizes), output)

    def alltoall(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> _Work:
        return self._exchange(outputs, inputs, outputs)

    def _exchange(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], result: Any
    ) -> _Work:
        def finish(parts: list[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> None:
            for here, (out, _) in enumerate(parts):
                for target, (_, sent) in zip(out, parts, strict=True):
                    target.detach().copy_(sent[here].detach())

        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in inputs}))
        return self._meet("all_to_all", dtypes, inputs, (outputs, inputs), finish, result)

    def barrier(self, opts: Any = None) -> _Work:
        return self._meet("barrier", "", [], None, lambda parts: None)

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int = 0) -> _Work:
        self._record("send", tensors)
        box = (self._key, self._here, dst, tag)
        self._world.mail.setdefault(box, []).append(tensors[0].detach().clone())
        return _Work(lambda: None, tensors)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int = 0) -> _Work:
        world, me = self._world, self._ranks[self._here]
        site = self._record("recv", [])
        mail = world.mail.setdefault((self._key, src, self._here, tag), [])
        done: list[bool] = []

        def wait() -> None:
            if not done:
                world.baton.wait(me, lambda: bool(mail), f"recv from {self._ranks[src]} at {site}")
                done.append(True)
                got = mail.pop(0)
                if describe([got]) != describe(tensors):
                    raise world.baton.fail(
                        DesyncError(
                            "a message does not fit the tensor that receives it",
                            got=f"{describe([got])} from rank {self._ranks[src]}, {describe(tensors)} at {site}",
                            fix="send and receive the same shape and dtype",
                        )
                    )
                tensors[0].detach().copy_(got)

        return _Work(wait, tensors)


def _name(op: Any) -> str:
    return str(getattr(op, "op", op)).rpartition(".")[2].lower()


def _all(works: list[_Work], outputs: Any) -> _Work:
    def wait() -> None:
        for work in works:
            work.wait()

    return _Work(wait, outputs)


@attrs.frozen(eq=False)
class Endpoint:
    """What torch's group factory needs to know; travels as the `pg_options` of `init_process_group`."""

    world: World
    rank: int


def _create(options: Any, endpoint: Endpoint | None) -> SimulatedGroup:
    """Make a group for torch: `init_process_group`, `new_group` and `init_device_mesh` come here."""
    if endpoint is None:  # a sub-group: the rank's default group knows the world
        default = dist.group.WORLD
        assert isinstance(default, SimulatedGroup)
        endpoint = Endpoint(default._world, default._ranks[default._here])  # pyright: ignore[reportPrivateUsage]
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    return SimulatedGroup(endpoint.world, (options.group_id, ranks), ranks, options.group_rank)


if not hasattr(dist.Backend, BACKEND.upper()):
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
