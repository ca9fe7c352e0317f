"""Ranks compare the calls that they are about to make, through the store of the world."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Mapping, Sequence

import attrs
import torch.distributed as dist

from faccel.call_site import describe_ranks
from faccel.comm.compared_call import ComparedCall
from faccel.comm.rank_status import RankStatus, is_failure
from faccel.comm.world_store import WorldStore
from faccel.errors import DesyncError, RankFailedError

_SAME = "the same"
# Polling begins fast, because ranks that arrive together wait for each other in each collective. It
# slows down to 20 requests per second while a rank waits for a straggler.
_FIRST_POLL_S = 1e-4
_MAX_POLL_S = 0.05


@attrs.frozen(eq=False)
class CallExchange:
    """Compares the calls of the ranks of a group before they communicate.

    Each rank posts its call. The first one compares them and posts the result: two round trips. The
    store belongs to no process group, so the comparison cannot interfere with collectives.

    Args:
        store: The store of the world.
        timeout_s: Seconds to wait for the other ranks.
        name: A prefix of the keys: equal on all ranks, and other than those of other exchanges.
    """

    store: dist.Store | WorldStore
    timeout_s: float
    name: str
    _rank_status: list[RankStatus] = attrs.field(factory=list, init=False)  # at most one
    _num_calls: dict[str, int] = attrs.field(factory=dict, init=False)

    def set_rank_status(self, rank_status: RankStatus | None) -> None:
        """Set the status of the other ranks, by which a rank that has left is not waited for."""
        self._rank_status[:] = [] if rank_status is None else [rank_status]

    def compare(
        self, call: ComparedCall, ranks: Sequence[int], own_rank: int, group: str = ""
    ) -> None:
        """Return when all `ranks` are about to make the same call.

        Args:
            call: The call of this rank.
            ranks: The ranks of the group, as ranks of the world.
            own_rank: This rank of the world.
            group: The name of the group. Threads beside the main thread, whose order differs
                between ranks, are compared for each group alone.

        Raises:
            DesyncError: Ranks make different calls, or a rank makes none; names all of them.
            RankFailedError: A rank makes none because it has raised.
        """
        result = self._exchange(call, ranks, own_rank, group)
        if result != _SAME:
            failed_ranks, got = json.loads(result)
            # Not a mistake in the order of calls, which is what the other error is about.
            if failed_ranks:
                raise RankFailedError(
                    f"rank {failed_ranks[0]} failed, so all ranks stop",
                    got=got,
                    fix="fix the error of that rank",
                )
            raise DesyncError(
                "ranks disagree about the next collective",
                got=got,
                fix="make the same call, of the same values with the same shapes and dtypes, from "
                "the same line on every rank",
            )

    def _exchange(self, call: ComparedCall, ranks: Sequence[int], own_rank: int, group: str) -> str:
        """Post this rank's call; return `_SAME`, or what `_described` returns."""
        # the same key for every group of these ranks: they may disagree about the group
        group_key = f"{self.name}-{zlib.crc32(str(list(ranks)).encode()):x}"
        # The ranks of a simulation, which has no status of ranks, are threads.
        is_real = bool(self._rank_status)
        if is_real and threading.current_thread() is not threading.main_thread():
            group_key += group
        # Collectives of one group are matched by their order, so their index identifies them.
        number = self._num_calls.get(group_key, 0) + 1
        self._num_calls[group_key] = number
        prefix = f"debug/{group_key}/{number}"
        keys = [f"{prefix}/{rank}" for rank in ranks]
        result_key = f"{prefix}/result"
        self.store.set(keys[ranks.index(own_rank)], json.dumps(attrs.astuple(call)))
        if own_rank == ranks[0]:
            self._wait(keys, ranks)
            calls = self._read(keys, ranks)
            self.store.set(result_key, _compared(call, calls))
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
        return _described(self._read(keys, ranks))

    def _wait(self, keys: Sequence[str], ranks: Sequence[int]) -> None:
        """Return when all keys exist, a rank without its key has left, or after a timeout."""
        if not self._rank_status:  # in a simulation, whose store runs the other ranks
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
        if not self._rank_status:
            return None
        return self._rank_status[0].read(rank)

    def _read(self, keys: Sequence[str], ranks: Sequence[int]) -> dict[int, ComparedCall | str]:
        """Return the call of each rank, or why there is none."""
        calls: dict[int, ComparedCall | str] = {}
        for rank, key in zip(ranks, keys, strict=True):
            if self.store.check([key]):
                calls[rank] = ComparedCall(*json.loads(self.store.get(key)))
            else:
                calls[rank] = self._status(rank) or f"no call within {self.timeout_s:g} s"
        return calls


def _compared(call: ComparedCall, calls: Mapping[int, ComparedCall | str]) -> str:
    """Return `_SAME`, or what `_described` returns."""
    for other in calls.values():
        if isinstance(other, str) or call.differs_from(other):
            return _described(calls)
    return _SAME


def _described(calls: Mapping[int, ComparedCall | str]) -> str:
    """Return the ranks that have raised, and the call of each rank, as JSON."""
    # The subjects only where they make the difference: operations that differ explain enough.
    is_one_op = len({call.op for call in calls.values() if isinstance(call, ComparedCall)}) == 1
    actions: dict[int, str] = {}
    failed_ranks: list[int] = []
    for rank, call in calls.items():
        if isinstance(call, str) and is_failure(call):
            failed_ranks.append(rank)
        if isinstance(call, ComparedCall) and is_one_op:
            actions[rank] = call.shown(call)
        else:
            actions[rank] = str(call)
    return json.dumps([failed_ranks, describe_ranks(actions)])
