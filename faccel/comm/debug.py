"""Debug mode: before each collective the ranks compare what they are about to do, and at which line."""

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


@attrs.frozen(eq=False)
class DebugCollectives:
    """Collectives whose ranks meet in the store of the world before each one.

    Each rank of the axis posts what it is about to do, the first one compares and posts the verdict: two round trips.
    A collective that somebody does not join, or joins with another shape, dtype, leaf or from another line, never
    begins. The store is nobody's process group, so that what is compared cannot meet what torch's engines send.

    Args:
        inner: What communicates.
        store: Of the world.
        timeout_s: Seconds for which the others are waited for.
        number: Of the context among those of this world, the same on every rank.
    """

    inner: TorchCollectives
    store: dist.Store
    timeout_s: float
    number: int = 0
    _announced: list[str] = attrs.field(factory=list, init=False)
    _num_calls: dict[str, int] = attrs.field(factory=dict, init=False)

    def size(self, axis: str) -> int:
        """Return how many ranks the axis has."""
        return self.inner.size(axis)

    def rank(self, axis: str) -> int:
        """Return where this rank stands on the axis."""
        return self.inner.rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the process group of the axis."""
        return self.inner.group(axis)

    def set_call_label(self, call: str, x: Tree) -> None:
        """Remember for which call of the user's the next collective is."""
        named = zip(paths(x, "x"), flatten(x)[0], strict=True)
        self._announced[:] = [
            f"{call} of {', '.join(f'{name}: {describe([leaf])}' for name, leaf in named)}"
        ]

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> Exception | None:
        """Return the error to raise for one that communication ended in."""
        return self.inner.as_rank_error(error, doing, axis)

    def close(self) -> None:
        """Refuse to communicate from now on."""
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
        self._compare(f"scatter(src={src})", like, axis)
        return self.inner.scatter(rows, like, src, axis)

    def barrier(self, axis: str) -> None:
        """Compare, then wait."""
        self._compare("barrier", None, axis)
        self.inner.barrier(axis)

    def _compare(self, op: str, x: torch.Tensor | None, axis: str) -> None:
        try:
            got = self._verdict(op, x, axis)
        except dist.DistError as error:  # the store is gone, with the rank that served it
            raise_naming_rank(error, op, axis, self)
        if got != _SAME:
            raise DesyncError(
                "ranks disagree about the next collective",
                got=got,
                fix="make the same call, with the same shapes and dtypes, from the same line on every rank",
            )

    def _verdict(self, op: str, x: torch.Tensor | None, axis: str) -> str:
        ranks, me = dist.get_process_group_ranks(self.group(axis)), dist.get_rank()
        room = f"{self.number}-{zlib.crc32(str(ranks).encode()):x}"  # the same on every axis of these ranks
        number = self._num_calls[room] = self._num_calls.get(room, 0) + 1
        call = (
            self._announced.pop()
            if self._announced
            else op
            if x is None
            else f"{op} of {describe([x])}"
        )
        keys = [f"debug/{room}/{number}/{rank}" for rank in ranks]
        verdict = f"debug/{room}/{number}/verdict"
        self.store.set(keys[ranks.index(me)], f"{call} over `{axis}` at {call_site()}")
        if me == ranks[0]:
            self._wait(keys, ranks)
            doing = self._read(keys, ranks)
            self.store.set(
                verdict, _SAME if len(set(doing.values())) == 1 else describe_ranks(doing)
            )
            for key in (*keys, verdict):  # those of the last call, which everybody has read
                self.store.delete_key(key.replace(f"/{number}/", f"/{number - 1}/"))
        else:
            self._wait([verdict], ranks[:1])
        return (
            self.store.get(verdict).decode()
            if self.store.check([verdict])
            else describe_ranks(self._read(keys, ranks))
        )

    def _wait(self, keys: Sequence[str], ranks: Sequence[int]) -> None:
        """Return when the keys of `ranks` are there, one of the ranks that lack them has left, or time is up."""
        if self.inner.rank_status is None:  # in a simulation, whose store lets the others run
            self.store.wait(list(keys))
            return
        deadline, pause = time.monotonic() + self.timeout_s, 1e-4
        while not self.store.check(list(keys)) and time.monotonic() < deadline:
            if any(
                self._has_left(r) and not self.store.check([k])
                for k, r in zip(keys, ranks, strict=True)
            ):
                return
            time.sleep(
                pause
            )  # not `wait`, which prints a line of C++ for each time that it ends in vain
            pause = min(2 * pause, 0.05)

    def _has_left(self, rank: int) -> str | None:
        return self.inner.rank_status and self.inner.rank_status.heard(rank)

    def _read(self, keys: Sequence[str], ranks: Sequence[int]) -> dict[int, str]:
        return {
            rank: self.store.get(key).decode()
            if self.store.check([key])
            else self._has_left(rank) or f"did not come in {self.timeout_s:g} s"
            for rank, key in zip(ranks, keys, strict=True)
        }
