"""Machines that meet before a launch: who is here, and who is missed."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from faccel.errors import JoinError, LaunchError
from faccel.launching.spec import LaunchSpec, meeting_place

_PATIENCE_S = 5.0  # until a line says what is waited for
_PAUSE_S = 0.1


def join(spec: LaunchSpec) -> Any:
    """Wait until all machines of `spec` are here, or the smallest number of a range; the last one lets all go on.

    Effects: ambient, collective over the machines. Connects to the meeting place, or opens it where that is this
    machine; what is returned keeps it open, and torch's own rendezvous shares it within the process.

    Raises:
        JoinError: Too few came within `spec.join_timeout_s`: says how many of how many, and who.
        LaunchError: Two machines have the same `--node-rank`.
    """
    import torch.distributed as dist

    host, port = meeting_place(spec)
    wanted = int(spec.nnodes.partition(":")[0])
    store = _open(spec, host, port)
    me = socket.gethostname()
    base = f"faccel/joining/{spec.rdzv_id}/"
    mine = spec.node_rank if spec.node_rank is not None else store.add(f"{base}count", 1) - 1
    taken = store.compare_set(f"{base}{mine}", "", me).decode()
    if taken != me:
        got = f"--node-rank {mine} on {me}, and on {taken}"
        raise LaunchError(
            "each machine has a number of its own", got=got, fix="number them 0, 1, ..."
        )
    keys = [f"{base}{node}" for node in range(wanted)]
    try:
        if not _until(lambda: store.check(keys), min(_PATIENCE_S, spec.join_timeout_s)):
            _wait_on(spec, store, keys, f" at {host}:{port}")
    except dist.DistError as error:
        fix = "look at what that machine says, and start all again"
        what = "the machine that all meet at has gone"
        raise JoinError(what, got=f"{host}:{port}: {str(error).splitlines()[0]}", fix=fix) from None
    return store


def _wait_on(spec: LaunchSpec, store: Any, keys: Sequence[str], where: str) -> None:
    rest = spec.join_timeout_s - _PATIENCE_S
    if rest > 0:
        sys.stderr.write(f"{_who(store, keys)}{where}; waiting for the rest\n")
    if not _until(lambda: store.check(keys), rest):
        fix = f"start the rest with the same `--nnodes {spec.nnodes}` and meeting place, or raise `--join-timeout`"
        what = f"the machines did not come together within {spec.join_timeout_s:g} s"
        raise JoinError(what, got=f"{_who(store, keys)}{where}", fix=fix)


def _until(fine: Callable[[], bool], seconds: float) -> bool:
    """Ask until it is `fine` or the time is over. torch's own waiting prints C++ stack traces where it ends in vain."""
    deadline = time.monotonic() + seconds
    while not fine():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_S)
    return True


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except OSError:
        return False
    return True


def _open(spec: LaunchSpec, host: str, port: int) -> Any:
    import torch.distributed as dist

    is_host = spec.node_rank == 0 if spec.node_rank is not None else is_here(host)
    for hosts in (True, False) if is_host else (False,):
        if not hosts and not _until(lambda: _answers(host, port), spec.join_timeout_s):
            break
        with suppress(
            dist.DistNetworkError
        ):  # another launcher on this machine was first, or it has just gone
            return dist.TCPStore(
                host, port, is_master=hosts, wait_for_workers=False, multi_tenant=True
            )
    got = f"nobody answers at {host}:{port} after {spec.join_timeout_s:g} s; of {spec.nnodes} machines this one is here"
    who = (
        "the machine with `--node-rank 0`"
        if spec.node_rank is not None
        else f"the machine `{host}`"
    )
    fix = f"start {who}, and see that this one ({socket.gethostname()}) reaches that port"
    raise JoinError("the meeting place of the machines cannot be reached", got=got, fix=fix)


def is_here(host: str) -> bool:
    """Whether `host` is an address of this machine.

    Effects: ambient. Asks the resolver, and binds a port for a moment.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _who(store: Any, keys: Sequence[str]) -> str:
    here = {node: store.get(key).decode() for node, key in enumerate(keys) if store.check([key])}
    names = ", ".join(f"{node} ({name})" for node, name in here.items())
    missing = ", ".join(str(node) for node in range(len(keys)) if node not in here)
    return f"{len(here)} of {len(keys)} machines are here: {names}; missing: {missing}"
