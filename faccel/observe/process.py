"""Processes of this node, as /proc describes them."""

from __future__ import annotations

import re
from pathlib import Path

_STATES = {
    "R": "computes",
    "S": "sleeps",
    "D": "waits for a disk or a network file system",
    "T": "is stopped (SIGSTOP)",
    "t": "is stopped by a debugger",
    "Z": "has ended",
    "X": "has ended",
}


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in ticks since the boot; None if there is no such process.

    A number of a process is used again later; the pair of both is not.

    Effects: ambient. Reads /proc.
    """
    fields = _stat_fields(pid)
    if fields is None or fields[0] in ("Z", "X"):  # it has ended, and its parent has not noticed
        return None
    return int(fields[19])  # field 22 of proc(5), as the first two are cut off


def state_of_process(pid: int) -> str:
    """Return a clause about a process, such as `"is stopped (SIGSTOP)"`; empty if it has ended.

    Effects: ambient. Reads /proc.
    """
    fields = _stat_fields(pid)
    if fields is None:
        return ""
    return _STATES.get(fields[0], "")


def waits_in_kernel(pid: int) -> str:
    """Return the function of the kernel in which a process waits, empty if that is unknown.

    Effects: ambient. Reads /proc.
    """
    name = _read(pid, "wchan")
    if name in ("", "0"):
        return ""
    return name


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal.

    Without one a signal would end the process.

    Effects: ambient. Reads /proc.
    """
    # A bit mask in hexadecimal, whose lowest bit is signal 1.
    match = re.search(r"^SigCgt:\s*([0-9a-f]+)", _read(pid, "status"), re.M)
    return match is not None and bool(int(match[1], 16) >> (number - 1) & 1)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, such as the workers of a loader.

    Effects: ambient. Reads /proc.
    """
    return [int(word) for word in _read(pid, f"task/{pid}/children").split()]


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on."""
    # The name of the program before may have spaces and brackets.
    fields = _read(pid, "stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return fields


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # the process has ended, or belongs to another user
        return ""
