"""A name for this start of a world, on which its ranks agree through a store that has seen earlier starts."""

from __future__ import annotations

import json
import secrets
import time

import torch.distributed as dist

_POLL_S = 0.01


def agreed_name(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return the same name on every rank, another one for every start.

    Agents of several machines count restarts apart: one that only joins again has counted none. So a rank shows a word
    of its own, and goes by the name in which rank 0 repeats that very word; rank 0 repeats what it sees until all have
    said that they have read theirs.

    Effects: ambient, collective.

    Raises:
        dist.DistNetworkError: Not all ranks came in time; says which did.
    """
    word = secrets.token_hex(8)
    deadline = time.monotonic() + timeout_s
    if rank:
        return _follow(store, rank, word, deadline)
    others, seen = range(1, world_size), {}
    while time.monotonic() < deadline:
        if all(store.check([f"faccel/read/{word}/{other}"]) for other in others):
            return word
        heard = {str(other): _get(store, f"faccel/here/{other}") for other in others}
        if heard != seen:
            store.set("faccel/name", json.dumps({"name": word, "words": heard}))
            seen = heard
        time.sleep(_POLL_S)
    came = [0, *(other for other in others if store.check([f"faccel/read/{word}/{other}"]))]
    raise dist.DistNetworkError(
        f"{len(came)} of {world_size} ranks came: {', '.join(map(str, came))}"
    )


def _follow(store: dist.Store, rank: int, word: str, deadline: float) -> str:
    store.set(f"faccel/here/{rank}", word)
    while time.monotonic() < deadline:
        told = json.loads(_get(store, "faccel/name") or "{}")
        if told.get("words", {}).get(str(rank)) == word:
            store.set(f"faccel/read/{told['name']}/{rank}", "yes")
            return str(told["name"])
        time.sleep(_POLL_S)
    raise dist.DistNetworkError("rank 0 did not come")


def _get(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
