"""Ranks as threads of which exactly one runs: a rank that waits hands the baton on.

At each hand-over the process-wide generators of torch, numpy and python and torch's table of process groups are
swapped, so that each rank has its own, as a process would. "Somebody waits and nobody can run" is the whole detector
of hangs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d

from faccel.call_site import describe_ranks
from faccel.errors import DesyncError, RankFailedError
from faccel.random.generators import Generators


class _GroupTable:
    """The fields of c10d's process-wide table of groups, one table per rank."""

    def __init__(self) -> None:
        self.default_pg: Any = None
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, Any] = {}
        self.pg_group_ranks: dict[Any, Any] = {}
        self.pg_backend_config: dict[Any, Any] = {}
        self.group_count = 0
        self.tags_to_pg: dict[str, list[Any]] = {}
        self.pg_to_tag: dict[Any, str] = {}
        self.pg_coalesce_state: dict[Any, list[Any]] = {}
        self.comms: list[Any] = []


class _Globals:
    """What a process has one of."""

    def __init__(self, generators: Generators, groups: Any) -> None:
        self.generators = generators
        self.groups = groups

    @classmethod
    def current(cls) -> _Globals:
        return cls(Generators.current(), c10d._world)  # pyright: ignore[reportPrivateUsage]

    def restore(self) -> None:
        self.generators.restore()
        c10d._world = self.groups  # pyright: ignore[reportPrivateUsage]


class _Rank:
    def __init__(self, globals_: _Globals) -> None:
        self.globals = globals_
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] | None = None  # None: can run
        self.doing = "starting"
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None


class _Isolation:
    """torch's registry of group names, one per thread while a simulation runs; simulations nest."""

    def __init__(self) -> None:
        self.depth = 0

    def enter(self, change: int) -> None:
        self.depth += change
        sys.modules["torch._C._distributed_c10d"]._set_thread_isolation_mode(self.depth > 0)


_isolation = _Isolation()


class _GivenUp(BaseException):
    """Ends the thread of a rank whose simulation nobody waits for any more."""


class Scheduler:
    """Runs one function per rank, one rank at a time, in a fixed order.

    Args:
        seeds: A seed for the process-wide generators of each rank.
    """

    def __init__(self, seeds: list[int]) -> None:
        self.ranks = [_Rank(_Globals(Generators.seeded(seed), _GroupTable())) for seed in seeds]
        self.failure: DesyncError | None = None
        self.errors: list[BaseException] = []  # in the order in which they were raised
        self.finished = threading.Event()
        self.is_given_up = False

    def run(self, fn: Callable[[int], Any], timeout_s: float) -> tuple[Any, ...]:
        """Run `fn(rank)` for every rank and return the results in order; raise what the first failing rank raised."""
        before, hook = _Globals.current(), sys.excepthook
        _isolation.enter(1)
        threads = [
            threading.Thread(target=self._body, args=(r, fn), daemon=True)
            for r in range(len(self.ranks))
        ]
        try:
            for thread in threads:
                thread.start()
            self.ranks[0].turn.release()
            if not self.finished.wait(timeout_s):
                raise TimeoutError(
                    f"the simulated world has not finished in {timeout_s} s:\n{self._where(threads)}"
                )
            for thread in threads:
                thread.join()
        except BaseException:  # a timeout, Ctrl-C
            self.is_given_up = True  # whoever still runs hands the baton to nobody
            raise
        finally:
            _isolation.enter(-1)
            before.restore()
            sys.excepthook = hook
        if self.errors:
            causes = [
                error
                for error in self.errors
                if not isinstance(error, (DesyncError, RankFailedError))
            ]
            raise (causes or self.errors)[0]
        return tuple(rank.result for rank in self.ranks)

    def _where(self, threads: list[threading.Thread]) -> str:
        import traceback

        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
        running = [
            r for r, rank in enumerate(self.ranks) if not rank.is_done and rank.ready is None
        ]
        stacks = [
            traceback.format_stack(frames[i])[-3:]
            for r in running
            if (i := threads[r].ident) in frames
        ]
        return "\n".join("".join(stack) for stack in stacks[:1]) or self.report()

    def _body(self, number: int, fn: Callable[[int], Any]) -> None:
        rank = self.ranks[number]
        rank.turn.acquire()
        if self.is_given_up:
            return
        rank.globals.restore()
        try:
            with torch.autograd.set_multithreading_enabled(False):
                rank.doing = "running"
                rank.result = fn(number)
            rank.doing = "returned"
        except _GivenUp:
            return
        except BaseException as error:
            rank.error = error
            rank.doing = f"raised {type(error).__name__}"
            self.errors.append(error)
        rank.is_done = True
        self._pass_on(number)

    def wait(self, number: int, ready: Callable[[], bool], doing: str) -> None:
        """Hand the baton on until `ready()`.

        Raises:
            DesyncError: Nobody can run any more.
        """
        rank = self.ranks[number]
        if self.failure is None and not ready():
            rank.doing, rank.ready = doing, ready
            rank.globals = _Globals.current()
            if self._pass_on(number) is not rank:
                rank.turn.acquire()
                if self.is_given_up:
                    raise _GivenUp
                rank.globals.restore()
            rank.ready = None
        if self.failure is not None:
            raise self.fail(self.failure)
        rank.doing = "running"

    def fail(self, error: DesyncError) -> DesyncError:
        """Make every rank fail with `error` at its next wait; return one of its own for the rank that asks."""
        self.failure = self.failure or error
        return DesyncError(self.failure.problem, got=self.failure.got, fix=self.failure.fix)

    def _pass_on(self, number: int) -> _Rank | None:
        if self.is_given_up:
            return None
        chosen = self._next(number)
        if chosen is None and not all(rank.is_done for rank in self.ranks):
            self.fail(DesyncError(
                "ranks disagree about the next collective",
                got=self.report(),
                fix="call it on every rank; look for an `if ctx.is_main`, an early return or a loop of another length",
            ))  # fmt: skip
            chosen = self._next(number)
        if chosen is None:
            self.finished.set()
        elif chosen is not self.ranks[number]:
            chosen.turn.release()
        return chosen

    def _next(self, number: int) -> _Rank | None:
        count = len(self.ranks)
        for i in range(1, count + 1):
            rank = self.ranks[(number + i) % count]
            if not rank.is_done and (
                self.failure is not None or rank.ready is None or rank.ready()
            ):
                return rank
        return None

    def report(self) -> str:
        """Say what each rank is doing, ranks that do the same in one clause."""
        return describe_ranks({number: rank.doing for number, rank in enumerate(self.ranks)})
