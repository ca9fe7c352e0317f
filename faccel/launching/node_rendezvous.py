"""The rendezvous of the nodes of a launch, which reports the nodes that are missing.

It runs before torchrun's rendezvous, which waits without a message.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from faccel.errors import JoinError, LaunchError
from faccel.launching.spec import LaunchSpec, rendezvous_address

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_REPORT_AFTER_S = 5.0  # nodes that start together usually join within this time
_POLL_S = 0.1


def join_nodes(spec: LaunchSpec) -> TCPStore:
    """Wait until the nodes of `spec` have joined, or the smallest number of a range.

    Connects to the store at the rendezvous address, or serves it if the address is this node's.

    Effects: ambient, collective over the nodes.

    Returns:
        The store. Keep it while the launch runs: torchrun's rendezvous uses the same server.

    Raises:
        JoinError: Too few nodes joined within `spec.join_timeout_s`; lists the missing ones.
        LaunchError: Two nodes have the same `--node-rank`.
    """
    import torch.distributed as dist

    # The address of torchrun's rendezvous, too: both use one server.
    host, port = rendezvous_address(spec)
    # Of a range the minimum: torchrun lets more nodes join later.
    num_nodes = int(spec.nnodes.partition(":")[0])
    store = _open_store(spec, host, port)
    # Several runs may use one rendezvous server under different names.
    prefix = f"faccel/joining/{spec.rdzv_id}/"
    _register(spec, store, prefix)
    keys = [f"{prefix}{node}" for node in range(num_nodes)]
    try:
        # Usually all nodes join within this time, and nothing is printed.
        if not _poll(lambda: store.check(keys), min(_REPORT_AFTER_S, spec.join_timeout_s)):
            _wait_with_report(spec, store, keys, f"at {host}:{port}")
    except dist.DistError as error:
        raise JoinError(
            "the node that serves the rendezvous has gone",
            got=f"{host}:{port}: {str(error).splitlines()[0]}",
            fix=f"read the output on `{host}`, and start all nodes again",
        ) from None
    return store


def agree_on_run_id(spec: LaunchSpec, store: TCPStore, proposal: str) -> str:
    """Return the proposal of the first node that calls it; PyTorch's keys contain it.

    Effects: ambient, collective over the nodes.
    """
    return store.compare_set(f"faccel/joining/{spec.rdzv_id}/run_id", "", proposal).decode()


def _register(spec: LaunchSpec, store: TCPStore, prefix: str) -> None:
    """Store the host name of this node under its rank."""
    hostname = socket.gethostname()
    node_rank = spec.node_rank
    if node_rank is None:
        # An elastic launch numbers its nodes in the order of arrival.
        node_rank = store.add(f"{prefix}count", 1) - 1
    # compare_set returns the value that is stored: an earlier one if two nodes claim one rank
    owner = store.compare_set(f"{prefix}{node_rank}", "", hostname).decode()
    if owner != hostname:
        raise LaunchError(
            "two nodes have the same `--node-rank`",
            got=f"--node-rank {node_rank} on {hostname} and on {owner}",
            fix="number the nodes 0, 1, ...",
        )


def _wait_with_report(spec: LaunchSpec, store: TCPStore, keys: list[str], address: str) -> None:
    """Print which nodes are missing, and wait for the rest of the timeout."""
    # The first part of the timeout is over.
    remaining_s = spec.join_timeout_s - _REPORT_AFTER_S
    if remaining_s > 0:
        sys.stderr.write(f"{_joined(store, keys)} {address}; waiting for the missing nodes\n")
    if _poll(lambda: store.check(keys), remaining_s):
        return
    raise JoinError(
        f"not all nodes joined within {spec.join_timeout_s:g} s",
        got=f"{_joined(store, keys)} {address}",
        fix=(
            f"start the missing nodes with the same `--nnodes {spec.nnodes}` and rendezvous "
            "address, or increase `--join-timeout`"
        ),
    )


def _poll(is_ready: Callable[[], bool], timeout_s: float) -> bool:
    """Return whether `is_ready()` becomes true in time.

    This does not use `store.wait`, which prints a C++ stack trace when it times out.
    """
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _accepts_connections(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_REPORT_AFTER_S).close()
    except OSError:
        return False
    return True


def _open_store(spec: LaunchSpec, host: str, port: int) -> TCPStore:
    """Serve the store if the rendezvous address is this node's, otherwise connect to it."""
    import torch.distributed as dist

    if spec.node_rank is None:
        is_server = is_local_address(host)
        # Without a rank the host that owns the address serves the store.
        server = f"`{host}`"
    else:
        is_server = spec.node_rank == 0
        server = "with `--node-rank 0`"
    if is_server:
        store = _serve(host, port)
        if store is not None:
            return store
    if _poll(lambda: _accepts_connections(host, port), spec.join_timeout_s):
        with suppress(dist.DistNetworkError):  # the server has just ended
            return dist.TCPStore(host, port, wait_for_workers=False)
    raise JoinError(
        "the rendezvous of the nodes is unreachable",
        got=(
            f"no answer from {host}:{port} within {spec.join_timeout_s:g} s, "
            f"and only this node of {spec.nnodes}"
        ),
        fix=(
            f"start the node {server}, and check that this node ({socket.gethostname()}) "
            f"can connect to port {port}"
        ),
    )


def _serve(host: str, port: int) -> TCPStore | None:
    """Serve the store on the address of `host`; None if another launcher serves the port already.

    Raises:
        LaunchError: `host` is not an address of this node that other nodes can reach.
    """
    from faccel.runtime.store_server import serve_store

    try:
        _check_reachable(host)
        # shared: PyTorch's static rendezvous opens the same port in this process
        store = serve_store(host, port, shared=True)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise LaunchError(
            "the address of the rendezvous is not one of this node",
            got=f"{host}: {error.strerror}",
            fix=(
                "name an address of this node, or, if its port is forwarded, "
                "`--main-address 0.0.0.0` on this node only: it listens on all interfaces"
            ),
        ) from None
    return store


def _check_reachable(host: str) -> None:
    """Raise if `host` is a name of this node that means the node itself on each node.

    Some systems write `127.0.1.1 NAME` into `/etc/hosts`.
    """
    address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0]
    # `localhost`, or the address itself, is for several launchers on one host.
    if host in ("localhost", address) or not ipaddress.ip_address(address).is_loopback:
        return
    raise LaunchError(
        "the other nodes cannot reach the address of the rendezvous",
        got=f"`{host}` is {address} on this node",
        fix="pass the address of its network card, as in `--main-address 10.0.0.1`, on all nodes",
    )


def is_local_address(host: str) -> bool:
    """Whether `host` is an address of this node.

    Effects: ambient. Resolves the name, and binds a port for a moment.
    """
    try:
        # Only an address of this host can be bound.
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _joined(store: TCPStore, keys: list[str]) -> str:
    """Return which nodes have joined and which are missing."""
    joined: list[str] = []
    missing: list[str] = []
    for node, key in enumerate(keys):
        if store.check([key]):
            joined.append(f"{node} ({store.get(key).decode()})")
        else:
            missing.append(str(node))
    return (
        f"{len(joined)} of {len(keys)} nodes joined: {', '.join(joined)}; "
        f"missing: {', '.join(missing)}"
    )
