"""What became of each rank, told through the store of the world: so that an error can name who is missing, and why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from faccel.whereabouts import roll


class RollCall:
    """One rank's place on the roll. Nothing is sent until something has gone wrong, or a rank leaves.

    Args:
        store: Of the world. It may be gone together with the process that serves it: then nobody is heard of.
        rank: This rank of the world.
        patience_s: Seconds for which the others are waited for.
    """

    def __init__(self, store: dist.Store, rank: int, patience_s: float = 3.0) -> None:
        self._store, self._rank, self._patience_s = store, rank, patience_s
        self._has_told = False
        with suppress(dist.DistError):  # of a context that this one follows in the same world
            store.delete_key(f"roll/{rank}")

    def post(self, doing: str) -> None:
        """Tell the others what became of this rank."""
        self._has_told = True
        with suppress(dist.DistError):  # the store may be gone, and nobody left to tell
            self._store.set(f"roll/{self._rank}", doing)

    def leave(self) -> None:
        """Tell the others that this rank left, unless it has told something that explains why."""
        if not self._has_told:
            self.post("left")

    def heard(self, rank: int) -> str | None:
        """Return what a rank has told of itself so far, None if nothing."""
        key = f"roll/{rank}"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except dist.DistError:
            return None

    def call(self, ranks: Sequence[int], doing: str) -> str:
        """Tell the others that this rank fails in `doing`; say what is known of each of `ranks`."""
        self.post(doing)
        deadline = time.monotonic() + self._patience_s
        return roll({rank: doing if rank == self._rank else self._ask(rank, deadline) for rank in ranks})

    def _ask(self, rank: int, deadline: float) -> str:
        with suppress(dist.DistError):
            self._store.wait([f"roll/{rank}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        return self.heard(rank) or "not heard of"
