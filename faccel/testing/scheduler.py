"""Runs the ranks of a simulation as threads, of which exactly one runs at a time.

A rank runs until it waits for another one; then the scheduler switches to the next rank that can
run. At each switch it exchanges the process-wide generators of torch, numpy and Python, and c10d's
table of process groups, so that each rank has its own, as separate processes have.

A hang is detected without a timeout: some ranks wait, and no rank can run.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from faccel.call_site import call_site, describe_ranks
from faccel.errors import DesyncError, RankFailedError
from faccel.random.generators import Generators

T = TypeVar("T")
_SIGNAL_POLL_S = 1.0
_C10D_LOGGER = logging.getLogger("c10d-NullHandler-default")


class _GroupTable:
    """The fields of `c10d._World`, the process-wide table of groups. Each rank has its own."""

    def __init__(self) -> None:
        self.default_pg: dist.ProcessGroup | None = None
        self.pg_map: dict[dist.ProcessGroup, tuple[str, dist.Store]] = {}
        self.pg_names: dict[dist.ProcessGroup, str] = {}
        self.pg_group_ranks: dict[dist.ProcessGroup, dict[int, int]] = {}
        self.pg_backend_config: dict[dist.ProcessGroup, str] = {}
        self.group_count = 0
        self.tags_to_pg: dict[str, list[dist.ProcessGroup]] = {}
        self.pg_to_tag: dict[dist.ProcessGroup, str] = {}
        self.pg_coalesce_state: dict[dist.ProcessGroup, list[object]] = {}
        self.comms: list[object] = []


class _Globals:
    """The process-wide state that a rank must have for itself."""

    def __init__(self, generators: Generators, groups: object) -> None:
        self._generators = generators
        self._groups = groups

    @classmethod
    def current(cls) -> _Globals:
        return cls(Generators.current(), c10d._world)  # pyright: ignore[reportPrivateUsage]

    def restore(self) -> None:
        self._generators.restore()
        c10d._world = self._groups  # pyright: ignore[reportPrivateUsage]


class _Rank:
    """The thread of one rank."""

    def __init__(self, globals_: _Globals) -> None:
        self.globals = globals_
        self.turn = threading.Semaphore(0)  # released when the rank may run
        self.is_ready: Callable[[], bool] | None = None  # None: the rank can run
        self.action = "starting"  # for messages
        self.group = ""  # the name of the process group in which it waits
        self.is_done = False
        self.result: Any = None


class _GroupNameIsolation:
    """Makes PyTorch's registry of group names thread-local while a simulation runs.

    It counts, because simulations may be nested.
    """

    def __init__(self) -> None:
        self._num_simulations = 0

    def add(self, change: int) -> None:
        self._num_simulations += change
        module = sys.modules["torch._C._distributed_c10d"]
        module._set_thread_isolation_mode(self._num_simulations > 0)


_isolation = _GroupNameIsolation()


class _AbandonedError(BaseException):
    """Ends the thread of a rank after the simulation was interrupted or timed out."""


class Scheduler:
    """Runs one function per rank, one rank at a time, in a fixed order.

    Args:
        seeds: Seed of the process-wide generators, for each rank.
    """

    def __init__(self, seeds: list[int]) -> None:
        self._ranks = [_Rank(_Globals(Generators.seeded(seed), _GroupTable())) for seed in seeds]
        self._failure: DesyncError | None = None
        self._errors: list[BaseException] = []  # in the order in which they were raised
        self._finished = threading.Event()
        self._is_abandoned = False
        self._num_switches = 0
        self._thread = threading.local()

    @property
    def is_finished(self) -> bool:
        """Whether all ranks have returned or raised."""
        return self._finished.is_set()

    def run(self, fn: Callable[[int], T], timeout_s: float) -> tuple[T, ...]:
        """Run `fn(rank)` for every rank, and return the results in rank order.

        Args:
            fn: The function of a rank.
            timeout_s: Seconds without progress (a switch to another rank) before it gives up.

        Raises:
            TimeoutError: No progress was made; shows the line that runs.
            BaseException: The exception of the rank that failed first.
        """
        previous_globals = _Globals.current()
        previous_hook = sys.excepthook  # `init_process_group` of a rank replaces it
        # c10d logs each exception of a collective at DEBUG: pytest shows that for a failed test.
        previous_level = _C10D_LOGGER.level
        _C10D_LOGGER.setLevel(logging.INFO)
        _isolation.add(1)
        threads = [
            threading.Thread(target=self._run_rank, args=(rank, fn), daemon=True)
            for rank in range(len(self._ranks))
        ]
        try:
            for thread in threads:
                thread.start()
            # The first rank starts; every other one starts at a switch.
            self._ranks[0].turn.release()
            self._wait_until_finished(threads, timeout_s)
            for thread in threads:
                thread.join()
        except BaseException:  # a timeout or Ctrl-C
            # A rank that still runs ends at its next wait, and no other rank runs again.
            self._is_abandoned = True
            raise
        finally:
            _isolation.add(-1)
            # A rank may have been the last to run, so its globals are in place.
            previous_globals.restore()
            sys.excepthook = previous_hook
            _C10D_LOGGER.setLevel(previous_level)
        if self._errors:
            raise self._first_cause()
        return tuple(rank.result for rank in self._ranks)

    def _wait_until_finished(self, threads: list[threading.Thread], timeout_s: float) -> None:
        num_switches = self._num_switches
        deadline = time.monotonic() + timeout_s
        # Short waits: Python handles a signal that arrives just before a wait only after it.
        while not self._finished.wait(min(timeout_s, _SIGNAL_POLL_S)):
            if self._num_switches != num_switches:
                # A slow node makes slow progress: only an interval without any is an error.
                num_switches = self._num_switches
                deadline = time.monotonic() + timeout_s
                continue
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the simulation made no progress for {timeout_s:g} s:\n"
                    f"{self._running_stack(threads)}"
                )

    def _running_stack(self, threads: list[threading.Thread]) -> str:
        """Return the innermost lines of the rank that runs."""
        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
        for rank, thread in zip(self._ranks, threads, strict=True):
            is_running = not rank.is_done and rank.is_ready is None
            if is_running and thread.ident in frames:
                return "".join(traceback.format_stack(frames[thread.ident])[-3:])
        return self.report()

    def _first_cause(self) -> BaseException:
        """Return the first exception that does not follow from the failure of another rank."""
        # A rank that waits raises a DesyncError because another one raised.
        for error in self._errors:
            if not isinstance(error, (DesyncError, RankFailedError)):
                return error
        return self._errors[0]

    def _run_rank(self, number: int, fn: Callable[[int], object]) -> None:
        """The body of a rank's thread."""
        rank = self._ranks[number]
        self._thread.rank = number
        rank.turn.acquire()
        if self._is_abandoned:
            return
        rank.globals.restore()
        try:
            # Backward must run in this thread: another one would not have the rank's globals.
            with torch.autograd.set_multithreading_enabled(False):
                rank.action = "running"
                rank.result = fn(number)
            rank.action = "returned"
        except _AbandonedError:
            return
        except BaseException as error:
            rank.action = f"raised {type(error).__name__}"
            if not isinstance(error, DesyncError):  # whose message names the ranks
                error.add_note(f"raised on rank {number} of {len(self._ranks)} of a simulation")
            self._errors.append(error)
        rank.is_done = True
        self._switch(number)

    def wait(
        self, number: int, is_ready: Callable[[], bool], action: str, *, group: str = ""
    ) -> None:
        """Let other ranks run until `is_ready()` is true.

        Args:
            number: The rank that waits.
            is_ready: Called whenever another rank waits or ends.
            action: What the rank does and where, for messages.
            group: The name of the process group in which it waits.

        Raises:
            DesyncError: No rank can run any more.
        """
        rank = self._ranks[number]
        # Without a switch if the result is ready: most collectives of the last rank.
        if self._failure is None and not is_ready():
            rank.action = action
            rank.group = group
            rank.is_ready = is_ready
            # Saved by the rank itself, because the next one overwrites them.
            rank.globals = _Globals.current()
            # `is_ready` may have become true while the scheduler looked for the next rank.
            if self._switch(number) is not rank:
                rank.turn.acquire()
                if self._is_abandoned:
                    raise _AbandonedError
                rank.globals.restore()
            rank.is_ready = None
        if self._failure is not None:
            raise self.fail(self._failure)
        rank.action = "running"

    def is_done(self, number: int) -> bool:
        """Return whether the function of a rank has ended."""
        return self._ranks[number].is_done

    def check_user(self, owner: int, op: str) -> None:
        """Raise unless the rank that runs is `owner`, whose process group makes the call `op`.

        Raises:
            DesyncError: Two ranks share a group, which separate processes cannot.
        """
        user: int | None = getattr(self._thread, "rank", None)  # None: on another thread
        if user is None or user == owner:
            return
        raise self.fail(
            DesyncError(
                "the process group of one rank is used by another rank",
                got=f"that of rank {owner} on rank {user}: {op} at {call_site()}",
                fix="look the group up in the function that `simulate` runs; a global variable, "
                "or the default of an argument, is one object for all ranks",
            )
        )

    def fail_at(self, actions: Mapping[int, str], problem: str, fix: str) -> DesyncError:
        """Make every rank fail, because the actions of these ranks contradict each other."""
        for number, action in actions.items():
            self._ranks[number].action = action
        return self.fail(DesyncError(problem, got=self.report(), fix=fix))

    def fail(self, error: DesyncError) -> DesyncError:
        """Make every rank fail with `error` at its next wait; return a copy to raise in this one.

        Ranks need copies, because `raise` adds a traceback to its exception.
        """
        if self._failure is None:
            self._failure = error
        failure = self._failure
        return DesyncError(failure.problem, got=failure.got, fix=failure.fix)

    def _switch(self, number: int) -> _Rank | None:
        """Let the next rank run; return it, or None if none is left."""
        # Read by the main thread; a stale value only delays the limit.
        self._num_switches += 1
        if self._is_abandoned:
            return None
        next_rank = self._next(number)
        if next_rank is None and not all(rank.is_done for rank in self._ranks):
            self.fail(
                DesyncError(
                    "ranks disagree about the next collective",
                    got=self.report(),
                    fix="call it on every rank; look for an `if ctx.is_main`, an early return or "
                    "a loop of another length",
                )
            )
            next_rank = self._next(number)
        if next_rank is None:
            self._finished.set()
        # The rank itself continues without a release, which would let it run twice.
        elif next_rank is not self._ranks[number]:
            next_rank.turn.release()
        return next_rank

    def _next(self, number: int) -> _Rank | None:
        """Return the next rank after `number`, in round-robin order, that can run."""
        count = len(self._ranks)
        for offset in range(1, count + 1):
            rank = self._ranks[(number + offset) % count]
            if rank.is_done:
                continue
            # After a failure every rank runs again, to raise at its wait.
            if self._failure is not None or rank.is_ready is None or rank.is_ready():
                return rank
        return None

    def report(self) -> str:
        """Return the current action of each rank, equal ones in one clause."""
        actions = {number: rank.action for number, rank in enumerate(self._ranks)}
        # The same call of all ranks, in different groups.
        if len(set(actions.values())) == 1:
            for number, rank in enumerate(self._ranks):
                if rank.group:
                    actions[number] += f" in {rank.group}"
        return describe_ranks(actions)
