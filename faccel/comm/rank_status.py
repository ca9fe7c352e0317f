"""The status of each rank in the store of the world, so that errors can name the failed rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import torch.distributed as dist

from faccel.call_site import describe_ranks
from faccel.errors import FaccelError

_POLL_S = 0.02  # only after an error, so a rank never polls while training runs


class RankStatus:
    """Reads and writes the status of ranks. Writes nothing until an error, or until a rank leaves.

    Args:
        store: The store of the world. It may end with the process that serves it; then the status
            of every rank is unknown.
        rank: This rank of the world.
        generation: How many times all contexts of this world had been shut down before.
        patience_s: Seconds to wait for the status of the other ranks.
    """

    def __init__(
        self, store: dist.Store, rank: int, generation: int, patience_s: float = 3.0
    ) -> None:
        self._store = store
        self._rank = rank
        self._generation = generation
        self._patience_s = patience_s
        self._has_posted = False

    def _key(self, rank: int) -> str:
        # The store outlives a shutdown: "left" of an earlier generation must not be read again.
        return f"rank_status/{self._generation}/{rank}"

    def _post(self, status: str) -> None:
        self._has_posted = True
        with suppress(dist.DistError):  # the store may have ended
            self._store.set(self._key(self._rank), status)

    def leave(self, error: BaseException | None) -> None:
        """Post that this rank leaves, and its error, unless it has posted a failure before."""
        # The first post is the cause: what follows, such as a RankFailedError, is its consequence.
        if self._has_posted:
            return
        if error is None:
            self._post("left")
            return
        message = str(error).partition("\n")[0]
        if isinstance(error, FaccelError):
            message = error.problem
        self._post(f"raised {type(error).__name__}: {message}")

    def read(self, rank: int) -> str | None:
        """Return the status that a rank has posted, None if there is none."""
        key = self._key(rank)
        try:
            # `get` alone would block until the key exists.
            if self._store.check([key]):
                return self._store.get(key).decode()
        except dist.DistError:
            pass
        return None

    def report(self, ranks: Sequence[int], doing: str) -> str:
        """Post that this rank fails in `doing`; return the status of each of `ranks`."""
        # Before waiting: the other ranks may be waiting for the status of this one.
        self._post(doing)
        # One deadline for all ranks: an error takes `patience_s`, however many ranks are silent.
        deadline = time.monotonic() + self._patience_s
        statuses: dict[int, str] = {}
        for rank in ranks:
            if rank == self._rank:
                statuses[rank] = doing
            else:
                statuses[rank] = self._wait(rank, deadline) or "no status"
        return describe_ranks(statuses)

    def _wait(self, rank: int, deadline: float) -> str | None:
        status = self.read(rank)
        while status is None and time.monotonic() < deadline:
            # not `Store.wait`, which prints a line from C++ at each timeout
            time.sleep(_POLL_S)
            status = self.read(rank)
        return status
