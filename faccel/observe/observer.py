"""The part of a rank that answers `faccel why`: a thread that waits at a socket."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any

import attrs

from faccel.errors import summary
from faccel.observe import rank_file
from faccel.observe.process import start_ticks
from faccel.observe.sampling import Sampler
from faccel.observe.socket_address import socket_address

_MAX_REQUEST = 1000
_MAX_WINDOW_S = 60.0
_MIN_INTERVAL_S = 0.001
STACKS = "stacks.txt"
"""In the folder of the socket: what the signal writes."""


@attrs.frozen
class Identity:
    """Which process this is.

    Args:
        rank: Its rank.
        world_size: Number of ranks.
        attempt: Number of restarts.
        world: Text that is equal on the ranks of one attempt, and other than that of other runs.
        coordinates: Its index on each axis of the mesh.
    """

    rank: int
    world_size: int
    attempt: int
    world: str
    coordinates: Mapping[str, int]


class Observer:
    """Answers at a socket what this process is doing, until `close`.

    It costs nothing while nothing asks, except for the garbage collector's callback.

    Effects: ambient. Starts a thread, writes the rank's file, and lets a real-time signal write
    the stacks of all threads to a file, for a process whose thread cannot answer.

    Args:
        run_dir: The run folder.
        folder: A folder that only this user can open, for the socket.
        identity: Which process this is.
        progress: Returns step, loader and axes, see `Sampler`.
    """

    def __init__(
        self,
        run_dir: str,
        folder: str,
        identity: Identity,
        progress: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._path = rank_file.rank_path(run_dir, identity.rank)
        self._sampler = Sampler(progress)
        self._pid = os.getpid()
        self._signal, self._stacks = _register_signal(folder)
        self._listener = _listen(folder)
        self._document: dict[str, Any] = {
            **attrs.asdict(identity),
            "host": socket.gethostname(),
            "pid": self._pid,
            "start_s": time.time(),
            "start_ticks": start_ticks(self._pid),
            "folder": folder,
            "start_folder": os.getcwd(),
            "signal": self._signal,
        }
        self._thread = threading.Thread(target=self._serve, name="faccel-observe", daemon=True)
        self._thread.start()
        # Last: a reader of it may connect at once.
        rank_file.write(self._path, self._document)

    # Written by the thread that trains: the observer may be answering meanwhile.
    def note_end(self, error: BaseException | None) -> None:
        """Write how this rank has ended, for a `faccel why` after it; the first call counts."""
        if "end" in self._document or os.getpid() != self._pid:
            return
        text = ""
        if error is not None:
            text = summary(error)
        self._document["end"] = {"error": text, "time_s": time.time()}
        # The folder may be gone, and the error of the training is more important.
        with suppress(OSError):
            rank_file.write(self._path, self._document)

    def close(self, error: BaseException | None) -> None:
        """Stop answering."""
        self.note_end(error)
        # `close` alone does not wake a thread that waits in `accept`.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        # Limited: it may be recording for a client, and the process must still end.
        self._thread.join(1.0)
        self._sampler.close()
        if self._signal:
            faulthandler.unregister(self._signal)
        self._stacks.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            # Any error: a client that leaves, or asks nonsense, must not end the thread.
            with connection, suppress(Exception):
                connection.settimeout(1.0)
                if _is_allowed(connection):
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        # One packet of a Unix socket: the request is shorter than any buffer.
        request = json.loads(connection.recv(_MAX_REQUEST))
        duration_s = min(float(request["duration_s"]), _MAX_WINDOW_S)
        interval_s = max(float(request["interval_s"]), _MIN_INTERVAL_S)
        answer = self._sampler.record(duration_s, interval_s)
        connection.sendall(json.dumps(answer).encode())


def _listen(folder: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket_address(folder) as address:
        listener.bind(address)
    listener.listen(4)
    return listener


def _is_allowed(connection: socket.socket) -> bool:
    """Return whether this user, or root, has opened the connection."""
    # The mode of the folder is the first lock, and this is the second one.
    if not sys.platform.startswith("linux"):
        return True
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = struct.unpack("3i", credentials)
    return user in (0, os.geteuid())


def _register_signal(folder: str) -> tuple[int, IO[str]]:
    """Let a signal write the stacks of all threads; return its number, 0 if there is none.

    The thread of the observer needs the interpreter. A C extension that does not release it, or a
    long run of the garbage collector, leaves only a handler of a signal in C.
    """
    file = open(os.path.join(folder, STACKS), "w", encoding="utf-8")  # noqa: SIM115 (until `close`)
    if not hasattr(signal, "SIGRTMIN"):
        return 0, file
    # Not the first ones, which other libraries prefer, and none that has a handler.
    for number in range(signal.SIGRTMIN + 8, signal.SIGRTMAX):
        if signal.getsignal(number) == signal.SIG_DFL:
            faulthandler.register(number, file, all_threads=True)
            return int(number), file
    return 0, file
