"""The simulated world's store, which torch's own groups and meshes meet in."""

# pyright: reportIncompatibleMethodOverride=false
# c10d's stubs name some arguments otherwise; these are the methods that it calls.

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from faccel.call_site import call_site
from faccel.testing.world import World


class SimulatedStore(dist.Store):
    """The store of a simulated world, as one rank sees it: a rank that waits for a key lets the others run.

    Args:
        world: The simulation.
        rank: Whose view it is.
    """

    def __init__(self, world: World, rank: int) -> None:
        super().__init__()
        self._world, self._rank = world, rank

    def set(self, key: str, value: Any) -> None:
        self._world.keys[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._world.keys[key]

    def add(self, key: str, amount: int) -> int:
        total = int(self._world.keys.get(key, b"0")) + amount
        self._world.keys[key] = str(total).encode()
        return total

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        there = self._world.keys
        site = call_site()
        self._world.baton.wait(
            self._rank, lambda: all(k in there for k in keys), f"waiting in the store at {site}"
        )

    def check(self, keys: list[str]) -> bool:
        return all(key in self._world.keys for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        have = self._world.keys.get(key)
        if (have is None and expected == "") or (have is not None and have == _bytes(expected)):
            self._world.keys[key] = have = _bytes(desired)
        return have if have is not None else _bytes(expected)

    def delete_key(self, key: str) -> bool:
        return self._world.keys.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._world.keys)

    def set_timeout(self, timeout: timedelta) -> None:
        pass  # nobody waits for time here: a wait that cannot end fails at once


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
