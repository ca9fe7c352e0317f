"""The address of the socket in a rank's folder, whatever the length of its path."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

_MAX_BYTES = 100  # Linux has room for 108, macOS for 104
_NAME = "socket"


@contextmanager
def socket_address(folder: str) -> Generator[str]:
    """Yield an address for `bind` or `connect` that is short enough.

    Effects: ambient. Opens the folder if its path is long.
    """
    path = os.path.join(folder, _NAME)
    if len(os.fsencode(path)) <= _MAX_BYTES:
        yield path
        return
    # Through a descriptor, because no function of sockets takes a folder.
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{_NAME}"
    finally:
        os.close(descriptor)
