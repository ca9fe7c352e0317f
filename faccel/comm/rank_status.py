"""What became of each rank, told through the store of the world: so that an error can name who is missing, and why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import torch.distributed as dist

from faccel.call_site import describe_ranks
from faccel.errors import FaccelError

_POLL_S = 0.02


class RankStatus:
    """One rank's place on the describe_ranks. Nothing is sent until something has gone wrong, or a rank leaves.

    Args:
        store: Of the world. It may be gone together with the process that serves it: then nobody is heard of.
        rank: This rank of the world.
        generation: How often contexts have begun in this world, after none was left.
        patience_s: Seconds for which the others are waited for.
    """

    def __init__(
        self, store: dist.Store, rank: int, generation: int, patience_s: float = 3.0
    ) -> None:
        self._store, self._rank, self._generation, self._patience_s = (
            store,
            rank,
            generation,
            patience_s,
        )
        self._has_told = False

    def _key(self, rank: int) -> str:
        return f"describe_ranks/{self._generation}/{rank}"

    def _post(self, doing: str) -> None:
        self._has_told = True
        with suppress(dist.DistError):  # the store may be gone, and nobody left to tell
            self._store.set(self._key(self._rank), doing)

    def leave(self, error: BaseException | None) -> None:
        """Tell the others that this rank leaves, and why, unless it has told already that it failed."""
        if not self._has_told:
            told = (
                error.problem if isinstance(error, FaccelError) else str(error).partition("\n")[0]
            )
            self._post("left" if error is None else f"raised {type(error).__name__}: {told}")

    def heard(self, rank: int) -> str | None:
        """Return what a rank has told of itself so far, None if nothing."""
        try:
            key = self._key(rank)
            return self._store.get(key).decode() if self._store.check([key]) else None
        except dist.DistError:
            return None

    def call(self, ranks: Sequence[int], doing: str) -> str:
        """Tell the others that this rank fails in `doing`; say what is known of each of `ranks`."""
        self._post(doing)
        deadline = time.monotonic() + self._patience_s
        return describe_ranks(
            {rank: doing if rank == self._rank else self._ask(rank, deadline) for rank in ranks}
        )

    def _ask(self, rank: int, deadline: float) -> str:
        while (told := self.heard(rank)) is None and time.monotonic() < deadline:
            time.sleep(
                _POLL_S
            )  # not `wait`, which prints a line of C++ for each time that it ends in vain
        return told or "not heard of"
