"""Debug mode: before each collective the ranks compare operation, shapes, dtypes and call site."""

from __future__ import annotations

import attrs
import torch
import torch.distributed as dist
from torch import nn

from faccel.call_site import call_site
from faccel.comm.call_exchange import CallExchange
from faccel.comm.collectives import TorchCollectives
from faccel.comm.compared_call import ComparedCall, described_call, name_model
from faccel.comm.debug_group import already_compared
from faccel.comm.pack import describe
from faccel.comm.rank_errors import raise_naming_rank
from faccel.comm.rank_status import StoreCounter
from faccel.comm.single import FixedCounter, NoTurn
from faccel.comm.turn import WorldTurn
from faccel.lifetime import WaitTimes, counted
from faccel.mesh import WORLD
from faccel.tree import Tree


@attrs.frozen(eq=False)
class DebugCollectives:
    """Collectives that compare the ranks' calls through the store of the world first.

    A collective does not begin if a rank is missing, or calls another operation, with another
    shape, dtype or leaf, or from another line.

    Args:
        inner: The collectives that communicate.
        exchange: Compares the calls.
    """

    inner: TorchCollectives
    exchange: CallExchange
    _label: list[str] = attrs.field(factory=list, init=False)  # at most one, of the next collective
    _models: list[str] = attrs.field(factory=list, init=False, repr=False)  # those that were named

    @property
    def recovery(self) -> None:
        """None: in debug mode ranks compare their calls in the store, where they wait."""

    def size(self, axis: str) -> int:
        """Return the number of ranks of the axis."""
        return self.inner.size(axis)

    def rank(self, axis: str) -> int:
        """Return the index of this rank on the axis."""
        return self.inner.rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the process group of the axis."""
        return self.inner.group(axis)

    def set_call_label(self, call: str, x: Tree) -> None:
        """Set the name of the user's call that the next collective belongs to."""
        # Before packing: a row of bytes has no names, and different leaves may have equal rows.
        self._label[:] = [described_call(call, x)]

    def name_model(self, model: nn.Module) -> None:
        """Give the units of a model names, by which ranks compare what they communicate."""
        self._models.append(type(model).__name__)
        name_model(model, len(self._models))

    def count_waits(self, waits: WaitTimes) -> None:
        """Count the time of collectives on the host in `waits`, comparisons included."""
        self.inner.count_waits(waits)

    def begin_call(self, call: str) -> None:
        """Compare the call with those of the other ranks."""
        self._compare(call, None, WORLD)

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> Exception | None:
        """Return the error that names the failed rank; None if `error` has another cause."""
        return self.inner.as_rank_error(error, doing, axis)

    def new_turn(self, *, local: bool, timeout_s: float) -> WorldTurn | NoTurn:
        """Compare, then return the next turn of `main_first`."""
        # Now, and not after the body: ranks that make another call would be waited for.
        self._compare("main_first", None, WORLD)
        return self.inner.new_turn(local=local, timeout_s=timeout_s)

    def new_counter(self) -> FixedCounter | StoreCounter:
        """Compare, then return a counter."""
        self._compare("new_counter", None, WORLD)
        return self.inner.new_counter()

    def close(self) -> None:
        """Raise in every later call."""
        self.inner.close()

    def all_reduce(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Compare, then reduce."""
        self._compare(f"all_reduce({op})", x, axis)
        with already_compared():
            return self.inner.all_reduce(x, op, axis)

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Compare, then gather."""
        self._compare("all_gather", x, axis)
        with already_compared():
            return self.inner.all_gather(x, axis)

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Compare, then broadcast."""
        self._compare(f"broadcast(src={src})", x, axis)
        with already_compared():
            return self.inner.broadcast(x, src, axis)

    def all_to_all(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Compare, then exchange."""
        self._compare("all_to_all", x, axis)
        with already_compared():
            return self.inner.all_to_all(x, axis)

    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Compare, then scatter."""
        # `like`, because `rows` is None on every rank but the source.
        self._compare(f"scatter(src={src})", like, axis)
        with already_compared():
            return self.inner.scatter(rows, like, src, axis)

    def barrier(self, axis: str) -> None:
        """Compare, then wait."""
        self._compare("barrier", None, axis)
        with already_compared():
            self.inner.barrier(axis)

    def _compare(self, op: str, x: torch.Tensor | None, axis: str) -> None:
        call = op
        if x is not None:
            call = f"{op} of {describe([x])}"
        # The user's call instead of the collective that implements it.
        if self._label:
            call = self._label.pop()
        ranks = dist.get_process_group_ranks(self.group(axis))
        # From one line for each operation: faccel's functions are called the same way on all ranks.
        compared = ComparedCall(f"{call} over `{axis}`", "", call_site(), True)
        try:
            with counted(self.inner.waits):  # here a rank waits for the others
                self.exchange.compare(compared, ranks, dist.get_rank(), axis)
        except dist.DistError as error:  # the process that serves the store has ended
            raise_naming_rank(error, op, axis, self)
