"""The sockets of this process, by their descriptors; Linux only, elsewhere there are none."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

DESCRIPTOR_FOLDER = Path("/proc/self/fd")
"""Has a link for each descriptor."""


def link_of(descriptor: int) -> str:
    """Return what a descriptor refers to, such as `socket:[number]`; empty if it is closed.

    A descriptor is a number that belongs to another file after it was closed.

    Effects: pure.
    """
    with suppress(OSError):
        # A process may have thousands: joining paths takes longer than reading the link.
        return os.readlink(f"{DESCRIPTOR_FOLDER}/{descriptor}")
    return ""


def open_sockets() -> dict[int, str]:
    """Return the link of each descriptor of a socket.

    Effects: pure.
    """
    sockets: dict[int, str] = {}
    with suppress(OSError):
        for name in os.listdir(DESCRIPTOR_FOLDER):
            link = link_of(int(name))
            if link.startswith("socket:"):
                sockets[int(name)] = link
    return sockets


def ports_of(descriptor: int) -> tuple[int | None, int | None]:
    """Return the port of a socket on this node, and that of its peer; None where there is none.

    Effects: pure.
    """
    own_port = peer_port = None
    with suppress(OSError):  # closed meanwhile
        connection = socket.socket(fileno=descriptor)
        try:
            own_port = _port(connection.getsockname())
            peer_port = _port(connection.getpeername())  # raises if it is not connected
        finally:
            connection.detach()  # the owner of the descriptor closes it
    return own_port, peer_port


def _port(address: object) -> int | None:
    # Of an address of the internet; that of a pipe between processes is text.
    if isinstance(address, tuple) and len(address) >= 2:
        return int(address[1])
    return None
