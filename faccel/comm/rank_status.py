"""The status of each rank in the store of the world, so that errors can name the failed rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import torch.distributed as dist

from faccel.call_site import call_site, describe_ranks
from faccel.comm.world_store import WorldStore, without_frames
from faccel.errors import summary

_RAISED = "raised "
_POLL_S = 0.02  # only after an error, so a rank never polls while training runs


def is_failure(status: str) -> bool:
    """Return whether a rank with this status has left with an error.

    Effects: pure.
    """
    return status.startswith(_RAISED)


class StoreCounter:
    """A number in the store of the world, which each rank increases.

    Args:
        store: The store.
        key: Of the number.
    """

    def __init__(self, store: dist.Store | WorldStore, key: str) -> None:
        self._store, self._key = store, key

    def next(self) -> int:
        """Return the smallest number that no rank has got yet."""
        return self._store.add(self._key, 1) - 1


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
        self, store: dist.Store | WorldStore, rank: int, generation: int, patience_s: float = 3.0
    ) -> None:
        self.store = store
        self.rank = rank
        self._generation = generation
        self._patience_s = patience_s
        self._has_posted = False
        # A store that has ended stays so, and its client prints 20 lines from C++ at each request.
        self._has_store_ended = False
        self._num_turns = 0
        self._num_counters = 0
        self._num_renewals = 0
        self.call_prefix = f"call/{generation}"
        """Of the keys of calls that ranks compare."""
        self._left_key = f"rank_status/{generation}/left"
        self._joined_key = ""
        self._num_joined = 0

    def renew(self) -> None:
        """Use other keys for calls and positions: groups that were renewed count from 0."""
        self._num_renewals += 1
        self.call_prefix = f"call/{self._generation}/renewed/{self._num_renewals}"

    def new_turn(self) -> str:
        """Return the prefix of the keys of the next `main_first`: equal on all ranks, and new."""
        # All contexts of a process share this object, and all ranks make the calls in one order.
        self._num_turns += 1
        prefix = f"turn/{self._generation}"
        if self.rank == 0:
            # The store would grow with each turn. All ranks have left the previous one.
            self._delete_turn(f"{prefix}/{self._num_turns - 1}")
        return f"{prefix}/{self._num_turns}"

    def new_counter(self) -> StoreCounter:
        """Return a counter from 0, which all ranks increase. All ranks must call it."""
        # All ranks make the calls in one order, so they compute equal keys without a message.
        self._num_counters += 1
        return StoreCounter(self.store, f"counter/{self._generation}/{self._num_counters}")

    def _delete_turn(self, prefix: str) -> None:
        with suppress(dist.DistError):  # the store may have ended; ranks that wait report it
            num_first = self.store.add(f"{prefix}/first", 0)
            numbered = [f"{prefix}/first/{number + 1}" for number in range(num_first)]
            for key in (f"{prefix}/arrived", f"{prefix}/first", *numbered):
                self.store.delete_key(key)

    def _key(self, rank: int) -> str:
        # The store outlives a shutdown: "left" of an earlier generation must not be read again.
        return f"rank_status/{self._generation}/{rank}"

    def _post(self, status: str) -> None:
        self._has_posted = True
        with without_frames():
            self.write_key(self._key(self.rank), status)

    def write_position(self, position: str) -> None:
        """Write where this rank is."""
        self.write_key(self._position_key(self.rank), position)

    def read_position(self, rank: int) -> str | None:
        """Return where a rank was when it wrote its position the last time, None if never."""
        return self.read_key(self._position_key(rank))

    def _position_key(self, rank: int) -> str:
        return f"position/{self._generation}/{self._num_renewals}/{rank}"

    def write_key(self, key: str, value: str) -> None:
        """Set a key of the store, unless the store has ended."""
        if self._has_store_ended:
            return
        try:
            self.store.set(key, value)
        except dist.DistError as error:
            self.note(error)

    def join(self, world_size: int) -> None:
        """Post that this rank has connected the groups that it creates together with all ranks."""
        # All ranks create their groups in one order.
        self._num_joined += 1
        self._joined_key = f"rank_status/{self._generation}/joined/{self._num_joined}"
        if self.store.add(f"{self._joined_key}/count", 1) == world_size:
            self.store.set(self._joined_key, "")

    def wait_until_all_joined(self, timeout_s: float) -> None:
        """Return when all ranks have connected the newest groups, or if one of them has left.

        Connecting takes a rank longer than another one. It would fail if the other one, which has
        no work or an error, closed its connections meanwhile.
        """
        if not self._num_joined:  # this rank has connected nothing that others wait for
            return
        deadline = time.monotonic() + timeout_s
        keys = (self._joined_key, self._left_key)
        # Usually at the first look: ranks that have worked together are connected.
        while all(self._read_quietly(key) is None for key in keys):
            if self._has_store_ended or time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)

    def leave(self, error: BaseException | None) -> None:
        """Post that this rank leaves, and its error, unless it has posted a failure before."""
        # The first post is the cause: what follows, such as a RankFailedError, is its consequence.
        if not self._has_posted:
            status = self.leaving()
            if error is not None:
                status = f"{_RAISED}{summary(error)}"
            self._post(status)
        # After the status, which the readers of this key report.
        self.write_key(self._left_key, "")

    def leaving(self) -> str:
        """Return the status of a rank that leaves without an error, with its line."""
        site = call_site()
        if site == "unknown":  # at the end of the process
            return "left at the end of the program"
        return f"left at {site}"

    def has_any_left(self) -> bool:
        """Return whether any rank has left, with or without an error.

        Raises:
            dist.DistError: The store has ended.
        """
        return self.store.check([self._left_key])

    def read(self, rank: int) -> str | None:
        """Return the status that a rank has posted, None if there is none."""
        return self.read_key(self._key(rank))

    def read_key(self, key: str) -> str | None:
        """Return the value of a key of the store, None if there is none."""
        if self._has_store_ended:
            return None
        try:
            # `get` alone would block until the key exists.
            if self.store.check([key]):
                return self.store.get(key).decode()
        except dist.DistError as error:
            self.note(error)
        return None

    def note(self, error: dist.DistError) -> None:
        """Stop using the store if this error of a request means that it has ended."""
        if isinstance(error, dist.DistNetworkError):
            self._has_store_ended = True

    def report(self, ranks: Sequence[int], doing: str) -> str:
        """Post that this rank fails in `doing`; return the status of each of `ranks`."""
        # Before waiting: the other ranks may be waiting for the status of this one.
        self._post(doing)
        # One deadline for all ranks: an error takes `patience_s`, however many ranks are silent.
        deadline = time.monotonic() + self._patience_s
        statuses: dict[int, str] = {}
        for rank in ranks:
            if rank == self.rank:
                statuses[rank] = doing
            else:
                statuses[rank] = self._wait(rank, deadline) or "no status"
        return describe_ranks(statuses)

    def _wait(self, rank: int, deadline: float) -> str | None:
        status = self._read_quietly(self._key(rank))
        while status is None and not self._has_store_ended and time.monotonic() < deadline:
            # not `Store.wait`, which prints a line from C++ at each timeout
            time.sleep(_POLL_S)
            status = self._read_quietly(self._key(rank))
        return status

    def _read_quietly(self, key: str) -> str | None:
        with without_frames():
            return self.read_key(key)
