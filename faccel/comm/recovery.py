"""Lets all ranks of real processes leave their collectives together, and communicate again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import torch.distributed as dist

from faccel.comm.rank_status import RankStatus

_FIRST_POLL_S = 0.001
_MAX_POLL_S = 0.05
# The first rank waits for the reports, the others for its answer: they wait for longer.
_ANSWER_S = 2.0


class Interruptible(Protocol):
    """The connections of the process groups."""

    def close(self) -> None:
        """End the collectives of this rank and of its peers."""
        ...

    @property
    def can_renew(self) -> bool:
        """Whether `renew` is possible."""
        ...


class ProcessRecovery:
    """The `Recovery` of real processes on gloo.

    Reports go through the store of the world, because the connections of the groups are closed.

    Args:
        connections: The connections of all groups.
        rank_status: The status of the ranks of the world, with its store.
        num_ranks: Ranks of the world.
        timeout_s: Of the context; the others have a tenth of it to report.
        renew: Connects all groups again, with keys below a prefix.
    """

    def __init__(
        self,
        connections: Interruptible,
        rank_status: RankStatus,
        num_ranks: int,
        timeout_s: float,
        renew: Callable[[str], None],
    ) -> None:
        self._connections = connections
        self._rank_status = rank_status
        self._num_ranks = num_ranks
        self._limit_s = timeout_s / 10
        self._renew = renew
        self._num_rounds = 0
        self._keys = f"{rank_status.call_prefix}/recovery"  # now: calls use other keys later
        self.is_active = False

    def interrupt(self) -> None:
        """End the collectives of this rank, and so those of the ranks that wait for it."""
        self._connections.close()

    def exchange(self, report: str) -> list[str | None]:
        """Return the report of each rank; None for one that has ended or does not come in time."""
        prefix = self._prefix(self._num_rounds)
        rank = self._rank_status.rank
        reports: list[str | None] = [None] * self._num_ranks
        reports[rank] = report
        with suppress(dist.DistError):  # the store has ended, and with it the first rank
            self._rank_status.store.set(f"{prefix}/{rank}", report)
            if rank == 0:
                # One rank decides who has reported, or ranks would disagree about a late one.
                reports = self._collect(prefix)
                self._rank_status.store.set(f"{prefix}/answer", json.dumps(reports))
                self._delete_previous()
            elif self._wait([f"{prefix}/answer"], [0], self._limit_s + _ANSWER_S):
                reports = json.loads(self._rank_status.store.get(f"{prefix}/answer"))
        self._num_rounds += 1
        return reports

    def renew(self) -> bool:
        """Connect all groups again; return whether that was possible. Collective."""
        if not self._connections.can_renew:
            return False
        self._renew(f"{self._keys}/renewed/{self._num_rounds}")
        return True

    def _collect(self, prefix: str) -> list[str | None]:
        keys = [f"{prefix}/{rank}" for rank in range(self._num_ranks)]
        self._wait(keys, range(self._num_ranks), self._limit_s)
        return [self._rank_status.read_key(key) for key in keys]

    def _wait(self, keys: list[str], ranks: Sequence[int], limit_s: float) -> bool:
        """Return whether all keys came, before one of `ranks` ended and before the limit."""
        store = self._rank_status.store
        deadline = time.monotonic() + limit_s
        pause_s = _FIRST_POLL_S
        while not store.check(keys):
            has_ended = any(self._rank_status.read(rank) for rank in ranks)
            if has_ended or time.monotonic() > deadline:
                return store.check(keys)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_POLL_S)
        return True

    def _prefix(self, number: int) -> str:
        return f"{self._keys}/{number}"

    def _delete_previous(self) -> None:
        """Delete the keys of the previous round: a rank that has reported again has read them."""
        prefix = self._prefix(self._num_rounds - 1)
        for name in (*range(self._num_ranks), "answer"):
            self._rank_status.store.delete_key(f"{prefix}/{name}")
