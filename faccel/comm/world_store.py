"""The store of the world: a request to a server that has ended raises, and prints nothing.

PyTorch's client raises too, but prints 20 lines from C++ for each request.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch.distributed as dist

from faccel.comm.descriptors import link_of, open_sockets, ports_of

_redirection = threading.Lock()


# A line of c10d, and the frames that follow it.
_FRAMES = re.compile(
    rb"[^\n]*\[c10d\][^\n]*\n(?:(?:Exception raised|frame #|<omitting)[^\n]*\n)*\n?"
)


@contextmanager
def without_frames() -> Generator[None]:
    """Drop what c10d prints from C++ in the body: the server of a store may end during a request.

    What other threads print meanwhile is printed afterwards.

    Effects: ambient. Redirects the descriptor of stderr.
    """
    with _redirection, tempfile.TemporaryFile() as file:
        try:
            with _redirected(file.fileno()):
                yield
        finally:
            file.seek(0)
            output = _FRAMES.sub(b"", file.read())
            if output:
                os.write(2, output)


@contextmanager
def _redirected(descriptor: int) -> Generator[None]:
    stderr = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class WorldStore:
    """Requests to a store, after a look at the connection.

    Args:
        store: Of PyTorch. The connection of a `TCPStore` is known on Linux only; elsewhere, and for
            other stores, each request is made.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._port = _port_of(store)
        # The descriptor of the connection, and what identifies its socket.
        self._descriptor, self._link = -1, ""

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._check_server()
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Return the value of a key, which exists."""
        self._check_server()
        return self._store.get(key)

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys exist."""
        self._check_server()
        return self._store.check(keys)

    def add(self, key: str, amount: int) -> int:
        """Add to the number of a key, and return the sum."""
        self._check_server()
        return self._store.add(key, amount)

    def delete_key(self, key: str) -> bool:
        """Delete a key; return whether it existed."""
        self._check_server()
        return self._store.delete_key(key)

    def wait(self, keys: list[str]) -> None:
        """Return when all keys exist."""
        self._check_server()
        self._store.wait(keys)

    def _check_server(self) -> None:
        if self.has_ended():
            raise dist.DistNetworkError("the process that serves the store of the world has ended")

    def has_ended(self) -> bool:
        """Return whether the server has closed the connection, False if that is unknown."""
        if self._port is None:
            return False
        # A descriptor is a number that may belong to another socket by now.
        if not self._link or link_of(self._descriptor) != self._link:
            self._descriptor, self._link = _find_connection(self._port)
        if not self._link:
            return False
        connection = socket.socket(fileno=self._descriptor)
        try:
            return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False  # open, and no answer to read
        except OSError:
            return True  # reset
        finally:
            connection.detach()  # it belongs to the store


def _port_of(store: dist.Store) -> int | None:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return store.port
    return None


def _find_connection(port: int | None) -> tuple[int, str]:
    """Return the descriptor and the link of a connection to a port, `(-1, "")` without one."""
    for descriptor, link in open_sockets().items():
        if ports_of(descriptor)[1] == port:
            return descriptor, link
    return -1, ""
