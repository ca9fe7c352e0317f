"""Ranks that start again and again agree on a name, though the store remembers every earlier start."""

import random
import threading

import pytest
import torch.distributed as dist

from faccel.runtime.rendezvous import agreed_name


def start(store, world_size, missing=(), timeout_s=20.0):
    """One start of a world: its ranks come in any order, some before the others have left."""
    names = {}

    def run(rank):
        threading.Event().wait(random.Random(rank * 7 + len(names)).random() * 0.05)
        try:
            names[rank] = agreed_name(store, rank, world_size, timeout_s)
        except dist.DistNetworkError as error:
            names[rank] = error

    threads = [
        threading.Thread(target=run, args=(rank,))
        for rank in range(world_size)
        if rank not in missing
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_start_has_a_name_of_its_own_that_all_ranks_know(world_size):
    store, seen = dist.HashStore(), set()
    for _ in range(8):
        names = start(store, world_size)
        assert len(set(names.values())) == 1, names
        seen |= set(names.values())
    assert len(seen) == 8


def test_ranks_that_do_not_come_are_told_from_those_that_did():
    store = dist.HashStore()
    start(store, 3)
    names = start(store, 3, missing=[2], timeout_s=0.5)
    assert "2 of 3 ranks came: 0, 1" in str(names[0])
    assert "rank 0 did not come" in str(start(dist.HashStore(), 2, missing=[0], timeout_s=0.2)[1])
