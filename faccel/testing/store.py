"""The store of a simulated world, which PyTorch's groups and meshes use for their rendezvous."""

# pyright: reportIncompatibleMethodOverride=false
# The stubs of c10d give some arguments other names; these are the methods that c10d calls.

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from faccel.call_site import call_site
from faccel.testing.world import World


class SimulatedStore(dist.Store):
    """The store of a simulated world for one rank. While it waits for a key, other ranks run.

    Args:
        world: The simulation.
        rank: The rank that uses this object.
    """

    def __init__(self, world: World, rank: int) -> None:
        super().__init__()
        self._world = world
        self._rank = rank

    def set(self, key: str, value: str | bytes) -> None:
        self._world.keys[key] = _bytes(value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._world.keys[key]

    def add(self, key: str, amount: int) -> int:
        # c10d stores counters as decimal text.
        total = int(self._world.keys.get(key, b"0")) + amount
        self._world.keys[key] = str(total).encode()
        return total

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        action = f"waiting for a key of the store at {call_site()}"
        self._world.scheduler.wait(self._rank, lambda: self.check(keys), action)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._world.keys for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        current = self._world.keys.get(key)
        if current is None and expected:  # as c10d's stores: nothing is set
            return _bytes(expected)
        if current is None or current == _bytes(expected):
            self._world.keys[key] = _bytes(desired)
        return self._world.keys[key]

    def delete_key(self, key: str) -> bool:
        return self._world.keys.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._world.keys)

    def set_timeout(self, timeout: timedelta) -> None:
        """Do nothing: a wait that can never end raises at once."""


def _bytes(value: str | bytes) -> bytes:
    # c10d passes text from Python and bytes from C++.
    if isinstance(value, str):
        return value.encode()
    return bytes(value)
