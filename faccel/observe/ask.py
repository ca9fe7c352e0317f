"""Asks the ranks of a run on this node what they are doing."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs

from faccel.observe import rank_file
from faccel.observe.process import (
    catches,
    children,
    start_ticks,
    state_of_process,
    waits_in_kernel,
)
from faccel.observe.snapshot import (
    CONSEQUENCE,
    DEAD,
    FAILED,
    FINISHED,
    FOREIGN,
    MISSING,
    REMOTE,
    SILENT,
    Frame,
    Moment,
    Snapshot,
    from_answer,
)
from faccel.observe.socket_address import socket_address

PATIENCE_S = 2.0
"""How long after the window a rank may answer."""
_STACKS = "stacks.txt"
_SIGNAL_S = 1.0
_END_S = 1.0  # a process that was killed frees its memory first
_CONSEQUENCES = re.compile("RankFailedError|gloo/transport|Dist(Network|Store|Backend)Error")
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.M)
_LIBRARY = re.compile(r"/(torch|faccel|lib/python\d[^/]*)/")


def ask(run: str, *, duration_s: float, interval_s: float) -> list[Snapshot]:
    """Return a snapshot of each rank of a run; those of this node cover the same time.

    Effects: ambient. Reads the run folder, and asks the processes of this node.

    Args:
        run: The run folder.
        duration_s: How long each rank records.
        interval_s: Seconds between two moments.

    Raises:
        ConfigError: There is no such run.
    """
    folder, documents = rank_file.read_run(run)
    request = {"duration_s": duration_s, "interval_s": interval_s}
    # At the same time, so that the moments of the ranks can be compared.
    with ThreadPoolExecutor(len(documents)) as pool:
        snapshots = list(pool.map(lambda document: _snapshot(document, request), documents))
    return _completed(snapshots, folder, documents)


def states(run: str) -> list[Snapshot]:
    """Return the state of each rank of a run without asking it: a rank that runs has no moments.

    Effects: ambient. Reads the run folder, and whether the processes of this node exist.

    Args:
        run: The run folder.

    Raises:
        ConfigError: There is no such run.
    """
    folder, documents = rank_file.read_run(run)
    snapshots = [_without_asking(document) or _identity(document) for document in documents]
    return _completed(snapshots, folder, documents)


def _completed(
    snapshots: list[Snapshot], folder: Path, documents: list[dict[str, Any]]
) -> list[Snapshot]:
    """Return the snapshots of all ranks in order, with those that have written no file."""
    launch = rank_file.read_launch(folder)
    world_size = max(document["world_size"] for document in documents)
    # A rank that has not reached `init` has no file, but the others have its number.
    present = {snapshot.rank for snapshot in snapshots}
    for rank in range(world_size):
        if rank not in present:
            reason = "has not reached `faccel.init`: it has written no file"
            snapshots.append(Snapshot(rank, MISSING, reason))
    snapshots.sort(key=lambda snapshot: snapshot.rank)
    return [_with_launch(snapshot, launch, documents) for snapshot in snapshots]


def _identity(document: Mapping[str, Any]) -> Snapshot:
    return Snapshot(
        document["rank"],
        host=document["host"],
        pid=document["pid"],
        coordinates=document["coordinates"],
    )


def _without_asking(document: Mapping[str, Any]) -> Snapshot | None:
    """Return the snapshot of a rank that has ended, or runs on another node; None to ask it."""
    known = _identity(document)
    # First, because a number of a process that has ended may be that of another one now.
    end = document.get("end")
    if end is not None:
        return _ended(known, end)
    if document["host"] != socket.gethostname():
        reason = f"runs on {document['host']}, where `faccel why` asks it"
        return attrs.evolve(known, status=REMOTE, reason=reason)
    # The number alone may be that of a later process. Without /proc only the socket shows it.
    if document["start_ticks"] is not None and start_ticks(known.pid) != document["start_ticks"]:
        return _dead(known)
    return None


def _snapshot(document: Mapping[str, Any], request: Mapping[str, float]) -> Snapshot:
    without_asking = _without_asking(document)
    if without_asking is not None:
        return without_asking
    known = _identity(document)
    try:
        answer = _request(document["folder"], request)
    except PermissionError:
        reason = f"runs as another user, process {known.pid}"
        return attrs.evolve(known, status=FOREIGN, reason=reason)
    except TimeoutError:
        return _silent(known, document)
    except (OSError, ValueError):  # it has ended meanwhile, or is ending
        if _ends(document):
            return _dead(known)
        return _silent(known, document)
    return attrs.evolve(from_answer(answer, document), loader=_workers(known.pid))


def _dead(known: Snapshot) -> Snapshot:
    reason = f"died without an error: process {known.pid} has ended"
    return attrs.evolve(known, status=DEAD, reason=reason)


def _ends(document: Mapping[str, Any]) -> bool:
    """Return whether a process that has closed its socket ends within a moment."""
    deadline_s = time.monotonic() + _END_S
    while time.monotonic() < deadline_s:
        if start_ticks(document["pid"]) != document["start_ticks"]:
            return True
        time.sleep(0.02)
    return False


def _ended(known: Snapshot, end: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot of a rank that has written how it ended."""
    # The cause of an error of a collective is on the rank that it names.
    status, reason = FINISHED, "has closed its context"
    if end["error"]:
        status, reason = FAILED, f"failed: {end['error']}"
        if _CONSEQUENCES.search(end["error"]):
            status = CONSEQUENCE
    return attrs.evolve(known, status=status, reason=reason, time_s=end["time_s"])


def _request(folder: str, request: Mapping[str, float]) -> dict[str, Any]:
    deadline_s = time.monotonic() + request["duration_s"] + PATIENCE_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE_S)
        with socket_address(folder) as address:
            connection.connect(address)
        connection.sendall(json.dumps(request).encode())
        data_parts: list[bytes] = []
        while True:
            # The deadline is of the answer, not of each part.
            connection.settimeout(max(deadline_s - time.monotonic(), 0.01))
            data = connection.recv(1 << 20)
            if not data:
                break
            data_parts.append(data)
    answer = json.loads(b"".join(data_parts))
    assert isinstance(answer, dict)
    return answer


def _silent(known: Snapshot, document: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot of a process that has not answered: from /proc, and a signal."""
    state = state_of_process(known.pid)
    if not state:
        return _dead(known)
    reason = f"does not answer: process {known.pid} {state}"
    if state == "computes":
        reason += " in code that does not release Python's interpreter"
    # The function of the kernel names the file system, as in `nfs_wait_bit_killable`.
    kernel = waits_in_kernel(known.pid)
    if kernel and "disk" in state:
        reason += f" (in {kernel})"
    moments: list[Moment] = []
    stack: tuple[Frame, ...] = ()
    if "stopped" not in state:  # a stopped process handles no signal
        stack = _stack_by_signal(known.pid, document)
    if stack:
        user = next((frame for frame in stack if frame.is_user), stack[0])
        reason += f" at {user.site}"
        moments.append(Moment(time.time(), stack, {}))
    return attrs.evolve(known, status=SILENT, reason=reason, moments=moments)


def _stack_by_signal(pid: int, document: Mapping[str, Any]) -> tuple[Frame, ...]:
    """Let a handler in C write the stacks, and return that of the main thread."""
    number, path = document["signal"], Path(document["folder"], _STACKS)
    # Without a handler the signal would end the process.
    if not number or not catches(pid, number):
        return ()
    # The file grows with each signal; only what this one adds is read.
    try:
        size = path.stat().st_size
        os.kill(pid, number)
        deadline_s = time.monotonic() + _SIGNAL_S
        text = ""
        while time.monotonic() < deadline_s and not text.endswith("\n"):
            time.sleep(0.02)
            text = path.read_text(encoding="utf-8", errors="replace")[size:]
    except OSError:
        return ()
    # The main thread is the last one of the text.
    _, _, last = text.rpartition("hread 0x")
    # The text has paths only, so that libraries are recognised by their folders.
    frames: list[Frame] = []
    start = os.path.join(document.get("start_folder", ""), "")
    for file, line, function in _FRAME.findall(last):
        is_user = not _LIBRARY.search(file) and not file.startswith("<frozen")
        frames.append(Frame(file.removeprefix(start), int(line), function, is_user))
    return tuple(frames)


def _workers(pid: int) -> str:
    """Return a clause about the processes that a rank has started, usually of its loader."""
    # Workers are asked nothing: a dataset that reads from a slow disk shows in their state.
    states = Counter(state_of_process(child) for child in children(pid))
    if not states:
        return ""
    clauses = [f"{count} {state}" for state, count in states.most_common() if state]
    noun = "worker process"
    if states.total() > 1:
        noun = "worker processes"
    return f"of its {states.total()} {noun} {', '.join(clauses)}"


def _with_launch(
    snapshot: Snapshot, launch: Mapping[str, Any], documents: list[dict[str, Any]]
) -> Snapshot:
    """Add what the launcher has written: which rank failed first, and how."""
    start_s = min(document["start_s"] for document in documents)
    # The file of an earlier run in the same folder stays.
    if not launch or launch["time_s"] < start_s or snapshot.status not in (DEAD, MISSING):
        return snapshot
    if snapshot.rank == launch["rank"]:
        reason = f"died: {launch['reason']}"
        return attrs.evolve(snapshot, status=DEAD, reason=reason, time_s=launch["time_s"])
    reason = "was ended by the launcher, after another rank"
    return attrs.evolve(snapshot, status=CONSEQUENCE, reason=reason, time_s=launch["time_s"])
