"""What a rank records about itself while `faccel why` asks it."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from faccel.observe.stacks import FrameValues, current_stack, other_stacks
from faccel.torch_names import flight_record, names_of_groups, sequence_number

T = TypeVar("T")
_MIN_PAUSE_S = 0.01  # shorter runs of the garbage collector explain nothing
_MAX_ARRIVALS = 100


class Collector:
    """Records the long runs of Python's garbage collector, until `close`.

    Effects: ambient. Appends to `gc.callbacks`; a run costs less than a microsecond more.
    """

    def __init__(self) -> None:
        self.pauses: deque[tuple[float, float]] = deque(maxlen=256)
        self._thread_id = threading.get_ident()
        self._start_s: float | None = None
        gc.callbacks.append(self._note)

    @property
    def is_running(self) -> bool:
        """Whether it runs now: a `__del__` that it calls lets other threads run."""
        return self._start_s is not None

    def recent_pauses(self) -> list[tuple[float, float]]:
        """Return the long runs, with the one that has not ended yet as if it ended now."""
        pauses = list(self.pauses)
        # Read once: this is another thread than the one that ends the run.
        start_s, now_s = self._start_s, time.time()
        # It was silent until it called the `__del__` that let this thread run.
        if start_s is not None and now_s - start_s > _MIN_PAUSE_S:
            pauses.append((start_s, now_s))
        return pauses

    def _note(self, phase: str, info: Mapping[str, int]) -> None:
        if threading.get_ident() != self._thread_id:  # another thread has caused the run
            return
        now_s = time.time()
        if phase == "start":
            self._start_s = now_s
            return
        if self._start_s is not None and now_s - self._start_s > _MIN_PAUSE_S:
            self.pauses.append((self._start_s, now_s))
        self._start_s = None

    def close(self) -> None:
        """Stop recording."""
        gc.callbacks.remove(self._note)


class Sampler:
    """Samples the thread that has created it.

    Args:
        progress: Returns the fields that only the context has: step, loader, and the axes by name
            of a process group.
    """

    def __init__(self, progress: Callable[[], Mapping[str, Any]]) -> None:
        self._thread_id = threading.get_ident()
        self._progress = progress
        self._collector = Collector()

    def close(self) -> None:
        """Stop recording the garbage collector."""
        self._collector.close()

    def record(self, duration_s: float, interval_s: float) -> dict[str, Any]:
        """Return the answer to a request, after this time.

        Effects: ambient. Takes the interpreter for some ten microseconds per interval.
        """
        stacks: dict[tuple[FrameValues, ...], int] = {}
        tables: dict[tuple[tuple[str, int], ...], int] = {}
        moments: list[tuple[float, int, int, float, bool]] = []
        end_s = time.monotonic() + duration_s
        last_s, last_cpu_s = time.monotonic(), self._cpu_s()
        groups = _groups()
        while True:
            # First, so that the load of the first moment covers an interval.
            time.sleep(interval_s)
            in_collector = self._collector.is_running
            stack = current_stack(self._thread_id)
            if stack is None:
                break
            # After the stack: a number that is too high would let a late rank look like the others.
            numbers = _numbers(groups)
            now_s, cpu_s = time.monotonic(), self._cpu_s()
            load = (cpu_s - last_cpu_s) / max(now_s - last_s, 1e-9)
            last_s, last_cpu_s = now_s, cpu_s
            row = (_index(stacks, stack), _index(tables, numbers), round(load, 3), in_collector)
            moments.append((time.time(), *row))
            if now_s >= end_s:
                break
            groups = _groups()  # the run may create one meanwhile
        progress = self._progress()
        # Their stacks at the end are enough: they do not train.
        observer_id = threading.get_ident()
        return {
            "stacks": list(stacks),
            "numbers": [dict(numbers) for numbers in tables],
            "moments": moments,
            "groups": _describe(groups, progress["axes"]),
            "pauses": self._collector.recent_pauses(),
            "step": progress["step"],
            "loader": progress["loader"],
            "threads": other_stacks({self._thread_id, observer_id}),
        }

    def _cpu_s(self) -> float:
        # Not on Windows.
        if not hasattr(time, "pthread_getcpuclockid"):
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread_id))


def _index(table: dict[T, int], value: T) -> int:
    return table.setdefault(value, len(table))


def _groups() -> dict[str, tuple[Any, str]]:
    """Return the process groups and their names in PyTorch, by a name that is equal on its ranks.

    Groups of other ranks may have the same name in PyTorch.
    """
    from torch.distributed import get_process_group_ranks  # noqa: TID251

    groups: dict[str, tuple[Any, str]] = {}
    for group, name in names_of_groups():
        try:
            ranks = get_process_group_ranks(group)
        except KeyError:  # destroyed since
            continue
        groups[f"{name} of {len(ranks)} from {ranks[0]}"] = (group, name)
    return groups


def _numbers(groups: Mapping[str, tuple[Any, str]]) -> tuple[tuple[str, int], ...]:
    numbers: list[tuple[str, int]] = []
    for name, (group, _) in groups.items():
        number = sequence_number(group)
        # A backend that does not count leaves only the stacks.
        if number is not None:
            numbers.append((name, number))
    return tuple(numbers)


def _describe(
    groups: Mapping[str, tuple[Any, str]], axes: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return the fields of `Group` for each process group."""
    from torch.distributed import get_process_group_ranks  # noqa: TID251

    entries: dict[str, list[Mapping[str, Any]]] = {}
    for entry in flight_record():
        entries.setdefault(entry["process_group"][0], []).append(entry)
    values: dict[str, dict[str, Any]] = {}
    for key, (group, name) in groups.items():
        # The newest: a client compares the arrivals of its window only.
        rows = entries.get(name, [])[-_MAX_ARRIVALS:]
        axis = axes.get(name, "")
        op, is_pending = "", False
        if rows:
            # as in `gloo:all_reduce`
            op = rows[-1]["profiling_name"].rpartition(":")[2]
            is_pending = not rows[-1]["retired"]
        values[key] = {
            "ranks": get_process_group_ranks(group),
            "axis": axis,
            "op": op,
            "is_pending": is_pending,
            "arrivals": {row["collective_seq_id"]: row["time_created_ns"] / 1e9 for row in rows},
            "has_messages": axis == "pp",
        }
    return values
