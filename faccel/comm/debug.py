"""Debug mode: before each collective the ranks compare operation, shapes, dtypes and call site."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence

import attrs
import torch
import torch.distributed as dist

from faccel.call_site import call_site, describe_ranks
from faccel.comm.collectives import TorchCollectives
from faccel.comm.pack import describe
from faccel.comm.rank_errors import raise_naming_rank
from faccel.errors import DesyncError
from faccel.tree import Tree, flatten, paths

_SAME = "the same"
# Polling begins fast, because ranks that arrive together wait for each other in each collective. It
# slows down to 20 requests per second while a rank waits for a straggler.
_FIRST_POLL_S = 1e-4
_MAX_POLL_S = 0.05


@attrs.frozen(eq=False)
class DebugCollectives:
    """Collectives that compare the ranks' calls through the store of the world first.

    Each rank of the axis posts its call. The first one compares them and posts the result: two
    round trips. A collective does not begin if a rank is missing, or calls another operation, with
    another shape, dtype or leaf, or from another line. The store belongs to no process group, so
    the comparison cannot interfere with PyTorch's collectives.

    Args:
        inner: The collectives that communicate.
        store: The store of the world.
        timeout_s: Seconds to wait for the other ranks.
        number: Index of the context among those of this world, the same on every rank.
    """

    inner: TorchCollectives
    store: dist.Store
    timeout_s: float
    number: int = 0
    _label: list[str] = attrs.field(factory=list, init=False)  # at most one, of the next collective
    _num_calls: dict[str, int] = attrs.field(factory=dict, init=False)

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
        leaves: list[str] = []
        for name, leaf in zip(paths(x, "x"), flatten(x)[0], strict=True):
            leaves.append(f"{name}: {describe([leaf])}")
        self._label[:] = [f"{call} of {', '.join(leaves)}"]

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> Exception | None:
        """Return the error that names the failed rank; None if `error` has another cause."""
        return self.inner.as_rank_error(error, doing, axis)

    def close(self) -> None:
        """Raise in every later call."""
        self.inner.close()

    def all_reduce(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Compare, then reduce."""
        self._compare(f"all_reduce({op})", x, axis)
        return self.inner.all_reduce(x, op, axis)

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Compare, then gather."""
        self._compare("all_gather", x, axis)
        return self.inner.all_gather(x, axis)

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Compare, then broadcast."""
        self._compare(f"broadcast(src={src})", x, axis)
        return self.inner.broadcast(x, src, axis)

    def all_to_all(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Compare, then exchange."""
        self._compare("all_to_all", x, axis)
        return self.inner.all_to_all(x, axis)

    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Compare, then scatter."""
        # `like`, because `rows` is None on every rank but the source.
        self._compare(f"scatter(src={src})", like, axis)
        return self.inner.scatter(rows, like, src, axis)

    def barrier(self, axis: str) -> None:
        """Compare, then wait."""
        self._compare("barrier", None, axis)
        self.inner.barrier(axis)

    def _compare(self, op: str, x: torch.Tensor | None, axis: str) -> None:
        call = op
        if x is not None:
            call = f"{op} of {describe([x])}"
        # The user's call instead of the collective that implements it.
        if self._label:
            call = self._label.pop()
        try:
            result = self._exchange(f"{call} over `{axis}` at {call_site()}", axis)
        except dist.DistError as error:  # the process that serves the store has ended
            raise_naming_rank(error, op, axis, self)
        if result != _SAME:
            raise DesyncError(
                "ranks disagree about the next collective",
                got=result,
                fix="make the same call, with the same shapes and dtypes, from the same line on "
                "every rank",
            )

    def _exchange(self, call: str, axis: str) -> str:
        """Post this rank's call; return `_SAME`, or the call of each rank."""
        ranks, own_rank = dist.get_process_group_ranks(self.group(axis)), dist.get_rank()
        # the same key for every axis with these ranks: they may disagree about the axis
        group_key = f"{self.number}-{zlib.crc32(str(ranks).encode()):x}"
        # Collectives of one group are matched by their order, so their index identifies them.
        number = self._num_calls.get(group_key, 0) + 1
        self._num_calls[group_key] = number
        prefix = f"debug/{group_key}/{number}"
        keys = [f"{prefix}/{rank}" for rank in ranks]
        result_key = f"{prefix}/result"
        self.store.set(keys[ranks.index(own_rank)], call)
        if own_rank == ranks[0]:
            self._wait(keys, ranks)
            calls = self._read(keys, ranks)
            is_same = len(set(calls.values())) == 1
            self.store.set(result_key, _SAME if is_same else describe_ranks(calls))
            # The store would grow with each call. Every rank that posted this call has read the
            # result of the previous one, so the keys of that one are not needed any more.
            for key in (*keys, result_key):
                self.store.delete_key(key.replace(f"/{number}/", f"/{number - 1}/"))
        else:
            self._wait([result_key], ranks[:1])
        if self.store.check([result_key]):
            return self.store.get(result_key).decode()
        # The first rank of the group has left or hangs, so no result comes. The calls that were
        # posted still show which rank is missing.
        return describe_ranks(self._read(keys, ranks))

    def _wait(self, keys: Sequence[str], ranks: Sequence[int]) -> None:
        """Return when all keys exist, a rank without its key has left, or after a timeout."""
        if self.inner.rank_status is None:  # in a simulation, whose store runs the other ranks
            self.store.wait(list(keys))
            return
        deadline = time.monotonic() + self.timeout_s
        pause_s = _FIRST_POLL_S
        while not self.store.check(list(keys)) and time.monotonic() < deadline:
            for key, rank in zip(keys, ranks, strict=True):
                # In this order: a rank posts its call first and leaves afterwards, so a status
                # without a key means that the key will never come.
                if self._status(rank) and not self.store.check([key]):
                    return
            # not `Store.wait`, which prints a line from C++ at each timeout
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_POLL_S)

    def _status(self, rank: int) -> str | None:
        """Return the status of a rank that has left or failed."""
        if self.inner.rank_status is None:
            return None
        return self.inner.rank_status.read(rank)

    def _read(self, keys: Sequence[str], ranks: Sequence[int]) -> dict[int, str]:
        """Return the call of each rank, or why there is none."""
        calls: dict[int, str] = {}
        for rank, key in zip(ranks, keys, strict=True):
            if self.store.check([key]):
                calls[rank] = self.store.get(key).decode()
            else:
                calls[rank] = self._status(rank) or f"no call within {self.timeout_s:g} s"
        return calls
