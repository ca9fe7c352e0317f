"""Agreement of all ranks on a name for one start of a world, through a store with older entries."""

from __future__ import annotations

import json
import secrets
import time

import torch.distributed as dist

_POLL_S = 0.01
_NAME_KEY = "faccel/name"


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name that is the same on every rank, and new at every start.

    The store outlives the ranks: after a restart it still holds the entries of earlier starts, and
    the agents of several nodes count restarts separately. So each rank publishes a random token.
    Rank 0 publishes its token, the name, together with the tokens that it read. A rank accepts the
    name if its own token is among them, and confirms it. Rank 0 repeats this until all confirmed.

    Effects: ambient, collective.

    Args:
        store: A store that all ranks share.
        rank: Rank of this process.
        world_size: Number of ranks.
        timeout_s: Seconds to wait for the other ranks.

    Raises:
        dist.DistNetworkError: A rank is missing after the timeout; lists those that started.
    """
    token = secrets.token_hex(8)
    deadline = time.monotonic() + timeout_s
    if rank > 0:
        return _accept_name(store, rank, token, deadline)
    other_ranks = range(1, world_size)
    published: dict[str, str | None] | None = None
    while time.monotonic() < deadline:
        if all(_is_confirmed(store, token, other) for other in other_ranks):
            return token
        tokens = {str(other): _get(store, _token_key(other)) for other in other_ranks}
        # Only changes are written: a store on another node is slow.
        if tokens != published:
            store.set(_NAME_KEY, json.dumps({"name": token, "tokens": tokens}))
            published = tokens
        time.sleep(_POLL_S)
    # A rank that published but did not confirm is missing too: it has ended since.
    confirmed = [str(other) for other in other_ranks if _is_confirmed(store, token, other)]
    started = ["0", *confirmed]
    raise dist.DistNetworkError(
        f"{len(started)} of {world_size} ranks started: {', '.join(started)}"
    )


def _accept_name(store: dist.Store, rank: int, token: str, deadline: float) -> str:
    """Return the name that rank 0 published for this start."""
    store.set(_token_key(rank), token)
    while time.monotonic() < deadline:
        # Of an earlier start, until rank 0 of this one has published.
        message = json.loads(_get(store, _NAME_KEY) or "{}")
        # An entry of an earlier start holds an earlier token of this rank.
        if message.get("tokens", {}).get(str(rank)) == token:
            name = str(message["name"])
            store.set(_confirmation_key(name, rank), "confirmed")
            return name
        time.sleep(_POLL_S)
    raise dist.DistNetworkError("rank 0 did not start")


def _token_key(rank: int) -> str:
    return f"faccel/token/{rank}"


def _confirmation_key(name: str, rank: int) -> str:
    return f"faccel/confirmed/{name}/{rank}"


def _is_confirmed(store: dist.Store, name: str, rank: int) -> bool:
    return store.check([_confirmation_key(name, rank)])


def _get(store: dist.Store, key: str) -> str | None:
    # `get` alone would block until the key exists
    if not store.check([key]):
        return None
    return store.get(key).decode()


def connection_fix(error: BaseException) -> str:
    """Return how to fix an error of c10d while a process connects to the others.

    Effects: pure.
    """
    # gloo has found no interface of the name in `GLOO_SOCKET_IFNAME`.
    if "Unable to find address for" in str(error):
        return (
            "set `GLOO_SOCKET_IFNAME` to a network interface of this node (`ip -br address` lists "
            "them), or leave it out"
        )
    return "start all of them, with the same `MASTER_ADDR` and a free `MASTER_PORT`"
