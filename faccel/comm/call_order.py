"""Ranks that make different calls raise within seconds, also without debug mode.

Functions that are called rarely, such as `save`, first exchange their names. They use a separate
process group: a rank that waits here does not interfere with a collective of the others. A rank
that waits for longer, here or in another collective of faccel, looks where the other ranks are.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from faccel.call_site import call_site, describe_ranks
from faccel.comm.position import Position, ThreadSample, call_of, sample_thread
from faccel.comm.rank_status import RankStatus
from faccel.errors import DesyncError
from faccel.torch_names import all_gather_single

_NUM_BYTES = 256  # of a call and its line; the start of a long path is cut off
_CALLS = "calls"  # the name of the group in which rare calls are compared

# The destructor of a gloo group waits for its collectives. One that has not ended ends with the
# other processes, or with this one.
_UNFINISHED_GROUPS: list[dist.ProcessGroup] = []


class CallOrder:
    """Compares the calls of all ranks of the world, in the order in which a rank makes them.

    A rank may be late by any time. It is an error if it never comes: because it makes another call,
    because it has left, or because it waits in a collective which the waiting ranks have not begun.
    For the last case a thread of each rank looks once per second whether the main thread is
    blocked. Only then it writes to the store. An ordinary step costs nothing.

    Args:
        rank_status: The status of the ranks of the world, with its store.
        group: A gloo group of all ranks for these comparisons only.
    """

    def __init__(self, rank_status: RankStatus, group: dist.ProcessGroup) -> None:
        self.slow_s = 1.0
        """Seconds after which a rank that waits looks for the others."""
        self._rank_status = rank_status
        self._group: dist.ProcessGroup | None = group
        self._rank = dist.get_rank()
        self._num_ranks = dist.get_world_size()
        self._num_calls = 0
        self._is_waiting = False  # in a collective of faccel, on the CPU
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._message_groups: list[dist.ProcessGroup] = []
        self._last_num_collectives: dict[str, int] = {}  # at the end
        # Calls of other threads have no order, and are not compared.
        self._thread_id = threading.get_ident()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="faccel-watch", daemon=True)
        self._watcher.start()

    def add_groups(
        self, groups: Iterable[dist.ProcessGroup], messages: dist.ProcessGroup | None = None
    ) -> None:
        """Add process groups, to compare how many collectives the ranks have begun.

        Args:
            groups: Process groups of this rank.
            messages: One that is left out from now on. Its ranks send each other messages, which
                gloo counts like collectives, and of which ranks have different numbers.
        """
        if messages is not None:
            self._message_groups.append(messages)
        for group in groups:
            if any(group is messages for messages in self._message_groups):
                continue
            self._groups[_name(group)] = group

    def begin(self, call: str, track: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Return when every rank of the world begins the same call.

        Args:
            call: Its name.
            track: Returns an alias of a tensor that c10d may reference for longer.

        Raises:
            DesyncError: A rank makes another call, or waits in another collective.
            RuntimeError: The communication failed: a rank has left.
        """
        if self._group is None or threading.get_ident() != self._thread_id:
            return
        self._num_calls += 1
        doing = f"{call} at {call_site()}"
        # For a rank that leaves: it has no other way to find out that this one waits.
        self._rank_status.write_key(
            self._call_key(self._num_calls), json.dumps([self._rank, doing])
        )
        # The device, because the user may have set another default.
        num_bytes = self._num_ranks * _NUM_BYTES
        rows = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        work = all_gather_single(
            track(rows), track(_to_row(doing)), group=self._group, async_op=True
        )
        self._wait(work, call, self._group, _CALLS)
        self._compare(rows.view(self._num_ranks, _NUM_BYTES))
        if self._rank == 0:
            # The store would grow with each call. No rank needs the key of the previous one.
            self._delete(self._call_key(self._num_calls - 1))

    def wait(self, work: dist.Work, call: str, group: dist.ProcessGroup) -> None:
        """Wait for a collective on the CPU, as `work.wait()` does.

        Args:
            work: The collective.
            call: Its name, for errors.
            group: Its group, which has no messages.

        Raises:
            DesyncError: The ranks wait in different collectives.
            RuntimeError: The communication failed.
        """
        if threading.get_ident() == self._thread_id:
            self._wait(work, call, group, "")
        else:
            work.wait()

    def _wait(self, work: dist.Work, call: str, group: dist.ProcessGroup, name: str) -> None:
        if _is_finished(work, self.slow_s):
            return
        name = name or _name(group)
        doing = f"{call} at {call_site()}"
        self._is_waiting = True
        reader_key = ""
        try:
            reader_key = self._look_for_others(doing, name, reader_key)
            while not _is_finished(work, self.slow_s):
                reader_key = self._look_for_others(doing, name, reader_key)
        finally:
            self._is_waiting = False
            self._delete(reader_key)
            if not work.is_completed():
                _UNFINISHED_GROUPS.append(group)

    def _compare(self, rows: torch.Tensor) -> None:
        doings = list(map(_from_row, rows))
        # The lines may differ: `if ctx.is_main: save(a, ...) else: save(b, ...)` is one call.
        if len(set(map(call_of, doings))) > 1:
            raise _error(_described(dict(enumerate(doings))), doings[self._rank])

    def _look_for_others(self, doing: str, name: str, reader_key: str) -> str:
        """Raise if a rank never comes.

        Args:
            doing: What this rank does, with the user's line.
            name: The group in whose last collective it waits.
            reader_key: What the previous call has returned.

        Returns:
            A key of the store if this rank reads the positions of the others, else nothing.
        """
        disagreement = self.disagreement()
        if disagreement is not None:
            raise disagreement
        position = Position(doing, name, self._num_collectives())
        self._rank_status.write_position(position.to_json())
        self._rank_status.write_key(
            f"{self._prefix}/waiting", json.dumps([self._rank, position.to_json()])
        )
        # One rank reads for all that wait: the requests are proportional to the number of ranks.
        if not reader_key:
            key = f"{self._prefix}/reader/{name}/{position.num_collectives.get(name)}"
            if self._rank_status.store.add(key, 1) == 1:
                reader_key = key
        if reader_key:
            self._find_disagreement(position)
        return reader_key

    def _find_disagreement(self, last: Position) -> None:
        """Raise if a rank waits forever; `last` is the position of this one."""
        waiting = {self._rank: last}
        others: dict[int, Position] = {}
        for rank in range(self._num_ranks):
            text = self._rank_status.read_position(rank)
            if text is None or rank == self._rank:
                continue
            position = Position.from_json(text)
            if position.is_in_call_of(last):
                waiting[rank] = position
            else:
                others[rank] = position
        doings: dict[int, str] = {}
        for rank, other in others.items():
            if any(position.waits_forever_for(other) for position in waiting.values()):
                doings[rank] = other.doing
        if doings:
            doings |= {rank: position.doing for rank, position in waiting.items()}
            got = _described(doings)
            key = f"{self._prefix}/disagreement"
            self._rank_status.write_key(key, json.dumps([got, last.doing]))
            raise _error(got, last.doing)

    def disagreement(self) -> DesyncError | None:
        """Return the error that a rank has found."""
        text = self._rank_status.read_key(f"{self._prefix}/disagreement")
        if text is None:
            return None
        return _error(*json.loads(text))

    @property
    def _prefix(self) -> str:
        return self._rank_status.call_prefix

    def renew(self) -> None:
        """Count the calls from 0: some ranks may have made fewer before a failure."""
        self._num_calls = 0

    def close(self) -> None:
        """Stop comparing."""
        self._last_num_collectives = self._num_collectives()
        self._group = None
        self._groups.clear()
        self._message_groups.clear()
        self._stop.set()
        self._watcher.join(self.slow_s)

    def unanswered_call(self) -> DesyncError | None:
        """Return an error if another rank waits in a call that this one has not made.

        For a rank that leaves, and so makes no more calls. After `close`.
        """
        text = self._rank_status.read_key(self._call_key(self._num_calls + 1))
        if text is not None:
            return self._missed(*json.loads(text))
        text = self._rank_status.read_key(f"{self._prefix}/waiting")
        if text is not None:
            rank, position_text = json.loads(text)
            position = Position.from_json(position_text)
            number = self._last_num_collectives.get(position.waits_in)
            # It may be an old position, of a collective which all ranks have made since.
            if number is not None and number < position.num_collectives[position.waits_in]:
                return self._missed(rank, position.doing)
        return None

    def _missed(self, rank: int, doing: str) -> DesyncError:
        doings = {rank: doing, self._rank: self._rank_status.leaving()}
        return _error(_described(doings), doing)

    def _num_collectives(self) -> dict[str, int]:
        numbers = {_CALLS: self._num_calls}
        for name, group in list(self._groups.items()):
            with suppress(RuntimeError):  # a backend that does not count
                numbers[name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        return numbers

    def _watch(self) -> None:
        """Write the position of the main thread to the store where it is blocked."""
        previous: tuple[ThreadSample, dict[str, int]] | None = None
        is_written = False
        sampled_s = time.monotonic()
        while not self._stop.wait(self.slow_s):
            numbers = self._num_collectives()
            sample = sample_thread(self._thread_id)
            now_s = time.monotonic()
            elapsed_s, sampled_s = now_s - sampled_s, now_s
            if sample is None:
                return
            is_blocked = (
                previous is not None
                and numbers == previous[1]
                and sample.is_blocked_since(previous[0], elapsed_s)
            )
            previous = (sample, numbers)
            # A rank that waits in a collective of faccel writes its position itself.
            if is_blocked and not is_written and not self._is_waiting:
                position = Position(sample.doing, "", numbers)
                self._rank_status.write_position(position.to_json())
            is_written = is_blocked

    def _call_key(self, number: int) -> str:
        return f"{self._prefix}/{number}"

    def _delete(self, key: str) -> None:
        if key:
            with suppress(dist.DistError):  # the store may have ended
                self._rank_status.store.delete_key(key)


def _name(group: dist.ProcessGroup) -> str:
    """Return a name of a group, equal on its ranks and other than those of other groups."""
    ranks = dist.get_process_group_ranks(group)
    return f"{group.group_name} of {len(ranks)} from {ranks[0]}"


def _is_finished(work: dist.Work, wait_s: float) -> bool:
    """Wait for a collective on the CPU, return whether it has ended; raise its error."""
    # Not `suppress`: this is the hot path, and a collective takes less than a millisecond.
    try:
        if work.wait(timedelta(seconds=wait_s)):
            return True
    except RuntimeError:  # also after `wait_s`
        pass
    if not work.is_completed():
        return False
    work.wait()
    return True


def _to_row(text: str) -> torch.Tensor:
    name, _, site = text.partition(" at ")
    start = f"{name} at ".encode()
    # The end of the path has the file and the line.
    text_bytes = start + site.encode()[-(_NUM_BYTES - len(start)) :]
    return torch.frombuffer(bytearray(text_bytes.ljust(_NUM_BYTES)), dtype=torch.uint8)


def _from_row(row: torch.Tensor) -> str:
    return row.numpy().tobytes().decode(errors="replace").rstrip()


def _described(doings: Mapping[int, str]) -> str:
    return describe_ranks(dict(sorted(doings.items())))


def _error(got: str, doing: str) -> DesyncError:
    name, _, site = doing.partition(" at ")
    return DesyncError(
        "ranks disagree about the next collective",
        got=got,
        fix=f"call `{name}` on every rank; look for an `if ctx.is_main` around {site}",
    )
