"""A socket for a server that listens on one address of this node."""

from __future__ import annotations

import errno
import socket


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address of `host`; port 0 takes a free one.

    Effects: ambient.

    Raises:
        OSError: No address of `host` belongs to this node, or the port is in use.
    """
    reason = OSError(errno.EADDRNOTAVAIL, "the host has no address")
    # A name may have an IPv6 address that no interface of this node has.
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        listener = socket.socket(family)
        # Without the option a port is blocked for a minute after the previous launch.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            listener.close()
            reason = error
        else:
            return listener
    raise reason
