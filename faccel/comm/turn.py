"""Ranks wait while another rank works alone, for as long as its process is alive.

A collective would end after `timeout_s`, and the error would blame a rank that is still working.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from faccel.call_site import call_site
from faccel.comm.rank_status import RankStatus
from faccel.errors import RankFailedError

_BEAT_S = 1.0
# A call of C code, such as `json.load` of a large file, may hold the interpreter for seconds. The
# thread that beats does not run then.
_SILENCE_S = 30.0
# Short bodies end fast. In long ones each rank sends the store five requests per second.
_FIRST_POLL_S = 1e-3
_MAX_POLL_S = 0.2
_ENDED = "ended"


class WorldTurn:
    """One call of `main_first` on all ranks: some go first, the others wait for them.

    A rank that goes first writes to the store of the world every second. It is alive while it does,
    and it has failed when its process is gone.

    Args:
        rank_status: The status of the ranks of the world.
        world_size: Number of ranks.
        local: Whether one rank of every node goes first, instead of rank 0 of the world.
        timeout_s: Seconds to wait for ranks that have not called `main_first` yet.
    """

    def __init__(
        self, rank_status: RankStatus, world_size: int, *, local: bool, timeout_s: float
    ) -> None:
        self._rank_status = rank_status
        self._store = rank_status.store
        self._prefix = rank_status.new_turn()
        self._world_size = world_size
        self._local = local
        self._timeout_s = timeout_s
        # With `local` all ranks arrive: no launcher is trusted to count the nodes.
        self._num_expected = 1
        if local:
            self._num_expected = world_size
        # By key: the last beat of a rank that goes first, and when this rank first read it.
        self._last_beats: dict[str, tuple[str, float]] = {}
        self._last_sign_s = 0.0

    @contextmanager
    def working(self) -> Generator[None]:
        """Run the body while a thread shows the other ranks that this process is alive."""
        stop = threading.Event()
        key = self._begin()
        thread = threading.Thread(
            target=self._beat, args=(key, stop), name="faccel-beat", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            # Limited: a store that does not answer must not hide the error of the body.
            thread.join(_BEAT_S)
            with suppress(dist.DistError):
                self._store.set(key, _ENDED)
                self._store.add(f"{self._prefix}/arrived", 1)

    def _begin(self) -> str:
        """Register this rank as one that goes first; return the key of its beats."""
        number = 0
        with suppress(dist.DistError):  # the store may have ended; the ranks that wait report it
            number = self._store.add(f"{self._prefix}/first", 1)
        key = f"{self._prefix}/first/{number}"
        self._send_beat(key, 0)
        return key

    def _send_beat(self, key: str, count: int) -> None:
        process = (_process_space(), os.getpid())
        beat = {"rank": self._rank_status.rank, "count": count, "process": process}
        with suppress(dist.DistError):
            self._store.set(key, json.dumps(beat))

    def _beat(self, key: str, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(_BEAT_S):
            count += 1
            self._send_beat(key, count)

    def wait(self, *, went_first: bool) -> None:
        """Return when every rank that goes first has left its body.

        Raises:
            RankFailedError: One of them ended or is silent, or a rank did not call `main_first`.
        """
        try:
            if self._local and not went_first:
                self._store.add(f"{self._prefix}/arrived", 1)
            self._poll()
        except dist.DistError as error:
            self._rank_status.note(error)
            problem = "rank 0 or the launcher, which serves the store of the world, ended"
            raise self._failed(problem) from error

    def _poll(self) -> None:
        pause_s = _FIRST_POLL_S
        checked_s = time.monotonic()
        self._last_sign_s = checked_s
        while not self._is_over():
            # not `Store.wait`, which prints a line from C++ at each timeout
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_POLL_S)
            now_s = time.monotonic()
            if now_s < checked_s + _BEAT_S / 2:
                continue
            checked_s = now_s
            problem = self._problem(now_s)
            # Again: a rank arrives first and ends afterwards.
            if problem and not self._is_over():
                raise self._failed(problem)

    def _is_over(self) -> bool:
        return self._store.add(f"{self._prefix}/arrived", 0) >= self._num_expected

    def _problem(self, now_s: float) -> str | None:
        """Return why this turn cannot end any more, None if it still can."""
        if self._rank_status.has_any_left():
            return "a rank has left"
        num_first = self._store.add(f"{self._prefix}/first", 0)
        for number in range(1, num_first + 1):
            problem = self._problem_of_first(f"{self._prefix}/first/{number}", now_s)
            if problem:
                return problem
        if now_s > self._last_sign_s + self._timeout_s:
            return f"not all ranks called `main_first` within {self._timeout_s:g} s"
        return None

    def _problem_of_first(self, key: str, now_s: float) -> str | None:
        """Return why one of the ranks that go first has failed, None if it works or is done."""
        # Without a key it has registered and not yet written: the next look finds it.
        if not self._store.check([key]):
            return None
        text = self._store.get(key).decode()
        if text == _ENDED:
            return None
        beat = json.loads(text)
        if _has_process_ended(beat["process"]):
            return f"the process of rank {beat['rank']} ended"
        last_text, last_s = self._last_beats.get(key, ("", now_s))
        if text != last_text:
            last_s = now_s
            self._last_beats[key] = (text, now_s)
        limit_s = max(self._timeout_s, _SILENCE_S)
        if now_s > last_s + limit_s:
            return f"rank {beat['rank']} gave no sign of life for {limit_s:g} s"
        self._last_sign_s = now_s
        return None

    def _failed(self, problem: str) -> RankFailedError:
        rank = self._rank_status.rank
        doing = f"main_first at {call_site()}"
        statuses = self._rank_status.report(range(self._world_size), doing)
        return RankFailedError(
            f"{problem} while rank {rank} waited in {doing}",
            got=statuses,
            fix="fix the error of the rank that failed; its log or its exit code has the cause",
        )


def _process_space() -> str:
    """Return what identifies the numbers of processes that this one can see; empty if unknown."""
    # Containers of one node may have one host name, and yet their own numbers. Linux only.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _has_process_ended(process: tuple[str, int]) -> bool:
    """Return whether a process is known to have ended, without waiting for its silence."""
    space, number = process
    if not space or space != _process_space():
        return False  # of another node or container: only its beats are known
    try:
        status = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    except OSError:
        return False
    # "pid (name) state ...", where the name may contain anything. A zombie has ended, too.
    return status.rpartition(")")[2].split()[0] in "ZX"
