"""The sockets of this process, by their descriptors; Linux only, elsewhere there are none."""

from __future__ import annotations

import os
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
        return os.readlink(DESCRIPTOR_FOLDER / str(descriptor))
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
