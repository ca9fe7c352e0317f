"""`Collectives` for one process and for any c10d process group."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import attrs
import torch
import torch.distributed as dist

from faccel.call_site import call_site
from faccel.comm.pack import describe
from faccel.comm.rank_errors import naming_failed_rank
from faccel.comm.rank_status import RankStatus
from faccel.errors import (
    ConfigError,
    DesyncError,
    FaccelError,
    RankFailedError,
    WorldError,
    nearest,
)
from faccel.mesh import AXES, VIEWS
from faccel.protocols import WORLD
from faccel.tree import Tree, flatten, paths

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "prod": dist.ReduceOp.PRODUCT,
}
_OPS_IN_GRAPHS = {"sum": "sum", "min": "min", "max": "max", "prod": "product"}
# torch 2.13 renamed it and warns on the old name, which is the only one that 2.9 has
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _is_held(alias: torch.Tensor) -> bool:
    """Whether somebody but the interpreter has a reference to this very tensor, not only to its storage."""
    return alias._use_count() > 1  # type: ignore[attr-defined]


def _first_sentence(error: RuntimeError) -> str:
    """Return what an error of c10d says, without the place in its source and its advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^\]]*\] ", "", line).partition(". This is typically")[0]


def _axis_error(axis: str, allowed: Iterable[str]) -> ConfigError:
    return ConfigError(
        "`axis` must be an axis of the mesh", got=repr(axis), fix=nearest(axis, allowed)
    )


@attrs.frozen
class SingleCollectives:
    """The communication of a world of one: copies."""

    axes: tuple[str, ...] = (WORLD, *VIEWS, *AXES, "ep", "ep_storage")

    def _check(self, axis: str) -> None:
        if axis not in self.axes:
            raise _axis_error(axis, self.axes)

    def size(self, axis: str) -> int:
        """Return 1."""
        self._check(axis)
        return 1

    def rank(self, axis: str) -> int:
        """Return 0."""
        self._check(axis)
        return 0

    def group(self, axis: str) -> None:
        """Return None: there is nobody to talk to."""
        self._check(axis)

    def set_call_label(self, call: str, x: Tree) -> None:
        """Do nothing: there is nobody to disagree."""

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> None:
        """Return None: nobody else can have failed."""

    def all_reduce(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Return a copy of `x`."""
        self._check(axis)
        return x.clone()

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return a copy of `x` as the one row."""
        self._check(axis)
        return x.clone()[None]

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Return a copy of `x`."""
        self._check(axis)
        return x.clone()

    def all_to_all(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return a copy of `x`."""
        self._check(axis)
        return x.clone()

    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Return a copy of the one row."""
        self._check(axis)
        assert rows is not None
        return rows[0].clone()

    def barrier(self, axis: str) -> None:
        """Return at once."""
        self._check(axis)


@attrs.frozen(eq=False)
class TorchCollectives:
    """Communication over c10d process groups: gloo, nccl, the simulated world's, ...

    Args:
        groups: A process group for each axis.
        rank_status: Where ranks tell what became of them; None where nobody has to be asked, as in a simulation.
    """

    groups: dict[str, dist.ProcessGroup]
    rank_status: RankStatus | None = None
    _announced: list[tuple[str, Tree]] = attrs.field(factory=list, init=False, repr=False)
    in_flight: list[torch.Tensor] = attrs.field(factory=list, init=False, repr=False)
    """Aliases of what was handed to c10d, until its threads have let go; see `drain`."""

    def _hand_over(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().view(-1)
        if flat.device.type == "cpu":
            self.in_flight.append(flat)
        return flat

    def _let_go(self) -> None:
        self.in_flight[:] = [alias for alias in self.in_flight if _is_held(alias)]

    def drain(self, timeout_s: float = 1.0) -> None:
        """Wait until no thread of gloo holds a tensor that it was given.

        gloo's threads let go of a tensor only after its result is there. The one that comes last needs the
        interpreter, and at exit that may be gone: the process aborts (one of 120 here; pytorch/pytorch#179291). So each
        tensor has an alias that outlives the thread's hold on it, and `shutdown` waits for the last ones. The threads
        themselves cannot be joined: DDP's reducer keeps their group for ever.
        """
        deadline = time.monotonic() + timeout_s
        while any(map(_is_held, self.in_flight)) and time.monotonic() < deadline:
            time.sleep(0)  # lets other threads run
        self.in_flight.clear()

    def close(self) -> None:
        """Drain, and refuse to communicate from now on."""
        self.drain()
        self.groups.clear()

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the process group of the axis."""
        if not self.groups:
            raise WorldError(
                "this context was shut down", fix="communicate before `faccel.shutdown(ctx)`"
            )
        if axis not in self.groups:
            raise _axis_error(axis, self.groups)
        return self.groups[axis]

    def set_call_label(self, call: str, x: Tree) -> None:
        """Remember for which call the next reduction is."""
        if self.rank_status is not None:
            self._announced[:] = [(call, x)]

    def _marks(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Return what travels behind `x` in a reduction: bits of a number that names the call, and their complements.

        Where all ranks send the same bits, any reduction gives them back (a sum: times the number of ranks, exactly in
        any dtype for so few). Where two differ, ranks see a bit that is not as they sent it. A simulation compares the
        calls themselves, and off the CPU looking at the bits would make the host wait.
        """
        call = self._announced.pop() if self._announced else None
        if self.rank_status is None or x.device.type != "cpu" or self.size(axis) > 256:
            return x.new_empty(0)
        named = (
            f"{op}{x.dtype}{x.numel()}"
            if call is None
            else f"{call[0]}{paths(call[1])}{describe(flatten(call[1])[0])}"
        )
        number = zlib.crc32(named.encode())
        bits = [number >> i & 1 for i in range(32)]
        return torch.tensor(bits + [1 - bit for bit in bits], dtype=x.dtype)

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> RankFailedError | None:
        """Return the error to raise for one that communication ended in; None for any other error."""
        ended_in_it = isinstance(error, dist.DistError) or "gloo/" in str(error)
        if self.rank_status is None or isinstance(error, FaccelError) or not ended_in_it:
            return None
        ranks = dist.get_process_group_ranks(self.group(axis))
        heard = self.rank_status.call(ranks, f"{doing} over `{axis}` at {call_site()}")
        return RankFailedError(
            f"rank {dist.get_rank()} could not finish {doing}: another rank left, failed or called something else",
            got=f"{heard}; {_first_sentence(error)}",
            fix="mend what the other ranks report; `FACCEL_DEBUG=1` compares calls, shapes and lines before they meet",
        )

    @contextmanager
    def _waiting_in(self, op: str, axis: str) -> Generator[None]:
        with naming_failed_rank(op, axis, self):
            yield
        self._let_go()

    def size(self, axis: str) -> int:
        """Return how many ranks the axis has."""
        return self.group(axis).size()

    def rank(self, axis: str) -> int:
        """Return where this rank stands on the axis."""
        return self.group(axis).rank()

    def all_reduce(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Return the `op` of every rank's `x`."""
        if (
            torch.compiler.is_compiling()
        ):  # a graph takes torch's functional collectives, and cannot look at errors
            import torch.distributed._functional_collectives as funcol  # 30 ms

            total = funcol.all_reduce(x, _OPS_IN_GRAPHS[op], self.group(axis))
            return funcol.wait_tensor(total)
        marks = self._marks(x, op, axis)
        out = torch.cat([x.reshape(-1), marks]) if len(marks) else x.clone()
        with self._waiting_in("all_reduce", axis):
            dist.all_reduce(self._hand_over(out), op=_OPS[op], group=self.group(axis))
        if not len(marks):
            return out
        if not torch.equal(out[-len(marks) :], marks * self.size(axis) if op == "sum" else marks):
            raise DesyncError(
                "ranks disagree about operation, leaves, shapes or dtypes in one reduction",
                got=f"rank {dist.get_rank()}: {op} of {describe([x])} over `{axis}` at {call_site()}",
                fix="send the same on every rank; `FACCEL_DEBUG=1` shows what each of them sends",
            )
        return out[: -len(marks)].clone().view(x.shape)

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return every rank's `x` along a new first dimension."""
        size = self.size(axis)
        flat = x.new_empty(size * x.numel())
        if flat.numel():
            # gloo's threads hold views of the output, which count as references to `flat` and to nothing else: so it is
            # what has to be kept, and what the caller gets is a copy.
            if flat.device.type == "cpu":
                self.in_flight.append(flat)
            with self._waiting_in("all_gather", axis):
                _all_gather_single(flat, self._hand_over(x), group=self.group(axis))
        return flat.clone().view(size, *x.shape)

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Return the `x` of rank `src` of the axis."""
        out = x.clone()
        if out.numel():
            with self._waiting_in("broadcast", axis):
                dist.broadcast(self._hand_over(out), group_src=src, group=self.group(axis))
        return out

    def all_to_all(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return each rank's row for this rank."""
        out = torch.empty_like(x)
        if out.numel():
            with self._waiting_in("all_to_all", axis):
                dist.all_to_all_single(
                    self._hand_over(out), self._hand_over(x), group=self.group(axis)
                )
        return out

    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Return this rank's row of rank `src`'s `rows`."""
        out = torch.empty_like(like)
        if out.numel():
            parts = None if rows is None else [self._hand_over(row) for row in rows]
            with self._waiting_in("scatter", axis):
                dist.scatter(self._hand_over(out), parts, group_src=src, group=self.group(axis))
        return out

    def barrier(self, axis: str) -> None:
        """Return when every rank of the axis has called it."""
        with self._waiting_in("barrier", axis):
            dist.barrier(group=self.group(axis))
