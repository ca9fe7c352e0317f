"""The store of the world: rank 0 or the launcher serves it, the other ranks connect."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from faccel.context import Topology

# A store that accepts a connection answers at once; this allows for a busy node.
_STORE_REPLY_S = 5.0
_FIRST_POLL_S = 0.01
_MAX_POLL_S = 0.5


def _accepts_connections(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def _wait_for_server(topology: Topology, deadline: float) -> None:
    """Return when the server of the store accepts connections. C++ would print each attempt."""
    pause_s = _FIRST_POLL_S
    while not _accepts_connections(topology.main_address, topology.main_port):
        if time.monotonic() > deadline:
            raise dist.DistNetworkError("rank 0, or the launcher, did not start")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_POLL_S)


def open_store(topology: Topology, timeout: timedelta) -> dist.TCPStore:
    """Serve the store on rank 0, or connect to it.

    The client of `TCPStore` waits without a timeout for a server that accepts the connection but is
    not a store (an HTTP server on the port, for example). So it runs in a thread.

    Raises:
        dist.DistError: The port is in use, or no store answers within the timeout.
    """
    outcome: list[dist.TCPStore | BaseException] = []
    is_server = topology.rank == 0 and not topology.store_is_hosted
    deadline = time.monotonic() + timeout.total_seconds()
    if not is_server:
        _wait_for_server(topology, deadline)

    def connect() -> None:
        try:
            outcome.append(
                dist.TCPStore(
                    topology.main_address,
                    topology.main_port,
                    topology.world_size,
                    is_master=is_server,
                    timeout=timeout,
                    # A second world of this process may serve the same port.
                    multi_tenant=True,
                    # The agreement on a name and `init_process_group` wait, with better messages.
                    wait_for_workers=False,
                )
            )
        except Exception as error:
            outcome.append(error)

    # A daemon: a client that never returns must not keep the process alive.
    thread = threading.Thread(target=connect, name="faccel-store", daemon=True)
    thread.start()
    thread.join(min(_STORE_REPLY_S, timeout.total_seconds()))
    while not outcome and time.monotonic() < deadline:
        # Without a server, rank 0 may still start. With a server, a store would have answered.
        is_open = _accepts_connections(topology.main_address, topology.main_port)
        thread.join(_STORE_REPLY_S)
        if is_open and not outcome:
            raise dist.DistNetworkError("the server on this port is not a PyTorch store")
    if not outcome:
        raise dist.DistNetworkError(f"no answer within {timeout.total_seconds():g} s")
    # Raised here, because an exception in the thread would be lost.
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
