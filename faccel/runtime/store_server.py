"""A server of PyTorch's store that listens on one address.

The server of `TCPStore` alone listens on all interfaces, whatever its host, without a password.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from faccel.runtime.listener import bind

_TIMEOUT = timedelta(minutes=5)  # the default of PyTorch


def serve_store(
    host: str, port: int, *, timeout: timedelta = _TIMEOUT, shared: bool = False
) -> dist.TCPStore:
    """Serve a store on the address of `host`, and on no other.

    Effects: ambient. The server ends with the returned object.

    Args:
        host: A name or address of this node.
        port: The port; 0 takes a free one, which is `port` of the result.
        timeout: Of the operations of the result.
        shared: Whether another store of this process may serve the same port.

    Raises:
        OSError: No address of `host` belongs to this node, or the port is in use.
    """
    with bind(host, port) as listener:
        port = listener.getsockname()[1]
        return dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=shared,
            master_listen_fd=listener.detach(),  # the server closes it
        )
